"""Other programs find in SEG and SR what is true of the patient, however he was scanned; a planted mistake never leaves the node.

The way there is the product's own: files, series, volume, label map, findings, SEG and SR. Way and truth are those of `phantom_scans`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import nrrd
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from phantom_scans import BODIES, COUNT, EVERY, SPACING, Body, Way, scan
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.labels import Answer, find_in
from dicomnode.analysis.manifest import parse_manifest
from dicomnode.analysis.select import select
from dicomnode.analysis.volume import read_volume
from dicomnode.errors import ProofFailed
from dicomnode.findings import Findings, ResultObject, Volume
from dicomnode.results.decoding import concept_of, items_below
from dicomnode.results.proof import prove
from dicomnode.results.report import encode_report
from dicomnode.results.segmentation import encode_segmentation
from results_cases import identity, written_again
from validators import run

MANIFEST = """
schema = 1
name = "two-bodies"
version = "1.0"
title = "Two bodies"
manufacturer = "dicomnode"
algorithm_name = "Two bodies"
licence = "Apache-2.0"
intended_use = "RESEARCH USE ONLY"
training_data = "none"
kind = "segmentation"
[input]
modality = "CT"
sop_classes = ["1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"]
body_parts = ["CHEST"]
minimum_slices = 4
slice_spacing_mm = [0.4, 5.5]
pixel_spacing_mm = [0.3, 1.5]
[preprocessing]
spacing_mm = [2.0, 1.5, 1.5]
window = [-1000.0, 400.0]
[inference]
window = [16, 32, 32]
overlap = 0.25
batch = 2
""" + "".join(
    f"""
[[outputs]]
channel = {number}
label = "Body of the {body.side}"
side = "{body.side}"
minimum_ml = 0.03
category = {{ value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }}
type = {{ value = "27925004", scheme = "SCT", meaning = "Nodule" }}
site = {{ value = "39607008", scheme = "SCT", meaning = "Lung" }}
"""
    for number, body in enumerate(BODIES, start=1)
)
PACKAGE = parse_manifest(MANIFEST.encode(), Path("two-bodies"))
KINDS = ("seg", "seg-labelmap")
VOXEL_ML = float(np.prod(SPACING)) / 1000


def some(ways: Sequence[Way]) -> list[object]:
    """Every flip, in two planes each, so that each order and kind comes with each plane; the others in the long run only."""
    planes = list(dict.fromkeys(way.plane for way in ways))
    flips = list(dict.fromkeys(way.flip for way in ways))
    marked: list[object] = []
    for way in ways:
        plane, flip = planes.index(way.plane), flips.index(way.flip)
        always = (plane + flip) % 2 == 0 and (plane + flip // 2) % 4 == 2 * way.descending + way.enhanced
        marked.append(pytest.param(way, id=str(way), marks=() if always else pytest.mark.long))
    return marked


WAYS = some(EVERY)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What the node says of a scan: segmentation and report of each kind."""

    volume: Volume
    findings: Findings
    objects: dict[str, tuple[ResultObject, ResultObject]]

    def prove(self, kind: str) -> None:
        prove(*self.objects[kind], self.findings, self.volume)


@cache
def analysed(way: Way) -> Made:
    with TemporaryDirectory() as folder:
        (series,) = select(PACKAGE, read_headers(scan(way, Path(folder)))).series
        volume = read_volume(series)
    labels = np.zeros(volume.voxels.shape, dtype=np.uint8)
    for number, body in enumerate(BODIES, start=1):
        labels[volume.voxels == body.value] = number
    found, omitted = find_in(Answer(labels=labels, scores=lambda _, index: np.full(len(index), 0.9, dtype=np.float32)), PACKAGE, volume)
    findings = Findings(
        package=PACKAGE.name,
        version=PACKAGE.version,
        digest="0" * 64,
        algorithm_name=PACKAGE.algorithm_name,
        manufacturer=PACKAGE.manufacturer,
        series_instance_uid=volume.series_instance_uid,
        findings=found,
        device="cpu fp32",
        omitted=omitted,
    )
    run_of = identity(volume.study_instance_uid, package=PACKAGE.name, version=PACKAGE.version, digest="0" * 64)
    objects = {}
    for kind in KINDS:
        seg = encode_segmentation(findings, volume, series.headers, run_of, kind=kind)
        assert seg is not None
        objects[kind] = (seg, encode_report(findings, volume, series.headers, run_of, seg))
    return Made(volume=volume, findings=findings, objects=objects)


