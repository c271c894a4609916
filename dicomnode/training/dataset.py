"""A data set for training and measuring: a folder of cases with images, truth and a split by patient, in one checked format.

    DATASET/dataset.json       what it is, and a row for each case
    DATASET/cases/<case>.npz   the arrays of a case, all on one grid (k, r, c); no pickles

The arrays of a case: one for each channel by its name, int16 or float32 in the modality's units; `truth`, uint8 (labels, k, r, c) of
0 and 1, which may overlap; `affine`, float64 4x4, which maps (k, r, c, 1) to LPS mm (of a projection as `findings.Volume` says).
Must never hold a patient's name, identifier or birth date.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dicomnode.analysis.manifest import Name
from dicomnode.analysis.volume import PROJECTIONS
from dicomnode.errors import UsageError
from dicomnode.findings import Calibration, Volume, Voxels

DATASET, CASES = "dataset.json", "cases"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
RESERVED = frozenset({"truth", "affine"})  # names of arrays that are no channel

Split = Literal["train", "validation", "test"]
# What is known of a label in a case. present: it has voxels; absent: somebody looked, and there is none; unlabelled: nobody looked
State = Literal["present", "absent", "unlabelled"]
Mask = NDArray[np.bool_]

_Case = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Label = Annotated[str, Field(min_length=1, max_length=64)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CaseRow(_Section):
    """A case as `dataset.json` names it."""

    case: _Case
    patient: Annotated[str, Field(min_length=1, max_length=64)]  # a pseudonym
    study: Annotated[str, Field(min_length=1, max_length=64)]  # a pseudonym
    split: Split
    file: str = Field(description="relative to the data set's folder: cases/<case>.npz")
    pixels_sha256: dict[Name, _Sha256] = Field(min_length=1, description="of each channel that the case has: `pixels_sha256`")
    truth_sha256: _Sha256
    labels: dict[_Label, State]
    source: str = Field(description="what it was made from, without names")
    calibration: Calibration = "patient"  # of a projection: where a millimetre is
    attributes: dict[str, str | float | None] = Field(default_factory=dict, description="scanner, slice_thickness_mm, sex, age_band, ...")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.file != f"{CASES}/{self.case}.npz":
            raise ValueError(f"the file of case {self.case} must be {CASES}/{self.case}.npz")
        return self


class _Content(_Section):
    """`dataset.json`, schema 1."""

    schema_version: Literal[1] = Field(alias="schema")
    name: str
    modality: Annotated[str, Field(pattern=r"^[A-Z0-9 _]{1,16}$")]
    channels: Annotated[tuple[Name, ...], Field(min_length=1)]
    labels: Annotated[tuple[_Label, ...], Field(min_length=1)]
    terms: str
    seed: int
    cases: Annotated[tuple[CaseRow, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if RESERVED & set(self.channels):
            raise ValueError(f"no channel may be called {' or '.join(sorted(RESERVED))}")
        for what, names in (("channel", self.channels), ("label", self.labels), ("case", [row.case for row in self.cases])):
            if twice := sorted({name for name in names if list(names).count(name) > 1}):
                raise ValueError(f"{what} {twice[0]} is named twice")
        for row in self.cases:
            if set(row.labels) != set(self.labels):
                raise ValueError(f"the labels of case {row.case} aren't those of the data set")
            if self.channels[0] not in row.pixels_sha256 or set(row.pixels_sha256) - set(self.channels):
                raise ValueError(f"the channels of case {row.case} aren't those of the data set, or its first one is missing")
        return self


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set's folder and what its `dataset.json` says.

    Each case has the first channel; others may be absent, as optional inputs of a model may.
    """

    folder: Path
    name: str
    modality: str
    channels: tuple[str, ...]  # names of a model's inputs
    labels: tuple[str, ...]  # in the order of the truth's first axis
    terms: str  # under which the images may be used; goes into the manifest of what is trained on them
    seed: int  # of the split
    cases: tuple[CaseRow, ...]

    def of_split(self, split: Split) -> tuple[CaseRow, ...]:
        """Return the cases of one split, in the file's order."""
        return tuple(row for row in self.cases if row.split == split)


@dataclass(frozen=True, kw_only=True)
class LabelledCase:
    """A case's images, as a model takes them, and what is true of them."""

    case: str
    volumes: Mapping[str, Volume]  # by channel; all on one grid
    truth: Mask  # (labels, k, r, c) in the order of the data set's labels; False throughout where a label isn't known
    labels: Mapping[str, State]
    attributes: Mapping[str, str | float | None]


