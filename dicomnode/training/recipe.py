"""The recipe of a training: one TOML file, checked, from which everything follows (with its seed)."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dicomnode.analysis.manifest import InputSection, Manifest, PreprocessingSection
from dicomnode.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NodulePatches(_Section):
    """Patches of chest CT with nodules. Orders: slice, row, column."""

    kind: Literal["chest-ct-nodules"] = "chest-ct-nodules"
    spacing_mm: tuple[float, float, float]
    window_hu: tuple[float, float] = Field(description="clipped to it and scaled to 0..1")
    patch: tuple[int, int, int]
    scales: tuple[float, ...] = Field((1.0,), min_length=1, description="times spacing_mm: patches for the passes of package.inference")
    region_margin_mm: float = Field(description="the loss counts voxels in the lung and this far around it")
    nodules_per_scene: int = Field(ge=0)
    diameters_mm: tuple[float, float, float] = Field(description="log-uniform from the first to the second; a few up to the third")
    large_share: float = Field(ge=0, le=1, description="share of nodules between the second and the third diameter")


class Radiographs(_Section):
    """Frontal chest radiographs with their lung fields, and films of what is no chest with empty masks. Two outputs: right, left."""

    kind: Literal["chest-radiographs"]
    size_px: int = Field(ge=32, le=1024, description="of the longer side; the other is padded with zeros")
    others: float = Field(ge=0, lt=1, description="share of films that are no upright frontal chest, or whose polarity is wrong")


class Opacities(_Section):
    """Frontal chest radiographs with opacities in the lungs and without. One output."""

    kind: Literal["chest-opacities"]
    size_px: int = Field(ge=32, le=1024, description="of the film's longer side")
    patch_px: int = Field(ge=32, le=1024, description="of the square that is cut out around the lungs, or padded with zeros")
    positive: float = Field(gt=0, le=1, description="share of films with opacities")


class Heads(_Section):
    """Parts of heads in MR of random contrast, and what is no head with empty masks. Orders: slice, row, column."""

    kind: Literal["mr-heads"]
    spacing_mm: tuple[float, float, float]
    patch: tuple[int, int, int]
    others: float = Field(ge=0, lt=1, description="share of volumes that hold no head")


class Augmentation(_Section):
    """What is changed at random in a patch of a data set, so that few patients teach more. A chance of 0 leaves a change out."""

    flip_axes: tuple[Literal["slice", "row", "column"], ...] = Field((), description="each flipped in half of the patches")
    affine: float = Field(0.0, ge=0, le=1, description="chance that a patch is turned, scaled and shifted")
    rotate_degrees: float = Field(15.0, ge=0, le=180, description="at most; about the slice axis alone where voxels aren't cubes")
    scale: float = Field(0.15, ge=0, lt=0.5, description="larger or smaller by at most this share")
    elastic: float = Field(0.0, ge=0, le=1, description="chance that a patch is bent")
    gamma: float = Field(0.0, ge=0, le=1)
    noise: float = Field(0.0, ge=0, le=1)
    noise_deviation: float = Field(0.05, ge=0, description="largest, in units of the network's intensities")
    shift: float = Field(0.0, ge=0, le=1)
    shift_by: float = Field(0.1, ge=0, description="at most, in units of the network's intensities")


class DatasetPatches(_Section):
    """Patches of a data set's cases, prepared as the package prepares a study. Orders: slice, row, column.

    Grid, intensities and region are the package's: `preprocessing` and `inputs` are copied from it and can't be given here.
    """

    kind: Literal["dataset"]
    patch: tuple[int, int, int] = Field(description="voxels; of a projection the first is 1")
    channels: tuple[str, ...] = Field(description="of the data set, one for each input of the package in its order")
    labels: tuple[str, ...] = Field(description="of the data set, one for each output of the package in its order")
    foreground: float = Field(0.6, ge=0, le=1, description="share of patches around a voxel of a label")
    drop_optional: float = Field(0.0, ge=0, lt=1, description="chance that an optional input is zeros, as where a study lacks it")
    augmentation: Augmentation = Augmentation()
    preprocessing: PreprocessingSection
    inputs: tuple[InputSection, ...]


class Gliomas(_Section):
    """Brains with gliomas in FLAIR and T1c, made of a few patients' images. Orders: slice, row, column."""

    kind: Literal["mr-gliomas"]
    spacing_mm: tuple[float, float, float]
    patch: tuple[int, int, int]
    own: float = Field(ge=0, le=1, description="share of volumes with the patient's own tumour where it is; the others are healed first")
    transplants: tuple[float, float, float] = Field(description="of healed brains: shares that are given no tumour, one, two")
    without_t1c: float = Field(ge=0, le=1, description="share of volumes without T1c")
    bias: float = Field(0.06, ge=0, description="largest deviation of a series' uneven light, of its logarithm")
    shells: float = Field(0.0, ge=0, le=1, description="share of the patients' brains that get something around them, as with a skull")
    phantom_heads: int = Field(1, ge=1, description="so many synthetic heads with their skull")
    phantoms: float = Field(0.0, ge=0, le=1, description="share of volumes that show one of them")
    phantom_tumours: tuple[float, float, float] = Field(
        (0.5, 0.25, 0.25), description="of those: shares that have no tumour, a synthetic one, a patient's"
    )
    leave_out: tuple[str, ...] = Field((), description="cases that are not trained on")


