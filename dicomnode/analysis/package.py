"""What a model package is: `manifest.toml`, `bundle/` (a MONAI Bundle), and the digest that a person consents to.

Reads a package as data only. Must never import torch or MONAI, and never run or even resolve what a bundle names.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dicomnode.errors import PackageError
from dicomnode.findings import Code

MANIFEST = "manifest.toml"
BUNDLE = "bundle"
NETWORK_CONFIG = "bundle/configs/inference.json"
METADATA_CONFIG = "bundle/configs/metadata.json"
WEIGHTS = ("bundle/models/model.safetensors", "bundle/models/model.pt")  # the first that is there
PAPERS = ("evaluation.json", "MODEL_CARD.md")  # for people: they change nothing that runs, so the digest leaves them out

_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
_Text = Annotated[str, Field(min_length=1, max_length=1024)]
_Short = Annotated[str, Field(min_length=1, max_length=64)]
_Uid = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)+$", max_length=64)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CodeEntry(_Section):
    """A coded concept as people write it in a manifest."""

    value: Annotated[str, Field(min_length=1, max_length=16)]  # Code Value is SH (PS3.3 8.8)
    scheme: Annotated[str, Field(min_length=1, max_length=16)]
    meaning: _Short

    def code(self) -> Code:
        """Return it as the value type that findings carry."""
        return Code(value=self.value, scheme=self.scheme, meaning=self.meaning)


class InputSection(_Section):
    """Which series the model accepts. What stands here is checked against headers and geometry, never against names."""

    modality: Literal["CT"]
    sop_classes: Annotated[tuple[_Uid, ...], Field(min_length=1)]
    body_parts: tuple[_Short, ...] = Field((), description="values of Body Part Examined; empty: any")
    body_part_may_be_absent: bool = True
    minimum_slices: int = Field(8, ge=2)
    maximum_slices: int = Field(2000, ge=2)
    slice_spacing_mm: tuple[_Positive, _Positive] = Field(description="smallest and largest distance of neighbouring slices")
    pixel_spacing_mm: tuple[_Positive, _Positive] = Field(description="smallest and largest distance of rows and of columns")
    exclude_image_types: tuple[_Short, ...] = Field(
        ("LOCALIZER", "DERIVED\\SECONDARY", "SCREEN SAVE", "DOSE_INFO"),  # SECONDARY alone also marks later reconstructions of raw data
        description="an image whose Image Type has all values of an entry is left out",
    )
    region: Literal["", "lung"] = Field("", description="anatomical region that limits where findings may lie")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.minimum_slices > self.maximum_slices:
            raise ValueError("minimum_slices is larger than maximum_slices")
        for key in ("slice_spacing_mm", "pixel_spacing_mm"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key} has its larger value first")
        return self


class PreprocessingSection(_Section):
    """The grid and the intensities that the network was trained on."""

    spacing_mm: tuple[_Positive, _Positive, _Positive] = Field(description="slice, row, column")
    window: tuple[_Number, _Number] = Field(description="clipped to these values, then scaled to 0..1")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.window[0] >= self.window[1]:
            raise ValueError("window needs its smaller value first")
        return self


_Edge = Annotated[int, Field(ge=1, le=512)]


class InferenceSection(_Section):
    """How the network slides over the volume."""

    window: tuple[_Edge, _Edge, _Edge] = Field(description="voxels along slice, row, column")
    overlap: float = Field(0.25, ge=0, lt=1)
    batch: int = Field(1, ge=1, le=64)


class OutputSection(_Section):
    """One output channel: what it means, and when it is a finding."""

    channel: int = Field(ge=0)
    label: _Short
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    threshold: float = Field(0.5, gt=0, lt=1, description="a voxel above it belongs to the segment")
    minimum_ml: float = Field(0.0, ge=0, allow_inf_nan=False, description="smaller components are dropped")
    minimum_score: float = Field(0.0, ge=0, le=1, description="components below it are dropped")
    score: Literal["mean-of-top-quarter"] = "mean-of-top-quarter"
    maximum_findings: int = Field(50, ge=1, le=1000, description="the most probable ones; the others are counted as omitted")
    category: CodeEntry
    type: CodeEntry
    site: CodeEntry | None = None
    colour_cielab: tuple[
        Annotated[float, Field(ge=0, le=100)], Annotated[float, Field(ge=-128, le=127)], Annotated[float, Field(ge=-128, le=127)]
    ] = Field((70.0, 60.0, 60.0), description="L*, a*, b*: Recommended Display CIELab Value before its DICOM encoding")


class Manifest(_Section):
    """`manifest.toml`, schema 1: what a MONAI Bundle's metadata lacks."""

    schema_version: Literal[1] = Field(alias="schema")
    name: _Name
    version: _Name
    title: _Short
    manufacturer: _Short
    algorithm_name: _Short
    licence: _Text
    intended_use: _Text
    training_data: _Text
    kind: Literal["segmentation"]
    input: InputSection
    preprocessing: PreprocessingSection
    inference: InferenceSection
    outputs: Annotated[tuple[OutputSection, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package on disk whose manifest is sound. Nothing of it has run."""

    folder: Path
    manifest: Manifest
    digest: str  # sha256 hex


def load_package(folder: Path) -> Package:
    """Read a package's manifest and digest.

    Raises:
        PackageError: the folder, a file that must be there, or the manifest is not as it must be; every mistake of the
            manifest is named at once.
    """
    files = package_files(folder)
    contents = {name: _read(path) for name, path in files.items() if name == MANIFEST}
    manifest = parse_manifest(contents[MANIFEST], folder)
    return Package(folder=folder, manifest=manifest, digest=digest_of(folder))


def parse_manifest(content: bytes, folder: Path) -> Manifest:
    """Read the bytes of a `manifest.toml`; `folder` gives the name if the manifest has none (…/NAME or …/NAME/VERSION)."""
    try:
        entries = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PackageError(f"{MANIFEST} of the package {folder.name} is not TOML: {error}") from error
    absolute = folder.absolute()
    entries.setdefault("name", absolute.parent.name if absolute.name == entries.get("version") else absolute.name)
    try:
        return Manifest.model_validate(entries)
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise PackageError(f"{MANIFEST} of the package {folder.name} has {len(mistakes)} mistake(s): " + "; ".join(mistakes)) from error


def package_files(folder: Path) -> dict[str, Path]:
    """Return the files that the digest covers, by sorted POSIX name relative to `folder`.

    Raises:
        PackageError: a file that must be there is absent, or anything in the folder is a symbolic link or no plain file.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise PackageError(f"The package {folder} is not a folder.")
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder):  # does not follow links, and each link is refused below
        for name in (*folders, *names):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise PackageError(f"The package {folder.name} holds a symbolic link ({relative}): links are refused.")
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise PackageError(f"The package {folder.name} holds something that is no plain file ({relative}).")
            if stat.S_ISREG(mode) and (relative == MANIFEST or relative.startswith(f"{BUNDLE}/")):
                found[relative] = path
    absent = [name for name in (MANIFEST, NETWORK_CONFIG) if name not in found]
    if not any(name in found for name in WEIGHTS):
        absent.append(" or ".join(WEIGHTS))
    if absent:
        raise PackageError(f"The package {folder.name} lacks {', '.join(absent)}.")
    return dict(sorted(found.items()))


def digest_of(folder: Path) -> str:
    """Return the sha256 (hex) over the sorted relative names and the contents of `manifest.toml` and `bundle/`."""
    return digest_of_contents((name, _read(path)) for name, path in package_files(folder).items())


def digest_of_contents(contents: Iterable[tuple[str, bytes]]) -> str:
    """Return the digest of (relative name, bytes) pairs in sorted order; lengths keep names and contents apart."""
    total = hashlib.sha256()
    for name, content in contents:
        encoded = name.encode("utf-8", "surrogateescape")
        total.update(len(encoded).to_bytes(8, "big") + encoded + len(content).to_bytes(8, "big"))
        total.update(content)
    return total.hexdigest()


def copy_package(source: Path, destination: Path) -> None:
    """Copy what the digest covers, and the papers, to `destination`, which must not exist yet.

    Raises:
        PackageError: the source is unsafe or incomplete, the destination exists, or the copy's digest differs.
    """
    files = package_files(source)
    if destination.exists():
        raise PackageError(f"The folder {destination} of the package exists already.")
    for name in (*files, *(paper for paper in PAPERS if (source / paper).is_file())):
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target, follow_symlinks=False)
    if digest_of(destination) != digest_of(source):
        shutil.rmtree(destination)
        raise PackageError(f"The package {source.name} changed while it was copied.")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path.name} of the package cannot be read ({error.strerror}).") from error
