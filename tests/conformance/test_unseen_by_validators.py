"""What no validator looks at: tracking, units, the procedure that is reported, and which algorithm speaks.

A missing Tracking UID, a wrong unit, a missing procedure or algorithm pass dciodvfy, dsrdump, PixelMed and dcmqi. These tests read the
bytes with pydicom alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

import pydicom
import pytest
from every_result import FILMS, OF_SOME, REPORTS, SOURCES, VOLUMES, nothing_found, report, segmentation, source_of
from pydicom import Dataset
from pydicom.uid import UID

from dicomnode.findings import ResultObject
from results_cases import DIGEST

ALGORITHM = "Lung nodule 3D U-Net"
VERSION = f"0.1.0 weights sha256:{DIGEST}"
VOLUME, AREA, LONG_AXIS, CERTAINTY = "118565006", "42798000", "103339001", "111012"
GROWTH = {"VOLUME-CHANGE": "%", "DOUBLING-TIME": "d"}
# UCUM is case sensitive: the code as it must stand, for each measurement and each place where a millimetre can be.
IN_MILLIMETRES = {VOLUME: "ml", AREA: "mm2", LONG_AXIS: "mm", CERTAINTY: "%"} | GROWTH
IN_PIXELS = IN_MILLIMETRES | {AREA: "{pixels}", LONG_AXIS: "{pixels}"}
PROCEDURES = {
    "CT": "25045-6", "MR": "25056-3", "PT": "44136-0", "CR": "43468-8", "DX": "43468-8", "MG": "363679005", "XA": "363679005",
}  # fmt: skip
OF_FINDINGS = ("report", "comprehensive report", "report in the place of another", "report that draws alone")
SEGMENTATIONS = [(name, kind) for name in SOURCES for kind in ("seg", "seg-labelmap") if name in VOLUMES or kind == "seg"]


def read(result: ResultObject) -> Dataset:
    return pydicom.dcmread(BytesIO(result.data))


def items(below: Dataset) -> Iterator[Dataset]:
    for item in below.get("ContentSequence", []):
        yield item
        yield from items(item)


def concept(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeValue) if "ConceptNameCodeSequence" in item else ""


def groups(document: Dataset) -> list[Dataset]:
    return [item for item in items(document) if concept(item) == "125007"]


def said(group: Dataset, code: str) -> list[Dataset]:
    return [item for item in items(group) if concept(item) == code]


def template(group: Dataset) -> str:
    return str(group.ContentTemplateSequence[0].TemplateIdentifier)


@pytest.mark.parametrize(("source", "kind"), SEGMENTATIONS, ids=[" | ".join(each) for each in SEGMENTATIONS])
def test_a_finding_has_one_tracking_uid_in_its_segment_and_in_both_of_its_groups(source: str, kind: str) -> None:
    segments = [item for item in read(segmentation(source, kind)).SegmentSequence if item.SegmentNumber != 0]
    tracked = {str(item.TrackingUID): str(item.TrackingID) for item in segments}
    assert len(tracked) == len(segments) == len(source_of(source).findings.findings)
    assert all(UID(uid).is_valid and name for uid, name in tracked.items())
    by_uid: dict[str, list[str]] = {}
    for group in groups(read(report(source, of=kind))):
        (uid,), (name,) = ([str(i.UID) for i in said(group, "112040")], [str(i.TextValue) for i in said(group, "112039")])
        assert tracked.get(uid, name) == name
        by_uid.setdefault(uid, []).append(template(group))
    of_findings = ["1411", "1410"] if source in VOLUMES else ["1410", "1410"]
    assert {uid: by_uid[uid] for uid in tracked} == dict.fromkeys(tracked, of_findings)
    assert {uid: by_uid[uid] for uid in by_uid if uid not in tracked} == {uid: ["1410"] for uid in by_uid if uid not in tracked}
    assert len(by_uid) == len(tracked) + len(source_of(source).findings.scores) + 1


@pytest.mark.parametrize("source", SOURCES)
def test_every_report_names_its_procedure_and_in_each_group_algorithm_and_units(source: str) -> None:
    """Every number has the UCUM code of its measurement; every group the algorithm, its version and its weights."""
    volume = source_of(source).case.volume
    units = IN_PIXELS if volume.calibration == "none" else IN_MILLIMETRES
    measured = {VOLUME if source in VOLUMES else AREA, LONG_AXIS, CERTAINTY}
    for kind, make in REPORTS.items():
        if source not in OF_SOME.get(kind, SOURCES):
            continue
        document = read(make(source))
        (procedure,) = (item for item in document.ContentSequence if concept(item) == "121058")
        assert procedure.ConceptCodeSequence[0].CodeValue == PROCEDURES[volume.modality]
        found, concepts = groups(document), set()
        assert found
        for group in found:
            assert [str(item.TextValue) for item in said(group, "111001")] == [ALGORITHM]
            assert [str(item.TextValue) for item in said(group, "111003")] == [VERSION]
            for item in (item for item in items(group) if item.ValueType == "NUM"):
                (value,) = item.MeasuredValueSequence
                (unit,) = value.MeasurementUnitsCodeSequence
                assert (unit.CodeValue, unit.CodingSchemeDesignator) == (units[concept(item)], "UCUM")
                concepts.add(concept(item))
        if kind == "report of growth":
            assert concepts == measured | GROWTH.keys()
        else:
            assert concepts == measured if kind in OF_FINDINGS else concepts <= {CERTAINTY}


@pytest.mark.parametrize(("source", "kind"), SEGMENTATIONS, ids=[" | ".join(each) for each in SEGMENTATIONS])
def test_every_segment_names_the_algorithm_its_version_and_its_weights(source: str, kind: str) -> None:
    for segment in (item for item in read(segmentation(source, kind)).SegmentSequence if item.SegmentNumber != 0):
        assert (segment.SegmentAlgorithmType, segment.SegmentAlgorithmName) == ("AUTOMATIC", ALGORITHM)
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == (ALGORITHM, "0.1.0")
        assert algorithm.AlgorithmFamilyCodeSequence[0].CodeValue == "123110"
        assert f"weights=sha256:{DIGEST}" in str(algorithm.AlgorithmParameters).replace(" ", "").replace("'", "")


def test_classes_of_a_classification_are_tracked_apart() -> None:
    for source in FILMS:
        document = read(nothing_found(source))
        uids = [str(item.UID) for group in groups(document) for item in said(group, "112040")]
        assert len(set(uids)) == len(uids) == len(source_of(source).nothing.scores) + 1