def true_voxels(way: Way, body: Body) -> NDArray[np.bool_]:
    return np.asarray(body.depth(way.positions) <= 1)


@pytest.mark.parametrize("way", WAYS)
def test_programs_of_others_find_each_body_where_it_is_and_as_large(way: Way, tmp_path: Path) -> None:
    made = analysed(way)
    for kind in KINDS:
        made.prove(kind)
        seg, report = (tmp_path / f"{kind}.{one.modality}.dcm" for one in made.objects[kind])
        seg.write_bytes(made.objects[kind][0].data)
        report.write_bytes(made.objects[kind][1].data)
        groups = measurements(report, tmp_path)
        volumes = voxels(seg, tmp_path / kind)
        for number, body in enumerate(BODIES, start=1):
            truth = way.positions[true_voxels(way, body)]
            there = volumes[number]
            assert len(there) == len(truth)
            assert body.depth(there).max() <= 1 + 1e-4  # as many voxels, all of them inside: the same ones
            assert np.abs((there.mean(axis=0) - body.centre) @ np.linalg.inv(way.steps)).max() <= 0.5  # voxels along each axis
            assert len(there) * VOXEL_ML == pytest.approx(body.volume_ml, rel=0.01)
            (group,) = (g for g in groups if g.get("ReferencedSegment") == number)
            values = {m["quantity"]["CodeValue"]: (float(m["value"]), m["units"]["CodeValue"]) for m in group["measurementItems"]}
            assert values["118565006"] == (pytest.approx(body.volume_ml, rel=0.01), "ml")
            assert values["118565006"][0] == pytest.approx(len(truth) * VOXEL_ML, rel=1e-5)
            assert group["Laterality"]["CodeMeaning"].lower() == body.side == ("left" if there.mean(axis=0)[0] > 12.5 else "right")
            assert group["segmentationSOPInstanceUID"] == made.objects[kind][0].sop_instance_uid
            ends = line(report, group["TrackingUniqueIdentifier"], way)
            assert np.abs(body.depth(ends) - 1).max() < 0.15  # on the surface
            assert values["103339001"] == (pytest.approx(float(np.linalg.norm(ends[1] - ends[0])), rel=1e-4), "mm")


def measurements(report: Path, folder: Path) -> list[dict[str, object]]:
    """The measurement groups of a report as dcmqi reads them."""
    run("tid1500reader", "--inputDICOM", report, "--outputMetadata", folder / "report.json")
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))["Measurements"]


def voxels(seg: Path, folder: Path) -> dict[int, NDArray[np.float64]]:
    """Where the voxels of each segment lie (LPS mm), as dcmqi reads it."""
    folder.mkdir()
    run("segimage2itkimage", "--inputDICOM", seg, "--outputDirectory", folder, "--outputType", "nrrd", "--prefix", "s")
    found = {}
    for file in folder.glob("*.nrrd"):
        values, header = nrrd.read(str(file))
        assert header["space"] == "left-posterior-superior"
        for number in np.unique(values[values > 0]):
            found[int(number)] = np.argwhere(values == number) @ np.array(header["space directions"]) + np.array(header["space origin"])
    return found


def line(report: Path, tracking_uid: str, way: Way) -> NDArray[np.float64]:
    """Where the ends of a finding's long axis lie in the patient (LPS mm), by the place of the scan's own pixels."""
    document = pydicom.dcmread(report)
    for group in (item for item in items_below(document) if concept_of(item) == "125007"):
        below = list(items_below(group))
        drawn = [item for item in below if item.ValueType == "SCOORD"]
        if drawn and any(concept_of(item) == "112040" and tracking_uid == item.UID for item in below):
            (image,) = (item.ReferencedSOPSequence[0] for item in items_below(drawn[0]))
            k = (int(image.ReferencedFrameNumber) if way.enhanced else int(image.ReferencedSOPInstanceUID.rsplit(".")[-1])) - 1
            pixels = np.reshape(drawn[0].GraphicData, (2, 2)) - 0.5  # column, row; the corner of the first pixel is (0, 0)
            return np.asarray(way.positions[k, 0, 0] + pixels[:, 1:] * way.steps[1] + pixels[:, :1] * way.steps[2])
    raise AssertionError(f"no line under {tracking_uid}")


# What is planted: a change of an object's bytes, and what the proof says of it. `step` is the way in mm from a slice to the next.


