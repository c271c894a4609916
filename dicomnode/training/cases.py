"""What a package is measured on: volumes by input, and what is known of them. Folders of real cases, and data sets.

Real cases are for measuring alone: nothing here hands them to training.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import nrrd
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy import ndimage

from dicomnode.analysis.attributes import text_of
from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.manifest import Manifest, OutputSection
from dicomnode.analysis.select import select
from dicomnode.analysis.volume import read_volume
from dicomnode.errors import UsageError
from dicomnode.findings import Segment, Volume
from dicomnode.training.dataset import CaseRow, DataSet, Split, read_case

ANATOMY = "123037004"  # SCT, Anatomical Structure: an output of this category outlines what everyone has, and finds no lesions

Point = tuple[float, float, float]
Mask = NDArray[np.bool_]
Reader = Callable[[], "Case"]


@dataclass(frozen=True, kw_only=True)
class Known:
    """A lesion that is there. `truth` is its voxels, where they are known; else its centre is, in patient space."""

    label: str  # of the output that should find it
    centre_lps_mm: Point | None  # None on a projection
    diameter_mm: float  # of the sphere of its volume, on a projection of the circle of its area
    truth: Segment | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A study as the package is given it, and what is known of it.

    A label that `truth` lacks is unknown in this case; an empty mask says that nothing of it is there.
    """

    name: str
    volumes: Mapping[str, Volume]  # by the manifest's names of inputs, the first input first
    known: tuple[Known, ...] = ()
    truth: Mapping[str, Mask] = field(default_factory=dict)  # label of an output -> (k, r, c) on the first input's grid
    positive: Mapping[str, bool] = field(default_factory=dict)  # label -> whether the study shows it
    attributes: Mapping[str, str] = field(default_factory=dict)  # scanner, slice_thickness_mm, sex, age_band...
    patient: str = ""  # cases of one patient are drawn together; empty: a patient of its own
    complete: bool = True  # all lesions are known: another finding is false
    of_its_kind: bool = True  # False: nothing that the package may accept

    @property
    def volume(self) -> Volume:
        """The first input's volume: findings and truth lie on its grid."""
        return next(iter(self.volumes.values()))


def case_from_masks(name: str, volumes: Mapping[str, Volume], truth: Mapping[str, Mask], manifest: Manifest, **others: object) -> Case:
    """A case of which every label's voxels are known: its lesions are the connected components of what isn't anatomy."""
    volume = next(iter(volumes.values()))
    unsaid = {output.label for output in manifest.outputs if set(output.needs) - set(volumes)}  # nothing is said of it, right or wrong
    truth = {label: mask for label, mask in truth.items() if label not in unsaid}
    lesions = {output.label for output in manifest.outputs if finds_lesions(output)} & set(truth)
    known = tuple(lesion for label in sorted(lesions) for lesion in components_of(truth[label], volume, label))
    positive = {label: bool(truth[label].any()) for label in lesions}
    return Case(name=name, volumes=volumes, truth=truth, known=known, positive=positive, **others)  # type: ignore[arg-type]  # the caller's own fields


def finds_lesions(output: OutputSection) -> bool:
    """Whether an output marks what may be there or not, rather than a structure that everyone has."""
    return output.category.value != ANATOMY


def components_of(mask: Mask, volume: Volume, label: str) -> Iterator[Known]:
    """Each 26-connected part of a mask as a known lesion."""
    parts, _ = ndimage.label(mask, structure=np.ones((3, 3, 3), dtype=np.bool_))
    for number, box in enumerate(ndimage.find_objects(parts), start=1):
        origin = (box[0].start, box[1].start, box[2].start)
        yield known_lesion(Segment(mask=parts[box] == number, origin=origin), volume, label)


def known_lesion(segment: Segment, volume: Volume, label: str, diameter_mm: float | None = None) -> Known:
    """A lesion of known voxels; its diameter is that of the sphere (circle) of the same size unless it is known better."""
    x, y, z = volume.to_lps(np.argwhere(segment.mask).mean(axis=0) + np.array(segment.origin)).tolist()
    diameter = sphere_diameter_mm(segment, volume) if diameter_mm is None else diameter_mm
    return Known(label=label, centre_lps_mm=None if volume.is_projection else (x, y, z), diameter_mm=diameter, truth=segment)


def sphere_diameter_mm(segment: Segment, volume: Volume) -> float:
    """The diameter of the sphere of a segment's volume, on a projection of the circle of its area, mm."""
    _, row, column = volume.spacing_mm
    if volume.is_projection:
        return float(2 * np.sqrt(segment.voxel_count * row * column / np.pi))
    return float(2 * (segment.voxel_count * volume.voxel_ml * 1000 * 3 / 4 / np.pi) ** (1 / 3))


