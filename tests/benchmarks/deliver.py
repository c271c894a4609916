"""What results hold that wait for a PACS which is away, and how soon they are there once it is back.

Each result is the one of a study and a deliver job of its own. As many, but no more than 2,000, come beforehand, so that what grows to a
bound whatever waits is there already: the engine's pool of threads, and the page caches of the connections to SQLite. Then nobody listens
again, and the sender, a process of its own, is measured with 0 results that wait, with 1, with a tenth and with all of them: what it
holds between two tries of the PACS, and at most, for a try has a connection and its threads. Then the PACS is back.

The engine's pool may grow later still, when by chance more of its work overlaps than ever before: so threads are compared with those at
rest before any work and a full pool.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # measure this tree, wherever the package may be installed from

from lying_pacs import lying_pacs  # noqa: E402  after the path is set, like the rest
from waiting_results import Held, Waiting, held  # noqa: E402

from dicomnode.cli.node import SENDER_CONCURRENCY  # noqa: E402
from pacs import wait_until  # noqa: E402

WARM = (50, 2000)  # results that come beforehand, at least and at most
SLOW_SECONDS = 0.05  # the PACS takes for an object of these: so the engine has all its work at a time
SCHEDULE = (0.1, 0.2, 1.0, 3.0, 6.0, *[12.0] * 300)  # the default divided by 300, with more of its last wait: adding results takes time
SETTLE_SECONDS = 15.0
TRY_SOCKETS, TRY_THREADS = 1, 2  # the connection; that of the association, and one of the engine's pool
POOL = 3 * SENDER_CONCURRENCY  # threads of the engine: each of its queues has so much work at a time
KILOBYTE_GOAL = 1.0  # of memory for a result that waits
PATIENCE = 7200.0


def measured(waiting: Waiting, pid: int, count: int, added_seconds: float) -> dict[str, float]:
    """Let the sender come to rest, then look at it several times: what each look finds is held, the highest number is the most."""
    time.sleep(SETTLE_SECONDS)
    before = held(pid)
    looks: list[Held] = []
    began = time.monotonic()
    for _ in range(30):
        looks.append(held(pid))
        time.sleep(0.5)
    cpu = (looks[-1].cpu_seconds - before.cpu_seconds) / (time.monotonic() - began)
    row: dict[str, float] = {"waiting": count}
    for name in ("threads", "sockets", "rss_bytes"):
        seen = [asdict(look)[name] for look in looks]
        row |= {name: min(seen), f"most_{name}": max(seen)}
    database = Path(waiting.storage.database.file or "").stat().st_size
    return {**row, "database_bytes": database, "cpu_share": round(cpu, 4), "seconds_until_they_waited": round(added_seconds, 1)}


def warm_up(waiting: Waiting, count: int) -> None:
    """Half of these results wait and are taken, the others are taken at once and slowly."""
    waiting.add(count // 2)
    waiting.wait_for_backlog(count // 2, PATIENCE)
    with lying_pacs(port=waiting.port) as pacs:
        pacs.store_status = lambda _uid: time.sleep(SLOW_SECONDS) or 0
        for part in (0, count - count // 2):
            waiting.add(part)
            wait_until(lambda: waiting.jobs("done") == waiting.count, seconds=PATIENCE, what="the first deliveries", log=waiting.log)


def run(count: int, folder: Path) -> dict[str, object]:
    """Measure, and return all that was seen."""
    rows = []
    with closing(Waiting(folder / "site", schedule=SCHEDULE)) as waiting, waiting.sender() as sender:
        wait_until(lambda: held(sender.pid).sockets > 0, seconds=PATIENCE, what="the engine's event loop", log=waiting.log)
        time.sleep(SETTLE_SECONDS)
        at_rest = held(sender.pid).threads
        warm_up(waiting, max(WARM[0], min(WARM[1], count)))
        rows.append(measured(waiting, sender.pid, 0, 0.0))
        for number in (1, count // 10, count):
            began = time.monotonic()
            waiting.add(number - waiting.in_backlog())
            waiting.wait_for_backlog(number, PATIENCE)
            rows.append(measured(waiting, sender.pid, number, time.monotonic() - began))
        before, began = held(sender.pid), time.monotonic()
        with lying_pacs(port=waiting.port) as pacs:
            wait_until(lambda: waiting.jobs("done") == waiting.count, seconds=PATIENCE, what="all", log=waiting.log, every=0.5)
            seconds = time.monotonic() - began
            copies = max(pacs.stored.values())
            taken = len(pacs.stored)
        after = held(sender.pid)
    return {
        "threads_before_any_work": at_rest,
        "rows": rows,
        "results": count,
        "seconds_until_all_were_delivered": round(seconds, 1),
        "sender_cpu_seconds_for_that": round(after.cpu_seconds - before.cpu_seconds, 1),
        "results_the_pacs_has": taken,
        "most_copies_of_one": copies,
        "after": asdict(after),
    }


def main() -> int:
    """Run, and print the goals as the last line; 3 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deliver-") as folder:
        content = run(arguments.results, Path(folder))
    none, _, _, last = content["rows"]  # type: ignore[misc]
    each = (last["most_rss_bytes"] - none["most_rss_bytes"]) / arguments.results / 1000
    content["kilobytes_per_waiting_result"] = round(each, 3)
    goals = {
        "threads beyond those at rest and a full pool": (max(0, last["threads"] - content["threads_before_any_work"] - POOL), 0),  # type: ignore[operator]
        "sockets more than with none waiting": (last["sockets"] - none["sockets"], 0),
        "threads more while the PACS is tried": (last["most_threads"] - last["threads"], TRY_THREADS),
        "sockets more while the PACS is tried": (last["most_sockets"] - last["sockets"], TRY_SOCKETS),
        "kilobytes for a waiting result": (round(each, 3), KILOBYTE_GOAL),
        "results not delivered once": (arguments.results - content["results_the_pacs_has"] + (content["most_copies_of_one"] - 1), 0),  # type: ignore[operator]
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(content, indent=2), encoding="utf-8")
    print(json.dumps(content, indent=2))
    print(json.dumps({name: {"measured": value, "goal": goal, "met": value <= goal} for name, (value, goal) in goals.items()}))
    return 0 if all(value <= goal for value, goal in goals.values()) else 3


if __name__ == "__main__":
    sys.exit(main())
