"""A report that says why nothing was analysed leaves only if it says that, of these images, and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO

import pydicom
import pytest
from pydicom import Dataset

from dicomnode.errors import ProofFailed
from dicomnode.findings import ResultObject
from dicomnode.results.proof_refusal import prove_refusal
from dicomnode.results.report import encode_refusal
from results_cases import Case, synthetic

CODE, REASON, NAME = "too-few-slices", "the series has 2 slices — the package needs 8 × 5 µm", "Lung nodule 3D U-Net"


@pytest.fixture(scope="module")
def case() -> Case:
    return synthetic()


def report(case: Case, kind: str = "sr") -> ResultObject:
    images = case.headers[:2]
    return encode_refusal(CODE, REASON, images, case.identity, manufacturer="dicomnode", algorithm_name=NAME, kind=kind)


def prove(case: Case, result: ResultObject, reason: str = REASON, code: str = CODE) -> None:
    prove_refusal(result, code, reason, case.headers[:2], case.identity, algorithm_name=NAME)


@pytest.mark.parametrize("kind", ["sr", "sr-comprehensive"])
def test_a_report_as_it_is_written_passes(case: Case, kind: str) -> None:
    prove(case, report(case, kind))


def test_one_of_an_image_that_says_next_to_nothing_passes(case: Case) -> None:
    bare = Dataset()
    bare.SOPClassUID, bare.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    bare.StudyInstanceUID, bare.SeriesInstanceUID = case.volume.study_instance_uid, "1.2.4"
    result = encode_refusal("modality", "no CT", [bare], case.identity, manufacturer="m", algorithm_name="a")
    prove_refusal(result, "modality", "no CT", [bare], case.identity, algorithm_name="a")


def _items(below: Dataset, code: str) -> list[Dataset]:
    content = below.get("ContentSequence", [])
    here = [i for i in content if i.get("ConceptNameCodeSequence", [Dataset()])[0].get("CodeValue") == code]
    return here + [j for i in content for j in _items(i, code)]


def _another_reason(document: Dataset) -> None:
    _items(document, "121106")[1].TextValue = "Not analysed (no-lung): no lung was found"


def _no_warning(document: Dataset) -> None:
    _items(document, "121106")[0].TextValue = "for diagnosis"


def _normal(document: Dataset) -> None:
    _items(document, "111017")[0].ConceptCodeSequence[0].CodeValue = "111241"  # all algorithms succeeded; without findings


def _number(document: Dataset) -> None:
    unit, value, item = Dataset(), Dataset(), _items(document, "111017")[0]
    unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning = "mm", "UCUM", "mm"
    value.NumericValue, value.MeasurementUnitsCodeSequence = "5", [unit]
    item.ValueType, item.MeasuredValueSequence = "NUM", [value]


def _another_algorithm(document: Dataset) -> None:
    _items(document, "111001")[0].TextValue = "Another"


def _no_weights(document: Dataset) -> None:
    _items(document, "111003")[0].TextValue = "0.1.0"


def _another_procedure(document: Dataset) -> None:
    _items(document, "121058")[0].ConceptCodeSequence[0].CodeValue = "25056-3"


def _another_image(document: Dataset) -> None:
    series = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID = "1.2.3"


def _fewer_images(document: Dataset) -> None:
    del document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[1]


def _another_patient(document: Dataset) -> None:
    document.PatientID = "SOMEBODY ELSE"


def _another_study(document: Dataset) -> None:
    document.StudyInstanceUID = "1.2.3"


def _verified(document: Dataset) -> None:
    document.VerificationFlag = "VERIFIED"


@pytest.mark.parametrize(
    "spoil",
    [
        _another_reason, _no_warning, _normal, _number, _another_algorithm, _no_weights, _another_procedure, _another_image, _fewer_images,
        _another_patient, _another_study, _verified,
    ],
)  # fmt: skip
def test_what_says_anything_else_is_withheld(case: Case, spoil: Callable[[Dataset], None]) -> None:
    written = report(case)
    document = pydicom.dcmread(BytesIO(written.data))
    spoil(document)
    out = BytesIO()
    document.save_as(out, enforce_file_format=True)
    with pytest.raises(ProofFailed):
        prove(case, replace(written, parts=(out.getvalue(),)))


def test_a_report_with_another_reason_than_the_jobs_is_withheld(case: Case) -> None:
    with pytest.raises(ProofFailed, match="say why"):
        prove(case, report(case), code="no-lung")
