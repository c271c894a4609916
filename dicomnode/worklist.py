"""What a peer may ask of the worklist: an analysis of a study that is here or will come, and that one be cancelled.

A work item is begun on the same path as what routes ask for (`analyses`). Must never begin one twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dicomnode.analyses import begin_item
from dicomnode.engine import EngineClient
from dicomnode.logs import get_logger
from storage import Storage
from storage.records import WorkItem

log = get_logger(__name__)


def schedule(storage: Storage, client: EngineClient, item: WorkItem) -> bool:
    """Put a work item on the worklist; False, and nothing changed, if there is one of its UID.

    It begins at once where the node holds its study and has closed it; else it waits for the study's next revision.
    """
    with storage.database.writing() as transaction:
        storage.workitems.lock(transaction, item.study_instance_uid)
        if not storage.workitems.add(transaction, item):
            return False
        study = storage.index.study(item.study_instance_uid)
        if study is not None and study.state == "closed" and study.revision > 0 and study.holds:
            begin_item(storage, client, transaction, item, study)
    log.info(
        "work item created", sop_instance_uid=item.uid, study_instance_uid=item.study_instance_uid, peer=item.requester,
        package=item.package,
    )  # fmt: skip
    return True


def request_cancel(storage: Storage, client: EngineClient, item: WorkItem, request: Mapping[str, Any]) -> bool:
    """Cancel a work item that hasn't ended, as a peer asks: it never begins, or what it makes is discarded; False if it had ended.

    `request` is kept with it: who asked, and why, in the DICOM JSON Model.
    """
    requester = request["requester"]
    reason = f"cancelled as {requester} asked"
    with storage.database.writing() as transaction:  # who watches sees all of it at once
        storage.workitems.lock(transaction, item.study_instance_uid)
        cancelled = storage.workitems.end(transaction, item.uid, reason)
        job_key = None if cancelled else storage.workitems.job_of(transaction, item.uid)
        if job_key is not None:
            cancelled = storage.jobs.finish(job_key, "cancelled", reason_code="cancelled", reason=reason, connection=transaction)
        if cancelled:
            storage.workitems.note_request_to_cancel(transaction, item.uid, request)
    if job_key is not None:
        client.withdraw(job_key)
    if cancelled:
        log.info("work item cancelled", sop_instance_uid=item.uid, study_instance_uid=item.study_instance_uid, peer=requester)
    return cancelled
