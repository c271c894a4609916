"""What modalities (MPPS) and archives (IAN) announce about studies: noted for good before they hear Success, and compared with what came.

Must never make a study, a revision or a job of it: it is evidence, which `completion` looks at.
"""

from __future__ import annotations

from dicomnode.dimse.performed import Announced, StepChange
from dicomnode.errors import AttributeValueMissing, DuplicateNotice, NoSuchStep, NoticeNotAuthorized, StepMayNotBeUpdated
from dicomnode.evidence import NoticeEvidence, notice_evidence
from dicomnode.logs import get_logger
from storage import Storage
from storage.records import NoticeState

log = get_logger(__name__)


def announced(storage: Storage, study_instance_uid: str) -> tuple[NoticeEvidence, ...]:
    """Return what was announced of a study, against what is here."""
    notices = storage.notices.of_study(study_instance_uid)
    named = {uid for notice in notices for uids in notice.images.values() for uid in uids}
    return notice_evidence(notices, storage.index.absent(named) if named else ())


class Announcements:
    """Takes the announcements of peers that may send."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def announce(self, announced: Announced) -> None:
        """Note an announcement. Raises DuplicateNotice if its UID is in use."""
        state: NoticeState = "in progress" if announced.kind == "mpps" else "available"
        added = self._storage.notices.create(
            announced.sop_instance_uid, kind=announced.kind, ae_title=announced.ae_title, state=state, studies=announced.studies,
            images=announced.images,
        )  # fmt: skip
        if not added:
            raise DuplicateNotice("the SOP Instance UID is in use")
        images = sum(map(len, announced.images.values()))
        log.info("announced", kind=announced.kind, state=state, calling_ae_title=announced.ae_title, count=images)

    def change(self, change: StepChange) -> None:
        """Note a change of a step.

        Raises:
            NoticeRefused: there is no such step, it has ended, another AE made it, or it is completed without a series.
        """
        known = self._storage.notices.step(change.sop_instance_uid)
        if known is not None and change.state == "completed" and not (known.images if change.images is None else change.images):
            raise AttributeValueMissing("Performed Series Sequence has no item")
        outcome = self._storage.notices.change(
            change.sop_instance_uid, ae_title=change.ae_title, state=change.state, images=change.images
        )  # fmt: skip
        if outcome == "unknown":
            raise NoSuchStep("there is no such performed procedure step")
        if outcome == "of another":
            raise NoticeNotAuthorized("the step is another AE's")
        if outcome == "ended":
            raise StepMayNotBeUpdated("Performed Procedure Step Object may no longer be updated")
        log.info("announced", kind="mpps", state=change.state, calling_ae_title=change.ae_title)
