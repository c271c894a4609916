"""Cases from NIfTI and NRRD files with label maps, found and read as a layout (TOML) says.

NIfTI's positions are RAS, NRRD's are as its `space` says; what leaves here is LPS. A label map must lie where its image lies.
"""

from __future__ import annotations

import gzip
import itertools
import re
import tomllib
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import nibabel
import nrrd
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dicomnode.analysis.grid import resample_to
from dicomnode.analysis.manifest import Name
from dicomnode.errors import ConfigError, UsageError
from dicomnode.findings import Volume, Voxels
from dicomnode.training.dataset import Mask
from dicomnode.training.sources import AnnotatedCase, Source

HALF = 0.5  # voxel: how far a label map may lie from its image
SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr")
_TO_LPS = {
    "left": 1,
    "right": -1,
    "posterior": 1,
    "anterior": -1,
    "superior": 1,
    "inferior": -1,
    "l": 1,
    "r": -1,
    "p": 1,
    "a": -1,
    "s": 1,
    "i": -1,
}
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    zlib.error,
    gzip.BadGzipFile,
    ImageFileError,
    HeaderDataError,
    nrrd.NRRDError,
)

Pattern = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LabelRule(_Section):
    """Which voxels of a label map are a label."""

    file: Pattern
    values: tuple[int, ...] = Field((), description="of the label map; empty: every value but 0")


class Layout(_Section):
    """Where the files of a case lie. A pattern is a path below the source; `{case}` stands for the case's name, `*` for anything but /."""

    modality: str
    channels: dict[Name, Pattern] = Field(min_length=1, description="the first one finds the cases and gives them their grid")
    labels: dict[str, LabelRule] = Field(min_length=1)
    optional: tuple[Name, ...] = Field((), description="channels that a case may lack; never the first")
    patient: str = Field("(.+)", description="regular expression over the case's name; its first group is the patient")
    terms: str = ""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        patterns = [*self.channels.values(), *(rule.file for rule in self.labels.values())]
        if missing := [pattern for pattern in patterns if "{case}" not in pattern]:
            raise ValueError(f"the pattern {missing[0]} has no {{case}}")
        if set(self.optional) - set(list(self.channels)[1:]):
            raise ValueError("optional names what is no channel, or the first one")
        try:
            groups = re.compile(self.patient).groups
        except re.error as error:
            raise ValueError(f"patient is no regular expression: {error}") from error
        if groups < 1:
            raise ValueError("patient has no group")
        return self


def load_layout(file: Path) -> Layout:
    """Read and check a layout.

    Raises:
        ConfigError: absent, no TOML, or with mistakes, which are named at once.
    """
    try:
        return Layout.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".lstrip(": ") for e in error.errors()]
        raise ConfigError(f"{file} has {len(mistakes)} mistake(s): {'; '.join(mistakes)}") from error


def label_map_sources(folder: Path, layout: Layout) -> Iterator[Source]:
    """Yield the cases of a folder.

    Raises:
        UsageError: a case has no file or several for a channel, or no case is there.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    first = next(iter(layout.channels.values()))
    cases = sorted({match["case"] for name in files if (match := _expression(first).fullmatch(name))})
    if not cases:
        raise UsageError(f"{folder} holds no file that fits {first}")
    for case in cases:
        channels = {}
        for channel, pattern in layout.channels.items():
            file = _only(files, pattern, case, folder)
            if file is not None:
                channels[channel] = file
            elif channel not in layout.optional:
                raise UsageError(f"{folder}: case {case} has no file for the channel {channel} ({pattern})")
        patient = re.fullmatch(layout.patient, case)
        if patient is None:
            raise UsageError(f"{folder}: the name of case {case} doesn't fit patient = {layout.patient!r}")
        maps = {rule.file: _only(files, rule.file, case, folder) for rule in layout.labels.values()}
        yield Source(
            name=str(channels[next(iter(layout.channels))]), patient=patient[1], study=case, kind=_kind(channels.values()),
            modality=layout.modality, channels=tuple(layout.channels), labels=tuple(layout.labels),
            read=partial(_read, case, channels, maps, layout),
        )  # fmt: skip


def read_image(file: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return the values (k, r, c) of a NIfTI or NRRD file, the file's last axis first, and the affine from (k, r, c, 1) to LPS mm.

    Raises:
        UsageError: it isn't readable, isn't three-dimensional, or doesn't say where it lies.
    """
    try:
        values, affine = _read_nrrd(file) if file.suffix in (".nrrd", ".nhdr") else _read_nifti(file)
    except _UNREADABLE as error:
        raise UsageError(f"{file} cannot be read as an image ({type(error).__name__})") from error
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise UsageError(f"{file} has {values.ndim} dimensions, and an image has three")
    return values.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]


