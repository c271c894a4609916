"""UIDs of result objects, derived and never drawn: the same run writes the same UIDs on any machine, at any time.

Must never use a clock or a random number. Every UID is a name-based UUID under the root 2.25 (PS3.5 B.2), so no
registered root is needed and a second encoding of the same run is the same object.
"""

from __future__ import annotations

import json
import uuid
from datetime import datetime

from dicomnode.findings import Finding, RunIdentity

# The namespace of all names below (RFC 9562 5.5). Changing it changes every UID the node will ever write.
NAMESPACE = uuid.UUID("5f3a2c52-6a0c-4b0e-9f3e-0d1c0a9b7e64")


def derive_uid(identity: RunIdentity, *parts: str) -> str:
    """Return the UID that belongs to `parts` within one run.

    The name covers study, revision, package, version, digest and run (not `created_at`); `parts` name the thing:
    for an object its SOP class, encoding and ordinal. Equal input gives an equal UID, any difference another one.
    """
    name = [
        identity.study_instance_uid,
        str(identity.revision),
        identity.package,
        identity.version,
        identity.digest,
        str(identity.run),
        *parts,
    ]
    return _uid(name)


def object_uid(identity: RunIdentity, sop_class_uid: str, encoding: str, ordinal: int = 1) -> str:
    """Return the SOP Instance UID of the `ordinal`-th object of a class and encoding in a run.

    An encoding is a transfer syntax, with what else makes other bytes of the same findings behind it (see `profile.Form`).
    """
    return derive_uid(identity, "instance", sop_class_uid, encoding, str(ordinal))


def series_uid(identity: RunIdentity, modality: str) -> str:
    """Return the Series Instance UID of the run's objects of one modality, of a variant of it that has a series of its own by its name."""
    return derive_uid(identity, "series", modality)


def tracking_uid(identity: RunIdentity, finding_number: int) -> str:
    """Return the Tracking UID of a finding: the same in the SEG's segment and in all of the SR's groups about it.

    Number 0 is the tracking UID of the package's summary, which is about the study and no finding.
    """
    return derive_uid(identity, "tracking", str(finding_number))


def tracking_id(identity: RunIdentity, finding_number: int) -> str:
    """Return the readable Tracking ID beside `tracking_uid`, e.g. "lung-nodule-ct 0.1.0 #1"."""
    what = f"#{finding_number}" if finding_number else "summary"
    return f"{identity.package} {identity.version} {what}"


def tracking_of(identity: RunIdentity, finding: Finding) -> tuple[str, str]:
    """Return the Tracking UID and Tracking ID of a finding: those of the earlier study, where it was seen there."""
    if finding.growth is not None:
        return finding.growth.former.tracking_uid, finding.growth.former.tracking_id
    return tracking_uid(identity, finding.number), tracking_id(identity, finding.number)


def class_tracking_uid(identity: RunIdentity, number: int) -> str:
    """Return the Tracking UID of what a classification says about its `number`-th class (from 1): about the study, not about a place."""
    return derive_uid(identity, "tracking class", str(number))


def class_tracking_id(identity: RunIdentity, number: int) -> str:
    """Return the readable Tracking ID beside `class_tracking_uid`."""
    return f"{identity.package} {identity.version} class {number}"


def device_uid(identity: RunIdentity) -> str:
    """Return the UID of the device that speaks in a report: this version and digest of the package, whatever the study."""
    return _uid(["device", identity.package, identity.version, identity.digest])


def workitem_uid(job_key: str, created_at: datetime, number: int = 1) -> str:
    """Return the UID of the `number`-th work item that stands for a job. The time tells apart nodes that analyse the same study."""
    return _uid(["workitem", job_key, created_at.isoformat(), str(number)])


def requested_workitem_uid(requester: str, request: str) -> str:
    """Return the UID of a work item whose requester gave it none: the same request again is the same work item."""
    return _uid(["workitem", requester, request])


def _uid(name: list[str]) -> str:
    return f"2.25.{uuid.uuid5(NAMESPACE, json.dumps(name)).int}"
