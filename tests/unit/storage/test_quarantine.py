from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from storage import Storage
from storage.records import StoredObject

Stored = Callable[[int], StoredObject]


def refuse(
    storage: Storage, stored: StoredObject | None, *, uid: str = "1.2.3", status: int = 0xC003, reason: str = "other content"
) -> bool:
    return storage.index.quarantine(
        sop_instance_uid=uid, study_instance_uid="1.2", calling_ae_title="SCANNER", dimse_status=status, reason=reason, stored=stored
    )


def test_what_is_quarantined_is_shown_with_who_sent_it_and_why(storage: Storage, stored: Stored) -> None:
    assert refuse(storage, stored(1))
    shown = storage.index.quarantined("1.2")
    assert shown == storage.index.quarantined()
    assert [(q.sop_instance_uid, q.calling_ae_title, q.dimse_status, q.reason, q.stored, q.repeats) for q in shown] == [
        ("1.2.3", "SCANNER", 0xC003, "other content", stored(1), 0)
    ]
    assert storage.index.quarantined("9.9") == []


def test_one_copy_is_kept_of_each_content(storage: Storage, stored: Stored) -> None:
    assert refuse(storage, stored(1))
    assert not refuse(storage, stored(1))
    assert not refuse(storage, stored(1))
    assert refuse(storage, stored(2))
    assert [(q.stored, q.repeats) for q in storage.index.quarantined()] == [(stored(1), 2), (stored(2), 0)]


def test_ten_copies_are_kept_of_each_uid_and_the_rest_is_counted(storage: Storage, stored: Stored) -> None:
    assert [refuse(storage, stored(n)) for n in range(13)] == [True] * 10 + [False] * 3
    assert refuse(storage, stored(99), uid="1.2.4")
    *kept, counted, other = storage.index.quarantined()
    assert len(kept) == 10
    assert (counted.stored, counted.repeats) == (None, 2)
    assert other.sop_instance_uid == "1.2.4"


def test_refusals_with_nothing_kept_are_one_row_per_status(storage: Storage) -> None:
    for _ in range(5):
        assert not refuse(storage, None, status=0xA900)
    assert not refuse(storage, None, status=0xC001)
    assert [(q.dimse_status, q.stored, q.repeats) for q in storage.index.quarantined()] == [(0xA900, None, 4), (0xC001, None, 0)]


def test_the_limit_holds_when_many_threads_bring_one_uid(storage: Storage, stored: Stored) -> None:
    barrier = threading.Barrier(8)

    def bring(thread: int) -> int:
        barrier.wait(120)
        return sum(refuse(storage, stored(number)) for number in range(thread, thread + 8))

    with ThreadPoolExecutor(8) as pool:
        kept = sum(pool.map(bring, range(8)))
    digests = [q.stored.sha256 for q in storage.index.quarantined() if q.stored]
    assert kept == len(digests) == len(set(digests)) == 10


def test_no_uid_however_malformed_keeps_a_refusal_from_being_noted(storage: Storage) -> None:
    for uid in ("", "\0", "\udcff", "'; DROP TABLE instance; --", "1" * 1000, "é"):
        refuse(storage, None, uid=uid)
    assert sum(1 + q.repeats for q in storage.index.quarantined()) == 6