def _read_nifti(file: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    image: Any = nibabel.load(file)
    if not int(image.header["sform_code"]) and not int(image.header["qform_code"]):
        raise UsageError(f"{file} doesn't say where it lies: its sform_code and qform_code are 0")
    if image.header.get_xyzt_units()[0] not in ("mm", "unknown"):
        raise UsageError(f"{file} measures in {image.header.get_xyzt_units()[0]}, and millimetres are read alone")
    affine = np.asarray(image.affine, dtype=np.float64)
    return np.asanyarray(image.dataobj), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # RAS to LPS


def _read_nrrd(file: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    values, header = nrrd.read(str(file))
    words = str(header.get("space", "")).lower()
    axes = words.split("-") if "-" in words else list(words)
    directions, origin = header.get("space directions"), header.get("space origin")
    if (
        [axis[:1] in pair for axis, pair in zip(axes, ("lr", "pa", "si"), strict=False)] != [True] * 3
        or directions is None
        or origin is None
    ):
        raise UsageError(f"{file} doesn't say where it lies: it needs space, space directions and space origin")
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(directions, dtype=np.float64).T
    affine[:3, 3] = origin
    return values, np.diag([*(float(_TO_LPS[axis]) for axis in axes), 1.0]) @ affine


def _read(case: str, channels: Mapping[str, Path], maps: Mapping[str, Path | None], layout: Layout) -> AnnotatedCase:
    volumes: dict[str, Volume] = {}
    for channel, file in channels.items():
        volume = _volume(case, channel, file, layout.modality)
        volumes[channel] = resample_to(volume, next(iter(volumes.values()), volume))
    first = next(iter(volumes.values()))
    masks: dict[str, Mask] = {}
    looked_for: set[str] = set()
    for pattern, label_file in maps.items():
        if label_file is None:
            continue
        values = _on_grid(label_file, first)
        rules = {label: rule for label, rule in layout.labels.items() if rule.file == pattern}
        found = {label: np.isin(values, rule.values) if rule.values else values != 0 for label, rule in rules.items()}
        masks |= found
        if any(mask.any() for mask in found.values()):  # whoever drew one label of a map has looked for the others
            looked_for |= set(found)
    return AnnotatedCase(
        volumes=volumes, masks={label: masks[label] for label in layout.labels if label in masks}, looked_for=frozenset(looked_for),
        attributes={"slice_thickness_mm": round(max(first.spacing_mm), 3)},
    )  # fmt: skip


def _volume(case: str, channel: str, file: Path, modality: str) -> Volume:
    values, affine = read_image(file)
    if not np.isfinite(values).all():
        raise UsageError(f"{file} has values that are not finite")
    return Volume(
        voxels=_compact(values), affine=affine, sop_instance_uids=tuple(f"{case}.{channel}.{k}" for k in range(len(values))),
        series_instance_uid=f"{case}.{channel}", study_instance_uid=case, frame_of_reference_uid=case, modality=modality,
    )  # fmt: skip


def _compact(values: NDArray[Any]) -> Voxels:
    """int16 where each value is exact in it, as the node reads images, else float32."""
    limits = np.iinfo(np.int16)
    if values.min() >= limits.min and values.max() <= limits.max:
        compact = values.astype(np.int16)
        if np.array_equal(compact, values):
            return np.ascontiguousarray(compact)
    return np.ascontiguousarray(values, dtype=np.float32)


def _on_grid(file: Path, image: Volume) -> NDArray[Any]:
    """A label map on its image's voxels: its axes may run another way, but no voxel may lie more than half a voxel off."""
    values, affine = read_image(file)
    if not np.array_equal(values, np.round(values)):
        raise UsageError(f"{file} is no label map: it has values that aren't whole numbers")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UsageError(f"{file} doesn't say where it lies: an axis has no length")
    into = np.linalg.inv(affine) @ image.affine  # image index -> map index
    turn = np.round(into[:3, :3])
    is_turn = bool((np.abs(turn).sum(axis=0) == 1).all() and (np.abs(turn).sum(axis=1) == 1).all())
    order = np.abs(turn).argmax(axis=0) if is_turn else np.arange(3)
    if not is_turn or tuple(values.shape[axis] for axis in order) != image.voxels.shape:
        raise UsageError(
            f"{file} is shifted: it has {values.shape} voxels of another size or direction, and its image {image.voxels.shape}"
        )
    turned = values.transpose(order)
    flips = [turn[axis, a] < 0 for a, axis in enumerate(order)]
    exact = np.zeros((3, 4))  # image index -> map index, if it lay exactly there
    exact[:, :3] = turn
    for a, axis in enumerate(order):
        exact[axis, 3] = image.voxels.shape[a] - 1 if flips[a] else 0
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*((0, n - 1) for n in image.voxels.shape))])
    off = float(np.abs(corners @ (into[:3] - exact).T).max())
    if off > HALF:
        raise UsageError(f"{file} is shifted: it lies up to {off:.1f} voxels away from its image")
    return turned[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]


def _expression(pattern: str, case: str | None = None) -> re.Pattern[str]:
    """The pattern over paths below the source."""
    text, seen = "", case is not None
    for part in re.split(r"(\{case\}|\*)", pattern):
        if part == "*":
            text += "[^/]*"
        elif part == "{case}" and case is not None:
            text += re.escape(case)
        elif part == "{case}":
            text += "(?P=case)" if seen else "(?P<case>[^/]+)"
            seen = True
        else:
            text += re.escape(part)
    return re.compile(text)


def _only(files: Mapping[str, Path], pattern: str, case: str, folder: Path) -> Path | None:
    found = [path for name, path in files.items() if _expression(pattern, case).fullmatch(name)]
    if len(found) > 1:
        raise UsageError(f"{folder}: {len(found)} files of case {case} fit {pattern}, and one is wanted")
    return found[0] if found else None


def _kind(files: Any) -> str:
    return "NRRD" if all(file.suffix in (".nrrd", ".nhdr") for file in files) else "NIfTI"
