"""Findings become a Key Object Selection (PS3.3 A.35.4, PS3.16 TID 2010): the images they are on, flagged where a viewer lists images.

Must never decide what is a finding, read a clock or draw a random number: the same findings give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from highdicom import sr
from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from pydicom import Dataset
from pydicom.sr.codedict import codes as dicom_codes
from pydicom.uid import ExplicitVRLittleEndian, KeyObjectSelectionDocumentStorage

from dicomnode.findings import Findings, ResultObject, RunIdentity, Volume
from dicomnode.results import identity as uids, provenance
from dicomnode.results.report import device_observer


def encode_selection(findings: Findings, volume: Volume, headers: Sequence[Dataset], identity: RunIdentity) -> ResultObject | None:
    """Return the selection of the image, or the frame of one, that each finding is drawn on; None where nothing was found."""
    if not findings.findings:
        return None
    origin = next(header for header in headers if header.SOPInstanceUID == volume.sop_instance_uids[0])
    by_uid = {str(header.SOPInstanceUID): header for header in headers}
    frames: dict[str, list[int]] = {}  # of each image, in the order of the findings
    for k in dict.fromkeys(finding.key_slice for finding in findings.findings):
        number = provenance.frame_number(volume, k)
        frames.setdefault(volume.sop_instance_uids[k], []).extend([] if number is None else [number])
    images = [provenance.reduced_header(by_uid[uid]) for uid in frames]
    made_by = {"manufacturer": findings.manufacturer, "model": findings.algorithm_name}
    content = KeyObjectSelection(
        document_title=dicom_codes.DCM.OfInterest,
        referenced_objects=images,
        observer_device_context=device_observer(identity, **made_by),
        description=f"{provenance.RESEARCH}. Findings of {provenance.ascii_text(findings.algorithm_name, 200)}.",
    )
    for item in content[0].ContentSequence:
        if item.ValueType == sr.ValueTypeValues.IMAGE.value:
            reference = item.ReferencedSOPSequence[0]
            if numbers := frames[str(reference.ReferencedSOPInstanceUID)]:
                reference.ReferencedFrameNumber = numbers if len(numbers) > 1 else numbers[0]
    arguments = provenance.common_arguments(origin, identity, "KO", **made_by)
    arguments["series_instance_uid"] = uids.series_uid(identity, "KO")
    document = KeyObjectSelectionDocument(
        evidence=images,
        content=content,
        sop_instance_uid=uids.object_uid(identity, KeyObjectSelectionDocumentStorage, ExplicitVRLittleEndian),
        **arguments,
    )
    provenance.stamp(document, origin, identity, **made_by)
    return provenance.encode(document)
