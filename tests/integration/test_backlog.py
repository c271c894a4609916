"""A PACS that is away costs one try at a time, whatever waits for it, and gets all of it once it is back, urgent results first."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lying_pacs import lying_pacs
from waiting_results import AET, Waiting, held

from dicomnode.backlog import Backlogs
from dicomnode.cli import run
from dicomnode.cli.node import SENDER_CONCURRENCY
from dicomnode.completion import retry
from dicomnode.config import EngineSection, NodeSection, Settings
from dicomnode.delivery import Sender
from pacs import wait_until
from storage.records import Backlog, Job

pytestmark = pytest.mark.usefixtures("calm_network_library")

DAY = (30, 60, 300, 900, 1800, *[3600] * 25)
DIVIDED = tuple(seconds / 3600 for seconds in (*DAY, *[3600] * 600))  # a slow machine needs more of its last wait


class Desk(Waiting):
    """A node without a worker: the test works off what the engine would."""

    def __init__(self, folder: Path, url: str, schedule: tuple[float, ...] = (0.0, 3600.0)) -> None:
        super().__init__(folder, url, schedule=schedule)
        settings = Settings(node=NodeSection(data=folder / "data"), engine=EngineSection(retry_schedule_seconds=schedule))
        self.sending = Sender(settings, self.storage, self.client)
        self.backlogs = Backlogs(settings, self.storage, self.client)

    def deliver(self, key: str) -> float | None:
        return self.sending.deliver(key, 0)

    def work_off(self) -> float | None:
        return self.backlogs.work_off(self.deliver, f"resume/{self.backlog.ticket}")

    @property
    def backlog(self) -> Backlog:
        (backlog,) = self.storage.backlogs.backlogs()
        return backlog

    def job(self, key: str) -> Job:
        found = self.storage.jobs.job(key)
        assert found is not None
        return found

    def tickets(self) -> list[str]:
        """What waits on the engine's queues for backlogs."""
        rows = self.client._client.list_workflows(workflow_id_prefix="resume/", status=["ENQUEUED", "DELAYED"])
        return [row.workflow_id.partition("#")[0] for row in rows]


@pytest.fixture
def desk(tmp_path: Path, database_url: str) -> Iterator[Desk]:
    desk = Desk(tmp_path / "node", database_url)
    yield desk
    desk.close()


def test_one_job_finds_the_pacs_away_and_the_others_do_not_even_try(desk: Desk) -> None:
    keys = desk.add(3)
    assert desk.deliver(keys[0]) is None
    assert desk.tickets() == [f"resume/{desk.backlog.ticket}"]
    assert desk.work_off() == pytest.approx(3600, abs=300)  # due at once, and still away
    assert (desk.backlog.tries, desk.job(keys[0]).state) == (2, "queued")
    with lying_pacs(port=desk.port) as pacs:
        assert [desk.deliver(key) for key in keys[1:]] == [None, None]
        assert desk.work_off() == pytest.approx(3600, abs=300)
        assert not pacs.stored
    for key in keys:
        job = desk.job(key)
        assert (job.state, job.reason_code, job.attempts, job.in_backlog) == ("queued", "waiting", 0, True)
        assert f"PACS at 127.0.0.1:{desk.port} cannot be reached: the peer cannot be reached" in (job.reason or "")
        assert job.waiting_since is not None
    assert len(desk.tickets()) == 1


def test_once_it_is_back_it_gets_everything_once_and_urgent_results_first(desk: Desk) -> None:
    routine, urgent = desk.add(6), desk.add(1, priority="stat")
    for key in (*urgent, *routine):
        desk.deliver(key)
    with lying_pacs(port=desk.port) as pacs:
        assert desk.work_off() is None
        assert list(pacs.stored.values()) == [1] * 7
        (first,) = desk.storage.jobs.deliveries(job_key=urgent[0])
        assert next(iter(pacs.stored)) == first.sop_instance_uid
    assert (desk.jobs("done"), desk.storage.backlogs.backlogs(), desk.in_backlog()) == (7, [], 0)


def test_an_urgent_result_waits_for_no_next_try(desk: Desk) -> None:
    routine = desk.add(2)
    for key in routine:
        desk.deliver(key)
    assert desk.work_off() == pytest.approx(3600, abs=300)
    tries = desk.backlog.tries
    (early,) = desk.add(1, priority="stat")
    desk.deliver(early)  # in vain, which puts off no other try
    assert (desk.backlog.tries, desk.backlog.probe, desk.job(early).in_backlog) == (tries, None, True)
    (urgent,) = desk.add(1, priority="stat")
    with lying_pacs(port=desk.port) as pacs:
        assert desk.deliver(urgent) is None
        assert (len(pacs.stored), desk.job(urgent).state) == (1, "done")
        assert desk.work_off() is None  # the others need wait no longer, either
        assert list(pacs.stored.values()) == [1] * 4
    assert desk.jobs("done") == 4


def test_a_pacs_that_goes_again_leaves_the_rest_in_its_backlog(desk: Desk) -> None:
    for key in desk.add(24):
        desk.deliver(key)
    with lying_pacs(port=desk.port) as pacs:
        pacs.leave_after = 5
        assert desk.work_off() is not None
        assert 5 <= len(pacs.stored) < 24
    assert desk.jobs("done") == len(pacs.stored)
    assert desk.in_backlog() == 24 - len(pacs.stored)
    desk.backlogs.send_again(AET)
    with lying_pacs(port=desk.port) as again:
        assert desk.work_off() is None
        assert not set(pacs.stored) & set(again.stored)
    assert desk.jobs("done") == 24


