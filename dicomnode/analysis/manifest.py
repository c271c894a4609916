"""`manifest.toml`, schema 1: which series a model accepts, how it is run, and what its outputs mean.

What a MONAI Bundle's metadata lacks, as data that is checked whole: every mistake is named at once. Must never import torch or
MONAI, nor look at anything but the text it is given.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dicomnode.errors import PackageError
from dicomnode.findings import Code, Laterality

MANIFEST = "manifest.toml"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
_Text = Annotated[str, Field(min_length=1, max_length=1024)]
_Short = Annotated[str, Field(min_length=1, max_length=64)]
_Uid = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)+$", max_length=64)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Edge = Annotated[int, Field(ge=1, le=4096)]

Orientation = Literal["axial", "coronal", "sagittal", "oblique"]
MrContrast = Literal["t1", "t1c", "t2", "flair", "pd", "diffusion", "adc", "susceptibility", "angiography", "perfusion"]


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
    """One series, or one projection, that the model is given. Checked against headers, geometry and pixels, never against names."""

    name: Name = "image"
    optional: bool = Field(False, description="the model runs without it too, and the result says so; never the first input")
    modalities: Annotated[tuple[_Short, ...], Field(min_length=1)] = Field(description="values of Modality; `modality` names one")
    sop_classes: Annotated[tuple[_Uid, ...], Field(min_length=1)]
    dimensions: Literal[2, 3] = Field(3, description="3: a series of parallel slices; 2: one projection")

    body_parts: tuple[_Short, ...] = Field((), description="values of Body Part Examined; empty: any")
    body_part_may_be_absent: bool = True
    region: Literal["", "lung", "chest-radiograph", "lung-fields", "head"] = Field(
        "", description="anatomy that must be in the pixels; it limits where findings may lie"
    )
    orientations: tuple[Orientation, ...] = Field((), description="of the slices; empty: any")
    view_positions: tuple[_Short, ...] = Field((), description="values of View Position, as PA or AP; empty: any")
    view_position_may_be_absent: bool = True
    laterality: tuple[Literal["L", "R", "B", "U"], ...] = Field((), description="values of (Image) Laterality; empty: any")
    laterality_may_be_absent: bool = True
    mr_contrasts: tuple[MrContrast, ...] = Field(
        (), description="MR weightings; a series whose weighting is unknown is refused; empty: any"
    )
    contrast: Literal["any", "with", "without"] = Field("any", description="contrast agent")
    age_years: tuple[_NotNegative, _NotNegative] | None = Field(None, description="youngest and oldest patient, inclusive")
    age_may_be_absent: bool = True

    minimum_slices: int = Field(8, ge=2)
    maximum_slices: int = Field(2000, ge=2)
    slice_spacing_mm: tuple[_Positive, _Positive] = Field((0.1, 20.0), description="smallest and largest distance of neighbouring slices")
    pixel_spacing_mm: tuple[_Positive, _Positive] = Field((0.05, 5.0), description="smallest and largest distance of rows and of columns")
    pixel_spacing_may_be_absent: bool = Field(False, description="of a projection: it is analysed and measured in pixels")

    exclude_image_types: tuple[_Short, ...] = Field(
        ("LOCALIZER", "DERIVED\\SECONDARY", "SCREEN SAVE", "DOSE_INFO"),  # SECONDARY alone also marks later reconstructions of raw data
        description="an image whose Image Type has all values of an entry is left out",
    )
    quality_control_images: bool = Field(False, description="also phantoms: Quality Control Image is YES")
    animals: bool = Field(False, description="also images of animals")
    for_processing: bool = Field(False, description="also projections whose Presentation Intent Type is FOR PROCESSING")
    burned_in_annotation: bool = Field(False, description="also images whose Burned In Annotation is YES")
    preferred_kernels: tuple[_Short, ...] = Field(
        (), description="of several series that fit, those with these Convolution Kernels, in order"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_modality(cls, entries: Any) -> Any:
        if isinstance(entries, dict) and "modality" in entries and "modalities" not in entries:
            entries = {**entries, "modalities": [entries["modality"]]}
            del entries["modality"]
        return entries

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.minimum_slices > self.maximum_slices:
            raise ValueError("minimum_slices is larger than maximum_slices")
        for key in ("slice_spacing_mm", "pixel_spacing_mm", "age_years"):
            bounds = getattr(self, key)
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"{key} has its larger value first")
        return self


class PreprocessingSection(_Section):
    """The grid and the intensities that the network was trained on."""

    spacing_mm: tuple[_Positive, _Positive, _Positive] | None = Field(
        None, description="slice, row, column; of a projection the first is ignored"
    )
    size_px: Annotated[int, Field(ge=16, le=4096)] | None = Field(
        None, description="instead, of a projection: pixels along its longer side"
    )
    intensity: Literal["window", "z-score", "percentiles", "organ-z-score", "local-contrast"] = Field(
        "window",
        description="window: clipped, scaled to 0..1; z-score: of the voxels above zero; percentiles: 1st and 99th to 0..1; "
        "organ-z-score: by the quartiles within the region's organ, 0 outside of it; local-contrast: percentiles, then by mean and "
        "standard deviation of what lies around each pixel in its slice",
    )
    window: tuple[_Number, _Number] | None = Field(None, description="of intensity window: lower and upper value")
    even: bool = Field(False, description="of organ-z-score: first the organ's light is made even, unless only the organ is shown")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.even and self.intensity != "organ-z-score":
            raise ValueError("even belongs to the intensity organ-z-score, and to no other")
        if (self.spacing_mm is None) == (self.size_px is None):
            raise ValueError("exactly one of spacing_mm and size_px is needed")
        if (self.intensity == "window") != (self.window is not None):
            raise ValueError("window belongs to the intensity window, and to no other")
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError("window needs its smaller value first")
        return self


class InferenceSection(_Section):
    """How the network slides over the volume."""

    window: tuple[_Edge, _Edge, _Edge] = Field(description="voxels along slice, row, column; of a projection the first is 1")
    overlap: float = Field(0.25, ge=0, lt=1)
    batch: int = Field(1, ge=1, le=64)
    scales: tuple[Annotated[int, Field(ge=1, le=8)], ...] = Field(
        (1,), min_length=1, description="a pass for each, on voxels so many times as long; the largest probability counts"
    )
    mirror: bool = Field(False, description="the answer is the mean of the image's and of its left-right mirror's")
    half_resolution: bool = Field(
        False, description="when memory is short, half the resolution is better than no result; the result says so"
    )


class BundleSection(_Section):
    """A MONAI Bundle that brings its own preprocessing, inferer and postprocessing: where they stand in its configuration."""

    config: Annotated[str, Field(pattern=r"^configs/[A-Za-z0-9._-]+\.(json|yaml|yml)$")] = "configs/inference.json"
    network: _Short = "network_def"
    preprocessing: _Short = "preprocessing"
    inferer: _Short = "inferer"
    postprocessing: _Short | None = "postprocessing"
    image_key: _Short = "image"
    prediction_key: _Short = "pred"


class ImageScoreSection(_Section):
    """A probability for a whole projection, from the share of its region that an output's map marks.

    It is 1 / (1 + exp(-(intercept + slope ln(share + floor)))): a monotone calibration, fitted on validation images.
    """

    above: float = Field(gt=0, lt=1, description="pixels of the region whose probability is above it are its share")
    floor: float = Field(1e-4, gt=0, le=0.1, description="so that a share of zero has a logarithm")
    intercept: _Number
    slope: _Positive
    threshold: float = Field(gt=0, lt=1, description="the image is positive above it; below, nothing of the output is a finding")


class BrightSection(_Section):
    """Voxels of another output that are bright on one of the inputs: an enhancing part, by intensity and not by a channel of its own."""

    within: _Short = Field(description="the label of the other output")
    input: Name
    above: _Number = Field(description="of the input's intensity as the network is given it; a voxel that lies on it has probability 0.5")
    share: float | None = Field(
        None, gt=0, lt=1, description="a voxel must lie this share of the way from the other output's median to its 98th percentile too"
    )
    least_score: float = Field(0.0, ge=0, le=1, description="components of the other output with a lower score have no bright part")


class OutputSection(_Section):
    """One output channel, label or class: what it means, and when it is a finding."""

    channel: int = Field(ge=0, description="the channel; the value in a label map; the class of a box or of a classification")
    label: _Short
    activation: Literal["sigmoid", "softmax", "none"] = "sigmoid"
    threshold: float = Field(0.5, gt=0, lt=1, description="a voxel, or a class, above it counts")
    components: Literal["each", "one"] = Field("each", description="each connected component is a finding, or all voxels together are one")
    shape: Literal["outline", "box"] = Field("outline", description="box: a finding is the box around its component, which has no outline")
    image_score: ImageScoreSection | None = Field(None, description="of a segmentation of projections: one number for the whole image")
    finding: bool = Field(True, description="false: a class that is no finding, such as normal")
    bright: BrightSection | None = Field(None, description="in place of the network's channel, which is trained and not asked")
    needs: tuple[Name, ...] = Field((), description="optional inputs without which nothing is said of it, and the result says so")
    minimum_ml: float = Field(0.0, ge=0, allow_inf_nan=False, description="smaller components are dropped")
    minimum_mm2: float = Field(0.0, ge=0, allow_inf_nan=False, description="the same on a projection with a known spacing")
    minimum_score: float = Field(0.0, ge=0, le=1, description="components or boxes below it are dropped")
    score: Literal["mean-of-top-quarter"] = "mean-of-top-quarter"
    maximum_findings: int = Field(50, ge=1, le=1000, description="the most probable ones; the others are counted as omitted")
    category: CodeEntry
    type: CodeEntry
    site: CodeEntry | None = None
    side: Laterality | None = Field(None, description="of a paired structure that is an output of its own")
    colour_cielab: tuple[
        Annotated[float, Field(ge=0, le=100)], Annotated[float, Field(ge=-128, le=127)], Annotated[float, Field(ge=-128, le=127)]
    ] = Field((70.0, 60.0, 60.0), description="L*, a*, b*: Recommended Display CIELab Value before its DICOM encoding")


class Manifest(_Section):
    """`manifest.toml`, schema 1. `[input]` stands for a single `[[inputs]]`; the findings lie on the grid of the first."""

    schema_version: Literal[1] = Field(alias="schema")
    name: Name
    version: Name
    title: _Short
    manufacturer: _Short
    algorithm_name: _Short
    licence: _Text
    intended_use: _Text
    training_data: _Text
    data_terms: Annotated[str, Field(max_length=1024)] = Field("", description="terms of the images it was trained on, beside the licence")
    limits: tuple[_Text, ...] = Field((), description="what it can't do or was never shown, a sentence each; the model card says it")
    looked_at: tuple[_Text, ...] = Field((), description="real cases that people looked at while they made it, never trained on")
    kind: Literal["segmentation", "detection", "classification"]
    maximum_findings: int = Field(50, ge=1, le=1000, description="of all outputs together; the others are counted as omitted")
    decide: tuple[_Text, ...] = Field((), description="what a person must still decide: written by a draft, and removed line by line")
    inputs: tuple[InputSection, ...]
    preprocessing: PreprocessingSection | None = None
    inference: InferenceSection | None = None
    bundle: BundleSection | None = None
    outputs: Annotated[tuple[OutputSection, ...], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _one_input(cls, entries: Any) -> Any:
        if isinstance(entries, dict) and "input" in entries and "inputs" not in entries:
            entries = {**entries, "inputs": [entries["input"]]}
            del entries["input"]
        return entries

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.bundle is None and (self.preprocessing is None or self.inference is None):
            raise ValueError("preprocessing and inference are needed, or bundle where a MONAI Bundle brings its own")
        if self.bundle is not None and (self.preprocessing is not None or self.inference is not None):
            raise ValueError("a bundle brings its own: preprocessing and inference don't go with bundle")
        if not self.inputs:
            raise ValueError("input or inputs is needed")
        if self.inputs[0].optional:
            raise ValueError("the first input gives the findings their grid: it can't be optional")
        names = [accepts.name for accepts in self.inputs]
        if len(set(names)) < len(names):
            raise ValueError(f"two inputs have one name: {', '.join(names)}")
        if len({accepts.dimensions for accepts in self.inputs}) > 1:
            raise ValueError("series and projections don't go together")
        for output in self.outputs:
            if output.image_score is not None:
                if self.kind != "segmentation" or self.bundle is not None or self.inputs[0].dimensions != 2:
                    raise ValueError("image_score goes with a segmentation of projections that brings no bundle of its own")
                if output.image_score.above < output.threshold:
                    raise ValueError("image_score.above is below the output's threshold: a positive image could be without a finding")
        return self

    @model_validator(mode="after")
    def _names_what_is_there(self) -> Self:
        names = {accepts.name for accepts in self.inputs}
        by_network = {output.label for output in self.outputs if output.bright is None}
        for output in self.outputs:
            if output.bright is not None and (output.bright.input not in names or output.bright.within not in by_network):
                raise ValueError(f"bright of {output.label} names an input or an output that isn't there")
        if self.inference is not None and self.inference.mirror and any(output.side for output in self.outputs):
            raise ValueError("mirror doesn't go with an output of one side")
        if any(output.needs or output.bright for output in self.outputs) and (self.bundle is not None or self.kind != "segmentation"):
            raise ValueError("needs and bright are for segmentations without a bundle of their own")
        if wrong := sorted({name for output in self.outputs for name in output.needs} - names):
            raise ValueError(f"an output needs {wrong[0]}, which is no input")
        if self.preprocessing is not None and self.preprocessing.intensity == "organ-z-score" and self.inputs[0].region != "head":
            raise ValueError("the intensity organ-z-score needs the region head of the first input")
        return self


def parse_manifest(content: bytes, folder: Path) -> Manifest:
    """Read the bytes of a `manifest.toml`; `folder` gives the name if the manifest has none (…/NAME or …/NAME/VERSION).

    Raises:
        PackageError: it is no TOML or has mistakes; every mistake is named at once.
    """
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