# What each is stands in streams.py
DataSection = Annotated[NodulePatches | Radiographs | Opacities | Heads | DatasetPatches | Gliomas, Field(discriminator="kind")]


class NetworkSection(_Section):
    """A network of monai.networks.nets by name, with its arguments."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9]*$")
    arguments: dict[str, Any]


class TrainingSection(_Section):
    """Optimiser, length and bookkeeping."""

    seed: int
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    warm_up_steps: int = Field(ge=0)
    ema_decay: float = Field(ge=0, lt=1)
    bce_weight: float = Field(description="of the cross entropy: binary, or a softmax's where the package's outputs exclude one another")
    positive_weight: float = Field(1.0, gt=0, description="of what is there, to what isn't, in the binary cross entropy")
    worst_weight: float = Field(description="of the cross entropy of the worst share of voxels")
    worst_share: float = Field(gt=0, le=1)
    dice_weight: float
    dice_of: Literal["batch", "patch"] = Field(
        "batch", description="patch: a false mark in an empty patch isn't lost among the others' masses"
    )
    dice_smooth: float = Field(1.0, gt=0, description="voxels that are marked rightly and wrongly beforehand")
    focal_weight: float = 0.0
    focal_gamma: float = Field(2.0, ge=0)
    clip_norm: float = Field(gt=0)
    checkpoint_every: int = Field(ge=1)
    workers: int = Field(1, ge=0, description="processes that render patches; 0: in the training process")
    threads: int = Field(1, ge=1, description="CPU threads of the training process")
    start: str = Field(
        "", pattern=r"^([a-z0-9._-]+/[a-z0-9._-]+)?$",
        description="NAME/VERSION of a package that comes with the node, with whose weights training begins; empty: with random ones",
    )  # fmt: skip
    long_factor: int = Field(4, ge=1, description="how many times the steps a long training has")

    @model_validator(mode="after")
    def _something_to_minimise(self) -> Self:
        if not any((self.bce_weight, self.worst_weight, self.dice_weight, self.focal_weight)):
            raise ValueError("one of bce_weight, worst_weight, dice_weight and focal_weight must not be 0")
        return self


class ValidationSection(_Section):
    """What is measured while training goes on: the averaged weights, on patches that training never sees."""

    every: int = Field(250, ge=1, description="steps between two measurements; the last step is measured too")
    patches: int = Field(32, ge=1)
    patience: int = Field(0, ge=0, description="training stops when so many measurements in a row were no better; 0: it doesn't")


class Recipe(_Section):
    """A whole training. A `data` without a kind is of nodules."""

    data: DataSection
    network: NetworkSection
    training: TrainingSection
    validation: ValidationSection = ValidationSection()
    package: Manifest = Field(description="the manifest of the package that export writes")

    @model_validator(mode="before")
    @classmethod
    def _nodules_unless_said(cls, entries: Any) -> Any:
        data = entries.get("data") if isinstance(entries, dict) else None
        return {**entries, "data": {"kind": "chest-ct-nodules", **data}} if isinstance(data, dict) else entries

    @model_validator(mode="before")
    @classmethod
    def _dataset_as_the_package_prepares_it(cls, entries: Any) -> Any:
        data, package = (entries.get(key) for key in ("data", "package")) if isinstance(entries, dict) else (None, None)
        if not isinstance(data, dict) or data.get("kind") != "dataset" or not isinstance(package, dict):
            return entries
        if given := {"preprocessing", "inputs"} & set(data):
            raise ValueError(f"data.{min(given)} is the package's, and isn't given twice")
        inputs = package.get("inputs") or [package.get("input")]
        return {**entries, "data": {**data, "preprocessing": package.get("preprocessing"), "inputs": inputs}}

    @model_validator(mode="after")
    def _dataset_fits_the_package(self) -> Self:
        if isinstance(self.data, DatasetPatches):
            if len(self.data.channels) != len(self.package.inputs):
                raise ValueError(f"data.channels names {len(self.data.channels)}, and the package has {len(self.package.inputs)} input(s)")
            if len(self.data.labels) != len(self.package.outputs):
                raise ValueError(f"data.labels names {len(self.data.labels)}, and the package has {len(self.package.outputs)} output(s)")
            if self.package.inputs[0].dimensions == 2 and self.data.patch[0] != 1:
                raise ValueError("data.patch of a projection has one slice")
        return self


def load_recipe(file: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigError: absent, no TOML, or with mistakes; the message names every mistake at once.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{file} has {len(mistakes)} mistake(s): " + "; ".join(mistakes)) from error
