"""A work item as a Unified Procedure Step in the DICOM JSON Model (PS3.3 B.26, PS3.4 table CC.2.5-3).

Must never tell a Transaction UID: the node performs its work items itself, and nobody shares its lock on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from dicomnode.web.json_model import Json, attributes_as_json
from dicomnode.web.work_order import SCHEME
from storage.records import Instance, Result, WorkItem

UPS_PUSH: Final = "1.2.840.10008.5.1.4.34.6.1"
_DISCONTINUED: Final[Mapping[str, tuple[str, str]]] = {  # PS3.16 CID 9300, by what became of the job
    "refused": ("110522", "Object Types not supported"),
    "failed": ("110501", "Equipment failure"),
    "cancelled": ("110513", "Discontinued for unspecified reason"),
}
_SAID: Final = ("00741238", "0074100E")  # by who asked for the cancellation: its reason, in words and in codes


def workitem_as_json(item: WorkItem, station: str, address: str, inputs: Sequence[Instance], outputs: Sequence[Result]) -> Json:
    """Return a work item with what went into it and what came out of it; `station` is the node's AE title, `address` its DICOMweb."""
    made = dict(item.requested)
    made |= attributes_as_json(
        [
            ("SpecificCharacterSet", "ISO_IR 192"),
            ("SOPClassUID", UPS_PUSH),
            ("SOPInstanceUID", item.uid),
            ("StudyInstanceUID", item.study_instance_uid),
            *((keyword, value) for keyword, value in item.patient.items() if keyword != "AccessionNumber"),
            ("ProcedureStepState", item.state),
            ("ScheduledProcedureStepPriority", "HIGH" if item.priority == "stat" else "MEDIUM"),
            ("ProcedureStepLabel", item.label),
            ("WorklistLabel", item.worklist_label),
            ("ScheduledProcedureStepStartDateTime", _time(item.scheduled_at)),
            ("ScheduledProcedureStepModificationDateTime", _time(item.changed_at)),
            ("InputReadinessState", "READY" if is_ready(item) else "UNREADY"),
        ]
    )
    own = {
        "00404018": _sequence([_code(item.package, SCHEME, item.package)]),
        "00741210": _sequence(_parameters(item)),
        "0040A370": _sequence([_request(item)]),
    }
    made = own | made
    made["00404025"] = _sequence([_code(station, SCHEME, station)])
    made["00741002"] = _sequence([_progress(item)])
    performed = item.started_at is not None or bool(outputs)
    made["00741216"] = _sequence([_performed(item, station, address, outputs)] if performed else [])
    if inputs:
        named = ((one.study_instance_uid, one.series_instance_uid, one.sop_class_uid, one.sop_instance_uid) for one in inputs)
        made["00404021"] = _sequence(_information(station, address, named))
    made.setdefault("00404021", _sequence([]))
    if item.to_ae_titles:
        titles = [{"00404071": _sequence([attributes_as_json([("DestinationAE", title)])])} for title in item.to_ae_titles]
        made["00404070"] = _sequence(titles)
    return dict(sorted(made.items()))


def is_ready(item: WorkItem) -> bool:
    """Whether what a work item needs is there."""
    return item.state != "SCHEDULED" or item.job_key is not None


def report_of_state(item: WorkItem) -> Json:
    """Return the event report of a work item's state (PS3.4 table CC.2.4-1)."""
    said = _progress(item) if item.state == "CANCELED" else {}
    made = [("ProcedureStepState", item.state), ("InputReadinessState", "READY" if is_ready(item) else "UNREADY")]
    return _report(item, 1, attributes_as_json(made) | {tag: said[tag] for tag in _SAID if tag in said})


def report_of_cancel_request(item: WorkItem) -> Json:
    """Return the event report of a request to cancel it."""
    cancel = dict(item.cancel or {})
    return _report(item, 2, attributes_as_json([("RequestingAE", cancel.pop("requester", ""))]) | cancel)


def report_of_progress(item: WorkItem) -> Json:
    """Return the event report of its progress."""
    return _report(item, 3, {"00741002": _sequence([_progress(item)])})


def report_of_assignment(item: WorkItem, station: str) -> Json:
    """Return the event report that it is this node's to perform."""
    return _report(item, 5, {"00404025": _sequence([_code(station, SCHEME, station)])})