def load_dataset(folder: Path) -> DataSet:
    """Read `dataset.json`; no case's file is opened.

    Raises:
        UsageError: it is absent, no JSON, of an unknown schema or with mistakes, which are named at once.
    """
    file = folder / DATASET
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}): {folder} is no data set") from error
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != 1:
        said = content.get("schema") if isinstance(content, dict) else None
        raise UsageError(f"{file} is of schema {said!r}, and this version reads schema 1 alone")
    try:
        read = _Content.model_validate(content)
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".lstrip(": ") for e in error.errors()]
        raise UsageError(f"{file} has {len(mistakes)} mistake(s): {'; '.join(mistakes[:10])}") from error
    return DataSet(
        folder=folder, name=read.name, modality=read.modality, channels=read.channels, labels=read.labels, terms=read.terms,
        seed=read.seed, cases=read.cases,
    )  # fmt: skip


def read_case(dataset: DataSet, row: CaseRow) -> LabelledCase:
    """Read a case and check all of it: shapes, types, values, hashes, and its truth against what the row promises.

    Raises:
        UsageError: the file is missing or not what the row says; names the file and what is wrong.
    """
    file = dataset.folder / row.file
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise UsageError(f"{file} is missing") from error
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{file} is no readable .npz without pickles ({type(error).__name__})") from error
    if wrong := [name for name in {*row.pixels_sha256, *RESERVED} if name not in arrays] or sorted(
        set(arrays) - {*row.pixels_sha256, *RESERVED}
    ):
        raise UsageError(f"{file} holds the arrays {', '.join(sorted(arrays))}, and {wrong[0]} is missing from it or from {DATASET}")
    channels = {name: arrays[name] for name in dataset.channels if name in row.pixels_sha256}
    check_arrays(str(file), channels, arrays["truth"], arrays["affine"], {label: row.labels[label] for label in dataset.labels})
    truth, affine = arrays["truth"].view(np.bool_), arrays["affine"]
    projection = dataset.modality in PROJECTIONS
    for name, voxels in channels.items():
        if pixels_sha256(voxels, affine, projection=projection) != row.pixels_sha256[name]:
            raise UsageError(f"{file}: the hash of the channel {name} differs from {DATASET}: the images were changed, or the row was")
    if truth_sha256(truth, affine) != row.truth_sha256:
        raise UsageError(f"{file}: the hash of the truth differs from {DATASET}: the labels were changed, or the row was")
    volumes = {name: _volume(name, voxels, affine, dataset.modality, row) for name, voxels in channels.items()}
    return LabelledCase(case=row.case, volumes=volumes, truth=truth, labels=row.labels, attributes=row.attributes)


def check_arrays(
    where: str, channels: Mapping[str, NDArray[Any]], truth: NDArray[Any], affine: NDArray[Any], states: Mapping[str, State]
) -> None:
    """Check a case's arrays: types, shapes, values, and the truth (uint8, the labels in the order of `states`) against the states.

    Raises:
        UsageError: one of them is wrong; the sentence begins with `where`.
    """
    first = next(iter(channels))
    shape = channels[first].shape
    for name, voxels in channels.items():
        sort = f"{where}: the channel {name} is {voxels.dtype} of shape {voxels.shape}, and"
        _expect(voxels.dtype in (np.int16, np.float32), f"{sort} must be int16 or float32")
        _expect(voxels.ndim == 3 and voxels.size > 0, f"{sort} must be (slices, rows, columns)")
        _expect(voxels.shape == shape, f"{sort} {first} has the shape {shape}")
        _expect(voxels.dtype == np.int16 or bool(np.isfinite(voxels).all()), f"{where}: the channel {name} has values that are not finite")
    _check_affine(where, affine)
    sort = f"{where}: the truth is {truth.dtype} of shape {truth.shape}, and"
    _expect(truth.dtype == np.uint8 and truth.ndim == 4, f"{sort} must be uint8 (labels, slices, rows, columns)")
    _expect(len(truth) == len(states), f"{sort} there are {len(states)} label(s)")
    _expect(truth.shape[1:] == shape, f"{sort} the image has the shape {shape}")
    _expect(int(truth.max()) <= 1, f"{where}: the truth has other values than 0 and 1")
    for (label, state), mask in zip(states.items(), truth.view(np.bool_), strict=True):
        promise = f"{where}: the label {label} is said to be {state}, and its truth"
        _expect(bool(mask.any()) == (state == "present"), f"{promise} {'is empty' if state == 'present' else 'has voxels'}")
        if state == "present":
            seen = any(bool((voxels[mask] > voxels.min()).any()) for voxels in channels.values())
            _expect(seen, f"{where}: the label {label} lies outside of what the image shows: it is shifted, or of another image")


