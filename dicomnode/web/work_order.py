"""Reads what a peer asks of the worklist: data sets in the DICOM JSON Model, and the work item that one describes.

Every body is hostile until it is read: depth, length and each value are checked by hand. Must never put a value of a body into a
message or a log.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Final

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from starlette.exceptions import HTTPException

from dicomnode.config import check_ae_title
from dicomnode.dimse.scp import is_uid
from dicomnode.results.identity import requested_workitem_uid
from dicomnode.web.json_model import Json
from storage.records import Priority, WorkItem
from storage.registry import Registry
from storage.times import moment

SCHEME: Final = "99DICOMNODE"
MAXIMUM_BODY: Final = 2**20
_MAXIMUM_DEPTH: Final = 8
_MAXIMUM_ELEMENTS: Final = 20_000
_MAXIMUM_TEXT: Final = 10_240
_TAG: Final = re.compile(r"[0-9A-Fa-f]{8}", re.ASCII)
_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_PRIORITIES: Final[dict[str, Priority]] = {"HIGH": "stat", "MEDIUM": "routine", "LOW": "routine"}
_READINESS: Final = ("READY", "UNREADY", "INCOMPLETE")
# What is kept of a request, and shown again, beside what a work item has a field for.
KEPT: Final = (
    "PatientName", "PatientID", "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "OtherPatientIDsSequence", "PatientBirthDate",
    "PatientSex", "AdmissionID", "IssuerOfAdmissionIDSequence", "AdmittingDiagnosesDescription", "AdmittingDiagnosesCodeSequence",
    "ReferencedRequestSequence", "ScheduledWorkitemCodeSequence", "ScheduledProcessingParametersSequence", "InputInformationSequence",
    "CommentsOnTheScheduledProcedureStep", "ExpectedCompletionDateTime", "ScheduledProcedureStepExpirationDateTime",
    "ScheduledHumanPerformersSequence", "ScheduledStationClassCodeSequence", "ScheduledStationGeographicLocationCodeSequence",
    "ReplacedProcedureStepSequence",
)  # fmt: skip
# What a work item has a field for, or what says nothing that the node doesn't know.
_READ: Final = (
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "TransactionUID", "ProcedureStepState",
    "ScheduledProcedureStepPriority", "ProcedureStepLabel", "WorklistLabel", "ScheduledProcedureStepStartDateTime", "InputReadinessState",
    "ScheduledStationNameCodeSequence", "OutputDestinationSequence", "ScheduledProcedureStepModificationDateTime",
    "ProcedureStepProgressInformationSequence", "UnifiedProcedureStepPerformedProcedureSequence",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Order:
    """A work item that a peer asks for, and whether something that the peer said of it is left out or changed."""

    item: WorkItem
    modified: bool


def read_data_set(body: bytes) -> Json:
    """Return the one data set of a body by keyword: `{"PatientID": ["P1"]}`, items of sequences likewise; private attributes are left out.

    Raises:
        HTTPException: 400, it is none in the DICOM JSON Model (PS3.18 annex F).
    """
    try:
        read = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "The body is no JSON.") from error
    if isinstance(read, list) and len(read) == 1:
        read = read[0]
    if not isinstance(read, dict):
        raise _malformed()
    left = [_MAXIMUM_ELEMENTS]
    return _elements(read, 0, left)


def as_json(values: Json) -> Json:
    """Return what `read_data_set` read in the DICOM JSON Model again."""
    made: Json = {}
    for keyword, several in values.items():
        vr = dictionary_VR(keyword)
        made[f"{_tag_of(keyword):08X}"] = {"vr": vr, "Value": [as_json(one) for one in several] if vr == "SQ" else several}
        if not several:
            del made[f"{_tag_of(keyword):08X}"]["Value"]
    return dict(sorted(made.items()))


def read_order(values: Json, uid: str | None, requester: str, ae_titles: Collection[str], registry: Registry) -> Order:
    """Return the work item that a data set describes (PS3.4 table CC.2.5-3), under the UID of the request's address, if that has one.

    Raises:
        HTTPException: 400, with what is wrong.
        StorageError: the registry can't be asked.
    """
    if _first(values, "ProcedureStepState") != "SCHEDULED":
        raise HTTPException(400, "The provided value of UPS State was not SCHEDULED.")
    for keyword in ("TransactionUID", "ProcedureStepProgressInformationSequence", "UnifiedProcedureStepPerformedProcedureSequence"):
        if values.get(keyword):
            raise HTTPException(400, f"{keyword} has no value when a work item is created.")
    priority = _PRIORITIES.get(_first(values, "ScheduledProcedureStepPriority"))
    if priority is None:
        raise HTTPException(400, "ScheduledProcedureStepPriority is HIGH, MEDIUM or LOW.")
    if _first(values, "InputReadinessState") not in _READINESS:
        raise HTTPException(400, "InputReadinessState is READY, UNREADY or INCOMPLETE.")
    label = _first(values, "ProcedureStepLabel")
    if not label or len(label) > 64:
        raise HTTPException(400, "ProcedureStepLabel has 1 to 64 characters.")
    try:
        scheduled_at = moment(_first(values, "ScheduledProcedureStepStartDateTime"))
    except ValueError as error:
        raise HTTPException(400, "ScheduledProcedureStepStartDateTime is absent or no date and time.") from error
    _check_station(values, ae_titles)
    package, version = _package(values, registry)
    requested = {keyword: values[keyword] for keyword in KEPT if values.get(keyword)}
    request: Json = next((one for one in values.get("ReferencedRequestSequence", ()) if one), {})
    patient = {keyword: _first(values, keyword) for keyword in ("PatientID", "PatientBirthDate", "PatientSex")}
    modified = set(values) - set(KEPT) - set(_READ) or _first(values, "ScheduledProcedureStepPriority") == "LOW"
    item = WorkItem(
        uid=_uid(values, uid, requester),
        study_instance_uid=_study(values),
        requester=requester,
        package=package,
        version=version,
        priority=priority,
        to_ae_titles=_destinations(values, registry),
        label=label,
        worklist_label=_first(values, "WorklistLabel")[:64] or requester,
        scheduled_at=scheduled_at,
        created_at=scheduled_at,  # storage knows the time
        requested=as_json(requested),
        patient={**patient, "PatientName": _name(values), "AccessionNumber": _first(request, "AccessionNumber")},
        requested_procedure_id=_first(request, "RequestedProcedureID"),
    )
    return Order(item=item, modified=bool(modified))


def _uid(values: Json, uid: str | None, requester: str) -> str:
    stated = _first(values, "SOPInstanceUID")
    if uid is not None and stated and stated != uid:
        raise HTTPException(400, "The SOP Instance UID of the data set is another one than that of the address.")
    chosen = uid or stated or requested_workitem_uid(requester, json.dumps(values, sort_keys=True))
    if not is_uid(chosen):
        raise HTTPException(400, "What stands in the place of a UID is none.")
    return chosen


def _study(values: Json) -> str:
    """The one study that the work is about."""
    named = {_first(values, "StudyInstanceUID")} - {""}
    named |= {_first(one, "StudyInstanceUID") for one in values.get("InputInformationSequence", ())} - {""}
    named = named or {_first(one, "StudyInstanceUID") for one in values.get("ReferencedRequestSequence", ())} - {""}
    if len(named) != 1 or not all(map(is_uid, named)):
        raise HTTPException(400, "The work item names no study, or more than one, by its Study Instance UID.")
    return named.pop()


def _check_station(values: Json, ae_titles: Collection[str]) -> None:
    stations = {code for code, _ in _codes(values.get("ScheduledStationNameCodeSequence", ()))}
    if stations and not stations & set(ae_titles):
        raise HTTPException(400, "The scheduled station is another one: this node is known by its AE title alone.")


def _package(values: Json, registry: Registry) -> tuple[str, str | None]:
    """The package that is asked for by Scheduled Workitem Code or by the processing parameter Algorithm Name, and its version, if any."""
    names = {code for code, scheme in _codes(values.get("ScheduledWorkitemCodeSequence", ())) if scheme == SCHEME}
    parameters = list(_parameters(values))
    names |= {text for concept, text in parameters if concept == ("111001", "DCM")}
    versions = {text for concept, text in parameters if concept == ("111003", "DCM")}
    if len(names) != 1 or len(versions) > 1:
        raise HTTPException(
            400, f"One package is asked for, by a Scheduled Workitem Code of scheme {SCHEME} or a processing parameter (111001, DCM)."
        )
    name, version = names.pop(), versions.pop() if versions else None
    known = registry.package(name, version) if all(_PACKAGE.fullmatch(text) for text in (name, version or name)) else None
    if known is None or known.state != "enabled":
        raise HTTPException(400, "The node has no enabled package of this name and version.")
    return name, version


def _destinations(values: Json, registry: Registry) -> tuple[str, ...]:
    """The AE titles that results are to be sent to by DICOM Storage."""
    titles: list[str] = []
    for destination in values.get("OutputDestinationSequence", ()):
        stores = destination.get("DICOMStorageSequence", ())
        if not stores or set(destination) - {"DICOMStorageSequence"}:
            raise HTTPException(400, "Results are sent by DICOM Storage alone, to peers of this node.")
        titles += [_first(store, "DestinationAE").strip(" ") for store in stores]
    receiving = {peer.ae_title for peer in registry.peers() if peer.receives} if titles else set()
    if not set(titles) <= receiving:
        raise HTTPException(400, "An output destination is no peer of this node that receives results.")
    return tuple(dict.fromkeys(map(check_ae_title, titles)))


def _codes(items: Collection[Json]) -> Iterator[tuple[str, str]]:
    for one in items:
        yield _first(one, "CodeValue") or _first(one, "LongCodeValue"), _first(one, "CodingSchemeDesignator")


def _parameters(values: Json) -> Iterator[tuple[tuple[str, str], str]]:
    """The processing parameters that are text, each with the code of its concept."""
    for one in values.get("ScheduledProcessingParametersSequence", ()):
        for concept in _codes(one.get("ConceptNameCodeSequence", ())):
            yield concept, _first(one, "TextValue")


def _name(values: Json) -> str:
    name = next(iter(values.get("PatientName", ())), None) or {}
    groups = [name.get(group, "") for group in ("Alphabetic", "Ideographic", "Phonetic")]
    return "=".join(groups).rstrip("=")


def _first(values: Json, keyword: str) -> str:
    """The first value of an attribute as text; "" if there is none."""
    value = next(iter(values.get(keyword, ())), None)
    return "" if value is None else str(value)


def _tag_of(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    assert tag is not None  # noqa: S101  keywords are from the dictionary
    return tag


def _elements(read: dict[Any, Any], depth: int, left: list[int]) -> Json:
    if depth > _MAXIMUM_DEPTH:
        raise _malformed()
    made: Json = {}
    for tag, element in read.items():
        left[0] -= 1
        if left[0] < 0 or not _TAG.fullmatch(tag) or not isinstance(element, dict):
            raise _malformed()
        keyword = keyword_for_tag(int(tag, 16))
        if tag_for_keyword(keyword) != int(tag, 16) or set(element) & {"BulkDataURI", "InlineBinary"}:  # a private or repeating group
            continue
        vr, values = dictionary_VR(keyword), element.get("Value", [])
        if keyword in made or not isinstance(values, list) or element.get("vr") not in [vr, *vr.split(" or ")]:
            raise _malformed()
        left[0] -= len(values)
        made[keyword] = [_value(vr, value, depth, left) for value in values]
    return made


def _value(vr: str, value: Any, depth: int, left: list[int]) -> Any:
    if vr == "SQ":
        if not isinstance(value, dict | None):
            raise _malformed()
        return _elements(value or {}, depth + 1, left)
    if vr == "PN":
        if not isinstance(value, dict | None) or not all(isinstance(text, str) and len(text) <= 64 for text in (value or {}).values()):
            raise _malformed()
        return {group: text for group, text in (value or {}).items() if group in {"Alphabetic", "Ideographic", "Phonetic"}}
    if isinstance(value, str) and len(value) <= _MAXIMUM_TEXT:
        return value
    if isinstance(value, bool):
        raise _malformed()
    if value is None or (isinstance(value, int | float) and math.isfinite(value) and vr not in {"UI", "CS", "SH", "LO", "DT", "DA"}):
        return value
    raise _malformed()


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _malformed() -> HTTPException:
    return HTTPException(400, "The body is no data set in the DICOM JSON Model.")
