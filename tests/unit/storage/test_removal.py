"""Removing a study: its rows go at once and its files after them, nothing that anybody may need goes, and what went can come again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from held_studies import CAPTURE, CT, PACS, close, create_job, header_of, hold, receive

from storage import Storage, open_storage
from storage.errors import StorageError
from storage.retention import Holding


def holding(storage: Storage, study: str) -> Holding:
    return next(each for each in storage.retention.holdings() if each.study_instance_uid == study)


def files(folder: Path) -> list[Path]:
    return list((folder / "objects").rglob("*.dcm"))


def test_rows_and_files_are_gone_and_the_study_is_known_as_removed(storage: Storage, tmp_path: Path) -> None:
    gone, stays = hold(storage), hold(storage)
    assert len(files(tmp_path)) == 6
    seen = holding(storage, gone)
    assert (seen.objects, seen.size, seen.analysed, seen.sent_to) == (3, 4 + 4 + 6, True, ("PACS",))
    assert storage.retention.held_bytes() == 28
    assert storage.retention.remove(seen, "it was old")
    assert len(files(tmp_path)) == 3
    assert (storage.retention.unfinished(), storage.retention.held_bytes()) == (0, 14)
    known = storage.index.study(gone)
    assert known is not None
    assert (known.holds, known.removed_why, known.instances, known.revision) == (False, "it was old", 0, 1)
    assert known.removed_at is not None
    assert storage.index.instances(gone) == storage.index.instances(gone, 1) == storage.index.series(gone) == []
    assert storage.jobs.results(study_instance_uid=gone) == []
    assert [row.state for row in storage.jobs.deliveries(study_instance_uid=gone)] == ["sent"]
    assert [each.study_instance_uid for each in storage.retention.holdings()] == [stays]
    for level in ("PATIENT", "STUDY", "SERIES", "IMAGE"):
        found = storage.query.find(level, {})
        assert {row.get("StudyInstanceUID", stays) for row in found} == {stays}, level
    assert len(storage.query.find("PATIENT", {})) == 1
    assert not storage.retention.remove(seen, "again")


def test_an_image_that_comes_again_is_stored_and_makes_the_next_revision(storage: Storage) -> None:
    study = hold(storage, images=3)
    assert receive(storage, study, 2) == ["duplicate"]
    assert storage.retention.remove(holding(storage, study), "it was old")
    assert receive(storage, study, 2, content=b"other") == ["stored"]
    assert receive(storage, study, 2, content=b"other") == ["duplicate"]
    assert [known.study_instance_uid for known in storage.index.receiving()] == [study]
    assert close(storage, study) == 2
    assert [instance.instance_number for instance in storage.index.instances(study, 2)] == [2]
    assert storage.index.instances(study, 1) == []
    known = storage.index.study(study)
    assert known is not None
    assert known.holds
    assert known.removed_at is not None
    assert [row["NumberOfStudyRelatedInstances"] for row in storage.query.find("STUDY", {})] == [1]
    assert holding(storage, study).objects == 1


def test_a_result_that_comes_back_after_its_removal_is_still_known_as_made_here(storage: Storage) -> None:
    """A picture of ours is of an image class: as a stranger's it would be analysed."""
    study = hold(storage)
    (result,) = storage.jobs.results(study_instance_uid=study)
    assert storage.retention.remove(holding(storage, study), "it was old")
    header = header_of(study, 1, uid=result.sop_instance_uid, sop_class=CAPTURE, content=b"RESULT")
    assert storage.index.add_instance(header, storage.objects.put(b"RESULT")) == "stored"
    (instance,) = storage.index.instances(study)
    assert instance.made_here
    assert storage.index.receiving() == []
    assert holding(storage, study).objects == 1


def late_image(storage: Storage, study: str) -> None:
    assert receive(storage, study, 77) == ["stored"]


def another_job(storage: Storage, study: str) -> None:
    create_job(storage, study, kind="again")


def a_job_taken_up_again(storage: Storage, study: str) -> None:
    storage.jobs.requeue(f"deliver/{study}/1")