def real_cases(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Reader]]:
    """Each case in `folder`: its name, and a function that reads it and raises NotEligible if the package doesn't accept it.

    Studies in folders of DICOM files, and `X_image.nrrd` with the mask `X_label.nrrd` (LPS) for packages of one input. Known nodules of
    DICOM series come from `nodules*.csv` with the columns seriesuid, coordX, coordY, coordZ (LPS mm) and diameter_mm; they belong to
    the first output.
    """
    tables = [file.read_text(encoding="utf-8").splitlines() for file in sorted(folder.rglob("nodules*.csv"))]
    nodules = [row for table in tables for row in csv.DictReader(table)]
    places = sorted({path.parent for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in ("", ".dcm")})
    for place in places:
        headers = read_headers(sorted(path for path in place.iterdir() if path.is_file()))
        studies: dict[str, list[tuple[Path, Dataset]]] = {}
        for file, header in headers:
            studies.setdefault(text_of(header, "StudyInstanceUID"), []).append((file, header))
        for study in studies.values():
            name = place.name if len(studies) == 1 else study[0][0].stem
            yield name, partial(_dicom_case, name, study, manifest, nodules)
    if sum(not accepts.optional for accepts in manifest.inputs) == 1:
        for image in sorted(folder.rglob("*_image.nrrd")):
            yield image.name.removesuffix("_image.nrrd"), partial(_nrrd_case, image, manifest)


def dataset_cases(dataset: DataSet, split: Split, manifest: Manifest) -> Iterator[tuple[str, Reader]]:
    """Each case of one split of a data set. Labels that the package doesn't know, and channels that it doesn't take, are left out.

    Raises:
        UsageError: the package looks for none of its labels, or needs an image that the data set doesn't have.
    """
    labels = {output.label for output in manifest.outputs}
    if not labels & set(dataset.labels):
        raise UsageError(
            f"the data set {dataset.name} knows {', '.join(dataset.labels)}, and the package {manifest.name} looks for none of it"
        )
    lacking = [accepts.name for accepts in manifest.inputs if not accepts.optional and accepts.name not in dataset.channels]
    if lacking:
        raise UsageError(f"the package {manifest.name} needs {', '.join(lacking)}, and the data set has {', '.join(dataset.channels)}")
    if not dataset.of_split(split):
        raise UsageError(f"the data set {dataset.name} has no case in its split {split}")
    for row in dataset.of_split(split):
        yield row.case, partial(_dataset_case, dataset, row, manifest)


def _dataset_case(dataset: DataSet, row: CaseRow, manifest: Manifest) -> Case:
    read = read_case(dataset, row)
    labels = {output.label for output in manifest.outputs}
    truth = {
        label: read.truth[number]
        for number, label in enumerate(dataset.labels)
        if label in labels and read.labels[label] != "unlabelled"
    }  # fmt: skip
    volumes = {accepts.name: read.volumes[accepts.name] for accepts in manifest.inputs if accepts.name in read.volumes}
    absent = [accepts.name for accepts in manifest.inputs if not accepts.optional and accepts.name not in volumes]
    if absent:
        raise NotEligible("input-missing", f"The case has no {absent[0]}.")
    attributes = {name: str(value) for name, value in read.attributes.items() if value is not None}
    return case_from_masks(row.case, volumes, truth, manifest, attributes=attributes, patient=row.patient)


def _dicom_case(name: str, headers: Sequence[tuple[Path, Dataset]], manifest: Manifest, nodules: Sequence[Mapping[str, str]]) -> Case:
    volumes = {series.input_name: read_volume(series) for series in select(manifest, headers).series}
    uids = {volume.series_instance_uid for volume in volumes.values()}
    known = tuple(
        Known(
            label=manifest.outputs[0].label, diameter_mm=float(row["diameter_mm"]),
            centre_lps_mm=(float(row["coordX"]), float(row["coordY"]), float(row["coordZ"])),
        )
        for row in nodules
        if row["seriesuid"] in uids
    )  # fmt: skip
    header = headers[0][1]
    attributes = {"scanner": text_of(header, "Manufacturer"), "sex": text_of(header, "PatientSex")}
    attributes = {key: value for key, value in attributes.items() if value}
    return Case(name=name, volumes=volumes, known=known, attributes=attributes, complete=False)


def _nrrd_case(image: Path, manifest: Manifest) -> Case:
    voxels, header = nrrd.read(str(image))
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(header["space directions"])[::-1].T
    affine[:3, 3] = header["space origin"]
    name = image.name.removesuffix("_image.nrrd")
    accepts, output = manifest.inputs[0], manifest.outputs[0]
    if accepts.mr_contrasts:
        wanted = " or ".join(accepts.mr_contrasts)
        raise NotEligible("unknown-contrast", f"NRRD doesn't say what an MR image is weighted by; the package reads {wanted}.")
    volume = Volume(
        voxels=np.ascontiguousarray(voxels.transpose(2, 1, 0), dtype=np.float32), affine=affine,
        sop_instance_uids=tuple(f"{name}.{k}" for k in range(voxels.shape[2])), series_instance_uid=name, study_instance_uid=name,
        frame_of_reference_uid=name, modality=accepts.modalities[0],
    )  # fmt: skip
    label = image.with_name(f"{name}_label.nrrd")
    if not label.exists():
        return Case(name=name, volumes={accepts.name: volume}, complete=False)
    truth = {output.label: nrrd.read(str(label))[0].transpose(2, 1, 0) > 0}
    return case_from_masks(name, {accepts.name: volume}, truth, manifest, complete=False)