def test_what_a_dying_worker_had_in_hand_is_sent(desk: Desk) -> None:
    (key,) = desk.add(1)
    desk.deliver(key)
    desk.storage.jobs.start(key)  # and it dies
    with lying_pacs(port=desk.port) as pacs:
        assert desk.work_off() is None
        assert list(pacs.stored.values()) == [1]
    assert desk.job(key).state == "done"


def test_a_result_that_the_pacs_does_not_take_now_waits_by_itself(desk: Desk) -> None:
    keys = desk.add(3)
    for key in keys:
        desk.deliver(key)
    (refused,) = (row.sop_instance_uid for row in desk.storage.jobs.deliveries(job_key=keys[0]))
    with lying_pacs(port=desk.port) as pacs:
        pacs.store_status = lambda uid: 0xA700 if uid == refused else 0
        assert desk.work_off() is None
    assert [desk.job(key).state for key in keys] == ["queued", "done", "done"]
    assert not desk.job(keys[0]).in_backlog
    waiting = desk.client._client.list_workflows(workflow_id_prefix=f"{keys[0]}#", status=["ENQUEUED", "DELAYED"])
    assert any(workflow.workflow_id.endswith(".1") for workflow in waiting)


def test_what_has_waited_for_the_whole_schedule_has_failed_and_can_be_sent_again(
    tmp_path: Path, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk(tmp_path / "node", database_url, schedule=(0.0,))
    config = ["--config", str(desk.config)]
    keys = desk.add(2)
    for key in keys:
        desk.deliver(key)
    until = time.monotonic() + 120
    while desk.jobs("failed") < 2 and time.monotonic() < until:
        desk.backlogs._give_up(desk.backlog)
    capsys.readouterr()
    assert run(["delivery", "list", "--state", "failed", "--json", *config]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {row["key"] for row in listed} == set(keys)
    assert {(row["reason_code"], row["failed"], row["objects"]) for row in listed} == {("delivery-failed", 1, 1)}
    assert all(f"{AET} could not be reached since" in row["reason"] for row in listed)
    assert run(["delivery", "retry", "--peer", AET, *config]) == 0
    assert f"2 for {AET}" in capsys.readouterr().out
    assert run(["delivery", "backlog", "--json", *config]) == 0
    (backlog,) = json.loads(capsys.readouterr().out)
    assert (backlog["peer"], backlog["waiting"], backlog["tries"]) == (AET, 2, 0)
    assert run(["delivery", "list", *config]) == 0
    assert run(["delivery", "retry", *config]) == 2
    assert run(["delivery", "retry", "--peer", "NOBODY", *config]) == 2
    with lying_pacs(port=desk.port) as pacs:
        assert desk.work_off() is None
        assert list(pacs.stored.values()) == [1, 1]
    assert desk.jobs("done") == 2
    desk.close()


def test_one_that_is_sent_again_by_hand_is_tried_at_once_and_brings_the_others_along(desk: Desk) -> None:
    keys = desk.add(3)
    for key in keys:
        desk.deliver(key)
    desk.work_off()  # in vain: the next try is an hour away
    former = desk.backlog.ticket
    with lying_pacs(port=desk.port) as pacs:
        retry(desk.storage, desk.client, desk.job(keys[2]))
        assert desk.deliver(keys[2]) is None
        assert desk.job(keys[2]).state == "done"
        assert desk.backlogs.work_off(desk.deliver, f"resume/{former}") is None  # it is void, and did nothing
        assert len(pacs.stored) == 1
        assert desk.work_off() is None
    assert desk.jobs("done") == 3


def test_waiting_results_hold_no_thread_and_no_socket(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path / "node", schedule=DIVIDED, poll_seconds=0.05)
    with waiting.sender() as sender:
        waiting.add(4)
        waiting.wait_for_backlog(4)
        with lying_pacs(port=waiting.port):
            wait_until(lambda: waiting.jobs("done") == 4, what="the first deliveries", log=waiting.log)
        few = most_held(waiting, sender.pid, 10)
        many = most_held(waiting, sender.pid, 50)
        assert many[0] - few[0] <= 3 * SENDER_CONCURRENCY  # those of the engine's pool, which come one by one
        assert many[1] == few[1]
        with lying_pacs(port=waiting.port) as pacs:
            wait_until(lambda: waiting.jobs("done") == waiting.count, seconds=600, what="all deliveries", log=waiting.log)
            assert len(pacs.stored) == waiting.count - 4
    assert sender.returncode == 0
    waiting.close()


def most_held(waiting: Waiting, pid: int, count: int) -> tuple[int, int]:
    """The fewest threads and sockets that the sender holds while so many more results wait: what a try holds for a moment is none of it."""
    waiting.add(count)
    waiting.wait_for_backlog(waiting.count - 4)
    looks = []
    for _ in range(40):
        looks.append(held(pid))
        time.sleep(0.05)
    return min(look.threads for look in looks), min(look.sockets for look in looks)