def repainted(seg: Dataset, paint: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
    """Change the (frames, rows, columns) pixels, of a label map into others without compression."""
    shape = (int(seg.NumberOfFrames), int(seg.Rows), int(seg.Columns))
    if seg.SegmentationType == "LABELMAP":
        seg.PixelData = paint(seg.pixel_array.reshape(shape)).tobytes()
        seg.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        seg["PixelData"].VR, seg["PixelData"].is_undefined_length = "OB", False
        return
    bits = np.unpackbits(np.frombuffer(seg.PixelData, dtype=np.uint8), bitorder="little", count=int(np.prod(shape)))
    packed = np.packbits(paint(bits.reshape(shape)).ravel(), bitorder="little").tobytes()
    seg.PixelData = packed + b"\0" * (len(packed) % 2)


def shared(seg: Dataset, keyword: str) -> Dataset:
    item: Dataset = seg.SharedFunctionalGroupsSequence[0][keyword].value[0]
    return item


def positions(seg: Dataset) -> list[Dataset]:
    return [frame.PlanePositionSequence[0] for frame in seg.PerFrameFunctionalGroupsSequence]


def sources(seg: Dataset) -> list[Dataset]:
    return [frame.DerivationImageSequence[0].SourceImageSequence[0] for frame in seg.PerFrameFunctionalGroupsSequence]


def mirror_orientation(seg: Dataset, _: Way) -> None:
    plane = shared(seg, "PlaneOrientationSequence")
    plane.ImageOrientationPatient = [-float(v) for v in plane.ImageOrientationPatient[:3]] + list(plane.ImageOrientationPatient[3:])


def mirror_patient(seg: Dataset, _: Way) -> None:
    """Left and right change places, everything else stays consistent with itself."""
    plane = shared(seg, "PlaneOrientationSequence")
    plane.ImageOrientationPatient = [-float(v) if i in (0, 3) else v for i, v in enumerate(plane.ImageOrientationPatient)]
    for position in positions(seg):
        x, y, z = position.ImagePositionPatient
        position.ImagePositionPatient = [-float(x), y, z]


def swap_x_and_y(seg: Dataset, _: Way) -> None:
    for position in positions(seg):
        x, y, z = position.ImagePositionPatient
        position.ImagePositionPatient = [y, x, z]


def move_by_a_slice(seg: Dataset, way: Way) -> None:
    for position in positions(seg):
        position.ImagePositionPatient = [round(float(v) + d, 8) for v, d in zip(position.ImagePositionPatient, way.steps[0], strict=True)]


def name_next_slice(seg: Dataset, way: Way) -> None:
    for source in sources(seg):
        if way.enhanced:
            source.ReferencedFrameNumber = int(source.ReferencedFrameNumber) + 1
        else:
            stem, number = str(source.ReferencedSOPInstanceUID).rsplit(".", 1)
            source.ReferencedSOPInstanceUID = f"{stem}.{int(number) + 1}"


def move_wholly_by_a_slice(seg: Dataset, way: Way) -> None:
    """Place and source agree with each other: the whole segmentation lies one slice further."""
    move_by_a_slice(seg, way)
    name_next_slice(seg, way)


def in_centimetres(seg: Dataset, _: Way) -> None:
    measures = shared(seg, "PixelMeasuresSequence")
    measures.PixelSpacing = [float(v) / 10 for v in measures.PixelSpacing]
    measures.SpacingBetweenSlices = float(measures.SpacingBetweenSlices) / 10


def swap_sides_of_segments(seg: Dataset, _: Way) -> None:
    regions = [item.AnatomicRegionSequence[0] for item in seg.SegmentSequence if "AnatomicRegionSequence" in item]
    assert len(regions) == len(BODIES)
    first, second = (region.AnatomicRegionModifierSequence for region in regions)
    regions[0].AnatomicRegionModifierSequence, regions[1].AnatomicRegionModifierSequence = second, first


SEG_MISTAKES: dict[str, tuple[Callable[[Dataset, Way], None], str]] = {
    "columns from right to left": (lambda seg, _: repainted(seg, lambda p: p[:, :, ::-1]), "centre|begins|ends"),
    "rows from below": (lambda seg, _: repainted(seg, lambda p: p[:, ::-1]), "centre|begins|ends"),
    "a column further": (lambda seg, _: repainted(seg, lambda p: np.roll(p, 1, axis=2)), "centre|begins|ends"),
    "orientation mirrored": (mirror_orientation, "voxels away"),
    "patient mirrored": (mirror_patient, "voxels away"),
    "x for y": (swap_x_and_y, "voxels away"),
    "position of the next slice": (move_by_a_slice, "1.00 voxels away"),
    "next slice as the source": (name_next_slice, "1.00 voxels away"),
    "wholly on the next slice": (move_wholly_by_a_slice, "centre|begins|ends"),
    "centimetres for millimetres": (in_centimetres, "voxels away|pixel measures"),
    "left for right": (swap_sides_of_segments, "side"),
}


def number_of(report: Dataset, code: str) -> Dataset:
    item: Dataset = next(i for i in items_below(report) if i.ValueType == "NUM" and concept_of(i) == code)
    return item.MeasuredValueSequence[0]


def unit(code: str, value: str) -> Callable[[Dataset, Way], None]:
    return lambda report, _: setattr(number_of(report, code).MeasurementUnitsCodeSequence[0], "CodeValue", value)


def times(code: str, factor: float) -> Callable[[Dataset, Way], None]:
    def change(report: Dataset, _: Way) -> None:
        number = number_of(report, code)
        number.NumericValue = f"{float(number.NumericValue) * factor:.6g}"

    return change


def drawn(report: Dataset) -> Dataset:
    item: Dataset = next(i for i in items_below(report) if i.ValueType == "SCOORD")
    return item


def line_on_next_slice(report: Dataset, way: Way) -> None:
    reference = drawn(report).ContentSequence[0].ReferencedSOPSequence[0]
    if way.enhanced:
        reference.ReferencedFrameNumber = int(reference.ReferencedFrameNumber) + 1
    else:
        stem, number = str(reference.ReferencedSOPInstanceUID).rsplit(".", 1)
        reference.ReferencedSOPInstanceUID = f"{stem}.{int(number) + 1}"


def line_mirrored(report: Dataset, _: Way) -> None:
    item = drawn(report)
    item.GraphicData = [COUNT[2] - v if i % 2 == 0 else v for i, v in enumerate(item.GraphicData)]


def other_side(report: Dataset, _: Way) -> None:
    item = next(i for i in items_below(report) if concept_of(i) == "272741003")
    code = item.ConceptCodeSequence[0]
    code.CodeValue = "24028007" if code.CodeValue == "7771000" else "7771000"


VOLUME, AXIS = "118565006", "103339001"
SR_MISTAKES: dict[str, tuple[Callable[[Dataset, Way], None], str]] = {
    "volume in cubic millimetres": (unit(VOLUME, "mm3"), "ml for finding 1"),
    "axis in centimetres": (unit(AXIS, "cm"), "mm for finding 1"),
    "a thousand times the volume": (times(VOLUME, 1000), "ml for finding 1"),
    "a hundredth more volume": (times(VOLUME, 1.01), "ml for finding 1"),
    "line on the next slice": (line_on_next_slice, "elsewhere"),
    "line mirrored": (line_mirrored, "elsewhere"),
    "left for right": (other_side, "which is"),
}


def from_the_last_one(volume: Volume) -> Volume:
    numbers = None if volume.frame_numbers is None else volume.frame_numbers[::-1]
    return replace(volume, sop_instance_uids=volume.sop_instance_uids[::-1], frame_numbers=numbers)


def a_slice_further(volume: Volume) -> Volume:
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, 0]
    return replace(volume, affine=affine)