def a_request_to_commit(storage: Storage, study: str) -> None:
    with storage.database.writing() as connection:
        storage.requests.add(
            connection, "key", peer="SCANNER", transaction_uid="1.2", digest="d", references=[(CT, f"{study}.1.1")],
            failures=None,
        )  # fmt: skip


def another_study_of_the_patient(storage: Storage, study: str) -> None:
    known = storage.index.study(study)
    assert known is not None
    receive(storage, f"{study}.5", 1, patient=known.patient_id)


@pytest.mark.parametrize(
    "happens", [late_image, another_job, a_job_taken_up_again, a_request_to_commit, another_study_of_the_patient], ids=lambda f: f.__name__
)
def test_a_study_to_which_something_happened_since_it_was_looked_at_stays(
    storage: Storage, tmp_path: Path, happens: Callable[[Storage, str], None]
) -> None:
    study = hold(storage)
    seen = holding(storage, study)
    happens(storage, study)
    count = len(files(tmp_path))
    assert not storage.retention.remove(seen, "it was old")
    assert len(files(tmp_path)) == count
    now = holding(storage, study)
    assert now.receiving or now.busy or now.patient_busy


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("removed_before", [0, 1, 2])
def test_killed_among_the_files_it_leaves_nothing_that_is_told_as_there_and_another_process_ends_it(
    storage: Storage, tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch, removed_before: int
) -> None:
    study = hold(storage)
    remove, left = storage.objects.remove, iter(range(removed_before))

    def die(object_id: str) -> None:
        if next(left, None) is None:
            raise Killed
        remove(object_id)

    monkeypatch.setattr(storage.objects, "remove", die)
    with pytest.raises(Killed):
        storage.retention.remove(holding(storage, study), "it was old")
    assert len(files(tmp_path)) == 3 - removed_before
    assert storage.index.instances(study) == storage.query.find("IMAGE", {}) == []
    assert storage.retention.unfinished() == 3
    again = open_storage(database_url, tmp_path)
    try:
        assert receive(again, study, 1) == ["stored"]  # it came again before the file of the first is gone
        assert again.retention.finish() == again.retention.unfinished() == 0
        (instance,) = again.index.instances(study)
        assert files(tmp_path) == [again.objects.path(instance.stored.object_id)]
    finally:
        again.database.close()


def test_killed_before_the_commit_everything_is_as_it_was(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = hold(storage)
    seen = holding(storage, study)
    monkeypatch.setattr(storage.database, "now", lambda _connection: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        storage.retention.remove(seen, "it was old")
    monkeypatch.undo()
    assert len(files(tmp_path)) == 3
    assert holding(storage, study) == seen
    assert storage.retention.unfinished() == 0


def test_a_file_that_cannot_be_removed_is_tried_again(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = hold(storage)

    def fail(object_id: str) -> None:
        raise PermissionError(13, "not permitted", object_id)

    monkeypatch.setattr(storage.objects, "remove", fail)
    assert storage.retention.remove(holding(storage, study), "it was old")
    assert storage.retention.finish() == storage.retention.unfinished() == 3
    monkeypatch.undo()
    assert storage.retention.finish() == len(files(tmp_path)) == 0


def test_a_sweep_leaves_what_is_held_alone_while_files_are_still_to_be_removed(storage: Storage, tmp_path: Path) -> None:
    gone, stays = hold(storage), hold(storage)
    assert storage.retention.remove(holding(storage, gone), "it was old")
    storage.objects.sweep(storage.index.is_known)
    assert len(files(tmp_path)) == 3
    for instance in storage.index.instances(stays):
        storage.objects.read(instance.stored.object_id)
    with pytest.raises(StorageError):
        storage.objects.read("0" * 32)


def test_peers_that_have_not_taken_results_are_named(storage: Storage) -> None:
    assert holding(storage, hold(storage, delivery="committed")).sent_to == ()
    failed = holding(storage, hold(storage, delivery="failed", deliver_state="failed"))
    assert (failed.waiting_for, failed.sent_to, failed.busy) == ((PACS.ae_title,), (), False)
    waiting = holding(storage, hold(storage, delivery="waiting", deliver_state="queued"))
    assert (waiting.waiting_for, waiting.busy) == ((PACS.ae_title,), True)