def _report(item: WorkItem, event: int, of_event: Json) -> Json:
    """The command set's attributes that PS3.18 11.13 asks for, but for the Message ID, with those of the event."""
    said = {"00000002": {"vr": "UI", "Value": [UPS_PUSH]}, "00001000": {"vr": "UI", "Value": [item.uid]}}
    return said | {"00001002": {"vr": "US", "Value": [event]}} | of_event


def _progress(item: WorkItem) -> Json:
    share = 1.0 if item.state == "COMPLETED" else item.progress
    values: list[tuple[str, object]] = [] if share is None else [("ProcedureStepProgress", round(100 * share, 1))]
    if item.state != "CANCELED":
        return attributes_as_json([*values, ("ProcedureStepProgressDescription", item.reason)] if item.reason else values)
    ended = [*values, ("ProcedureStepCancellationDateTime", _time(item.ended_at)), ("ReasonForCancellation", item.reason)]
    value, meaning = _DISCONTINUED.get(item.outcome or "", _DISCONTINUED["cancelled"])
    codes = [_code(value, "DCM", meaning)]
    if item.outcome in {"refused", "failed"} and item.reason_code:
        codes.append(_code(item.reason_code, SCHEME, item.reason_code))
    said = {tag: element for tag, element in (item.cancel or {}).items() if tag in _SAID}
    return attributes_as_json(ended) | {"0074100E": _sequence(codes)} | said


def _performed(item: WorkItem, station: str, address: str, outputs: Sequence[Result]) -> Json:
    made = attributes_as_json(
        [
            ("PerformedProcedureStepStartDateTime", _time(item.started_at)),
            ("PerformedProcedureStepEndDateTime", _time(item.ended_at)),
        ]
    )
    made["00404028"] = _sequence([_code(station, SCHEME, station)])
    made["00404019"] = _sequence([_code(item.package, SCHEME, item.package)])
    made["00741212"] = _sequence(_parameters(item))
    named = (
        (one.study_instance_uid, one.series_instance_uid, one.sop_class_uid, one.sop_instance_uid)
        for one in outputs
        if one.series_instance_uid is not None
    )
    made["00404033"] = _sequence(_information(station, address, named))
    return dict(sorted(made.items()))


def _information(station: str, address: str, instances: Iterable[tuple[str, str, str, str]]) -> list[Json]:
    """Series with their instances, and where they are to be had: by WADO-RS and by C-MOVE or C-GET (PS3.3 table 10-3b)."""
    series: dict[tuple[str, str], list[Json]] = {}
    for study, series_uid, sop_class, sop_instance in instances:
        reference = attributes_as_json([("ReferencedSOPClassUID", sop_class), ("ReferencedSOPInstanceUID", sop_instance)])
        series.setdefault((study, series_uid), []).append(reference)
    return [
        {
            **attributes_as_json([("StudyInstanceUID", study), ("SeriesInstanceUID", uid), ("TypeOfInstances", "DICOM")]),
            "00081199": _sequence(references),
            "0040E021": _sequence([attributes_as_json([("RetrieveAETitle", station)])]),
            "0040E025": _sequence([attributes_as_json([("RetrieveURL", f"{address}/studies/{study}/series/{uid}")])]),
        }
        for (study, uid), references in series.items()
    ]


def _parameters(item: WorkItem) -> list[Json]:
    named = [("111001", "Algorithm Name", item.package), ("111003", "Algorithm Version", item.version)]
    return [
        {**attributes_as_json([("ValueType", "TEXT"), ("TextValue", text)]), "0040A043": _sequence([_code(value, "DCM", meaning)])}
        for value, meaning, text in named
        if text
    ]


def _request(item: WorkItem) -> Json:
    return attributes_as_json(
        [
            ("StudyInstanceUID", item.study_instance_uid),
            ("AccessionNumber", item.patient.get("AccessionNumber")),
            ("RequestedProcedureID", item.requested_procedure_id),
            ("RequestedProcedureDescription", None),
        ]
    )


def _code(value: str, scheme: str, meaning: str) -> Json:
    """A code; what is too long for SH is a Long Code Value (PS3.3 8.1)."""
    keyword = "CodeValue" if len(value) <= 16 else "LongCodeValue"
    return attributes_as_json([(keyword, value), ("CodingSchemeDesignator", scheme), ("CodeMeaning", meaning)])


def _sequence(items: Sequence[Any]) -> Json:
    return {"vr": "SQ", "Value": list(items)} if items else {"vr": "SQ"}


def _time(when: datetime | None) -> str | None:
    return None if when is None else f"{when.astimezone(UTC):%Y%m%d%H%M%S.%f}+0000"