VOLUME_MISTAKES: dict[str, tuple[Callable[[Volume], Volume], str]] = {
    "mirrored": (lambda volume: replace(volume, affine=np.diag([-1.0, 1, 1, 1]) @ volume.affine), "voxels away"),
    "a slice further": (a_slice_further, "1.00 voxels away"),
    "slices from the last one": (from_the_last_one, "voxels away"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_planted_mistake_does_not_leave(way: Way) -> None:
    made = analysed(way)
    for kind in KINDS:
        made.prove(kind)
        seg, report = made.objects[kind]
        for change, reason in SEG_MISTAKES.values():
            with pytest.raises(ProofFailed, match=reason):
                prove(changed(seg, change, way), report, made.findings, made.volume)
        for mistaken, reason in VOLUME_MISTAKES.values():
            with pytest.raises(ProofFailed, match=reason):
                prove(seg, report, made.findings, mistaken(made.volume))
    for change, reason in SR_MISTAKES.values():  # the reports differ in the segmentation that they name alone
        with pytest.raises(ProofFailed, match=reason):
            prove(seg, changed(report, change, way), made.findings, made.volume)


def changed(result: ResultObject, change: Callable[[Dataset, Way], None], way: Way) -> ResultObject:
    dataset = pydicom.dcmread(BytesIO(result.data))
    change(dataset, way)
    return replace(result, parts=(written_again(dataset),))
