"""A report of a study that was not analysed is read again from its bytes, and says why, and nothing else, before it leaves the node.

Must never import highdicom or the encoders: what proves must not share code with what is proved.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydicom import Dataset

from dicomnode.findings import ResultObject, RunIdentity
from dicomnode.results.decoding import comments_of, decode_report, evidence_of, expect, items_below, read_report
from dicomnode.results.proof_comments import WARNING, compare_origin, says

_SUMMARY, _NONE_SUCCEEDED = "111017", "111245"  # CAD Processing and Findings Summary: no algorithms succeeded; without findings (DCM)


def prove_refusal(
    report: ResultObject, code: str, reason: str, headers: Sequence[Dataset], identity: RunIdentity, *, algorithm_name: str
) -> None:
    """Return if the report says that nothing was analysed and why, of these images, and gives no number.

    Args:
        report: what `encode_refusal` gave for the rest.
        code: the machine-readable reason.
        reason: one sentence for the person who reads the report.
        headers: the images of the study, at least one.
        identity: of the run that did not come about.
        algorithm_name: of the package that would have run.

    Raises:
        ProofFailed: one sentence says what is wrong; the report may not leave.
    """
    document = read_report(report, str(headers[0].StudyInstanceUID))
    expect(
        str(document.get("PatientID") or "") == str(headers[0].get("PatientID") or ""), "the SR belongs to another patient than the images"
    )
    comments = comments_of(document)
    expect(WARNING in comments, "the SR doesn't say that it is for research only")
    expect(any(says(comment, f"Not analysed ({code}): {reason}") for comment in comments), f"the SR doesn't say why: {code}")
    groups = list(decode_report(document))
    expect(len(groups) == 1, f"the SR has {len(groups)} groups and not the summary alone")
    evaluations = [evaluation for group in groups for evaluation in group.codes if evaluation[0] == _SUMMARY]
    expect(evaluations == [(_SUMMARY, _NONE_SUCCEEDED)], f"the SR's summary isn't ({_NONE_SUCCEEDED}, DCM) alone: {evaluations}")
    expect(not any(item.ValueType == "NUM" for item in items_below(document)), "the SR gives a number, though nothing was analysed")
    compare_origin(document, modality=str(headers[0].get("Modality", "")), algorithm_name=algorithm_name, package_version=identity.version)
    evidence = dict(evidence_of(document))
    images = {str(header.SOPInstanceUID): str(header.SeriesInstanceUID) for header in headers}
    expect(evidence == images, "the SR's evidence isn't the images of the study, each in its series")