def _check_affine(where: str, affine: NDArray[Any]) -> None:
    sort = f"{where}: the affine is {affine.dtype} of shape {affine.shape}, and"
    _expect(affine.shape == (4, 4) and affine.dtype == np.float64, f"{sort} must be float64 (4, 4)")
    _expect(bool(np.isfinite(affine).all()) and affine[3].tolist() == [0, 0, 0, 1], f"{where}: the affine isn't finite, or is none")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    _expect(lengths.min() > 1e-6, f"{where}: an axis of the affine has no length")
    # the axes of a volume are at right angles; a projection's third axis is no place
    _expect(abs(float(np.linalg.det(affine[:3, :3] / lengths))) > 0.99, f"{where}: the axes of the affine aren't at right angles")


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise UsageError(otherwise)


def pixels_sha256(voxels: Voxels, affine: NDArray[np.float64], *, projection: bool = False) -> str:
    """Return the hash of an image's values, the same whichever way its axes run and whichever type holds them.

    The axes are turned to head, back and left as nearly as they go, so that one image read from DICOM and from NIfTI is the same.
    """
    turned: NDArray[Any] = voxels
    if not projection:
        along = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))[::-1]
        order = max(itertools.permutations(range(3)), key=lambda axes: sum(abs(along[a, v]) for a, v in enumerate(axes)))
        turned = voxels.transpose(order)
        turned = turned[tuple(slice(None, None, -1 if along[a, v] < 0 else 1) for a, v in enumerate(order))]
    digest = hashlib.sha256(str(turned.shape).encode())
    for plane in turned:  # one at a time: a volume in float32 need not be held twice
        digest.update((plane.astype("<f4") + np.float32(0)).tobytes())  # -0 becomes 0
    return digest.hexdigest()


def truth_sha256(truth: Mask, affine: NDArray[np.float64]) -> str:
    """Return the hash of a truth and of where it lies."""
    digest = hashlib.sha256(str(truth.shape).encode())
    digest.update(np.packbits(truth).tobytes())
    digest.update(affine.astype("<f8").tobytes())
    return digest.hexdigest()


def write_case(folder: Path, row: Mapping[str, Any], volumes: Mapping[str, Volume], truth: Mask, states: Mapping[str, State]) -> CaseRow:
    """Write a case's arrays into the data set `folder` and return its row; `row` gives case, patient, study, split, source, attributes.

    `volumes` are by channel, the first channel first, on one grid; `truth` is (labels, k, r, c) in the order of `states`.

    Raises:
        UsageError: the arrays are no sound case; nothing is written.
    """
    first = next(iter(volumes.values()))
    affine = np.asarray(first.affine, dtype=np.float64)
    for name, volume in volumes.items():
        if volume.voxels.shape == first.voxels.shape and not np.allclose(volume.affine, affine, atol=1e-3):
            raise UsageError(f"case {row['case']}: the channel {name} lies on another grid than the first")
    channels = {name: volume.voxels for name, volume in volumes.items()}
    check_arrays(f"case {row['case']}", channels, truth.astype(np.uint8), affine, states)
    written = CaseRow.model_validate(
        {
            **row, "file": f"{CASES}/{row['case']}.npz", "labels": dict(states), "calibration": first.calibration,
            "pixels_sha256": {name: pixels_sha256(voxels, affine, projection=first.is_projection) for name, voxels in channels.items()},
            "truth_sha256": truth_sha256(truth, affine),
        }
    )  # fmt: skip
    file = folder / written.file
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {**channels, "truth": truth.astype(np.uint8), "affine": affine}
    np.savez_compressed(file, **arrays)
    return written


def write_dataset(dataset: DataSet) -> DataSet:
    """Write `dataset.json` of a data set whose cases have been written, over an earlier one, and read it again.

    Raises:
        UsageError: what the rows say doesn't go together.
    """
    content = {
        "schema": 1, "name": dataset.name, "modality": dataset.modality, "channels": list(dataset.channels),
        "labels": list(dataset.labels), "terms": dataset.terms, "seed": dataset.seed,
        "cases": [row.model_dump(mode="json") for row in dataset.cases],
    }  # fmt: skip
    file = dataset.folder / DATASET
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)
    return load_dataset(dataset.folder)


def _volume(name: str, voxels: Voxels, affine: NDArray[np.float64], modality: str, row: CaseRow) -> Volume:
    """A channel as a model takes it; its UIDs are names of the case's own."""
    volume = Volume(
        voxels=voxels, affine=affine, sop_instance_uids=tuple(f"{row.case}.{name}.{k}" for k in range(len(voxels))),
        series_instance_uid=f"{row.case}.{name}", study_instance_uid=row.study, frame_of_reference_uid=row.case, modality=modality,
    )  # fmt: skip
    return replace(volume, frame_of_reference_uid=None, calibration=row.calibration) if modality in PROJECTIONS else volume
