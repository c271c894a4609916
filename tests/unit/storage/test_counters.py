from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from storage import Storage


def test_counts_add_up_over_calls(storage: Storage) -> None:
    assert storage.counters.all() == {}
    storage.counters.add({})
    storage.counters.add({"stored": 2, "refused": 1})
    storage.counters.add({"stored": 2**33})
    assert storage.counters.all() == {"refused": 1, "stored": 2**33 + 2}


def test_no_addition_is_lost_among_threads_that_add_in_any_order(storage: Storage) -> None:
    names = [f"count {number}" for number in range(5)]

    def add(thread: int) -> None:
        for _ in range(10):
            storage.counters.add(dict.fromkeys(names if thread % 2 else reversed(names), 1))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(6)))
    assert storage.counters.all() == dict.fromkeys(names, 60)
