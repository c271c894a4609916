"""SIGKILL of a receiver at each step of reception: nothing acknowledged is lost or altered, nothing half is seen or left."""

from __future__ import annotations

import random
import signal
import threading
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import crash_points
import pytest
import raw_dicom as raw
import reception_node
from dimse_cases import split_part10
from raw_dicom import Ended, Image, association
from receiver_process import assert_no_stray_file, assert_stored, images, object_files, scanner, stored_uids

from dicomnode.config import Settings
from pacs import free_port, wait_until
from storage import open_storage, prepare_storage

CASES = [*crash_points.RECEPTION_CUTS, *crash_points.RECEPTION_POINTS]
PIXEL_BYTES = 60_000


class Receiver:
    """A receiver's process, forked from a server that has everything imported."""

    def __init__(self, settings: Settings, context: ForkServerContext, point: str | None) -> None:
        self._signals = reception_node.Signals(context.Event(), context.Event(), context.Event())
        self.process: Any = context.Process(target=reception_node.run_receiver, args=(settings, point, self._signals), daemon=True)
        self.process.start()
        wait_until(lambda: self._signals.up.is_set() or not self.process.is_alive(), what="the receiver to start", every=0.01)
        assert self.process.is_alive(), "the receiver did not start"

    def arm(self) -> None:
        """Let it die at its point from now on."""
        self._signals.arm.set()
        assert self._signals.armed.wait(120)

    def wait_for_death(self) -> None:
        self.process.join(120)
        assert self.process.exitcode == -signal.SIGKILL, "the point was never reached"

    def kill(self) -> None:
        self.process.kill()
        self.process.join(120)


def test_a_receiver_killed_at_each_step_loses_and_leaves_nothing(tmp_path: Path, fork_server: ForkServerContext) -> None:
    kill(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", fork_server, CASES)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_receiver_killed_fifty_times_at_a_step_loses_and_leaves_nothing(
    tmp_path: Path, database_url: str, fork_server: ForkServerContext, case: str
) -> None:
    kill(tmp_path, database_url, fork_server, [case] * 50)


def kill(folder: Path, database_url: str, fork_server: ForkServerContext, plan: list[str]) -> None:
    """Start a receiver and kill it as the plan says, again and again; after each start everything must be as it should."""
    settings = Settings.model_validate(
        {
            "node": {"data": folder / "data"},
            "listener": {"port": free_port()},
            "storage": {"database_url": database_url, "reserve_bytes": 0},
        }
    )
    prepare_storage(settings.database_url, settings.data_folder)
    storage = open_storage(settings.database_url, settings.data_folder)
    storage.registry.add_peer(scanner())
    chance = random.Random(plan[0])
    everything: list[Image] = []
    pending: list[Image] = []
    unanswered = answered = 0
    for number, case in enumerate([*plan, None]):
        receiver = Receiver(settings, fork_server, case)
        try:
            assert_no_stray_file(storage, settings.data_folder)  # the start has swept
            assert raw.send_images(settings.listener.port, pending) == uids(pending), "sending again is idempotent"
            assert_stored(storage, pending)
            assert stored_uids(storage) == uids(everything)
            assert_no_stray_file(storage, settings.data_folder)
            if case is None:
                break
            pending = images(3, pixel_bytes=PIXEL_BYTES, study=f"1.2.3.4.{number}")
            everything += pending
            receiver.arm()
            acknowledged = send_into_death(case, receiver, settings.listener.port, pending, chance)
        finally:
            receiver.kill()
        stored = stored_uids(storage) & uids(pending)
        assert acknowledged <= stored, f"an acknowledged image is gone: {case}"
        assert len(stored - acknowledged) <= 1, case
        assert_stored(storage, [image for image in pending if image.sop_instance_uid in stored])
        assert_whole_files(settings, everything)
        answered += len(acknowledged)
        unanswered += len(stored - acknowledged)
    assert storage.index.quarantined() == []
    storage.database.close()
    print(f"{len(plan)} kills, {plan[0]}…: {answered} images acknowledged before, all there; {unanswered} stored without an answer")


def send_into_death(case: str, receiver: Receiver, port: int, study: list[Image], chance: random.Random) -> set[str]:
    """Send the study until the receiver is dead; return what it acknowledged."""
    if case in crash_points.RECEPTION_POINTS:
        acknowledged = raw.send_images(port, study)
        receiver.wait_for_death()
        return acknowledged
    if case == "at any moment":
        end = threading.Timer(chance.uniform(0.0, 0.06), receiver.kill)
        end.start()
        acknowledged = raw.send_images(port, study)
        end.join()
        return acknowledged
    first, second, _ = study
    part = raw.store_command(second)[:40] if case == "amid the command set" else raw.store_request(second)[: PIXEL_BYTES // 2]
    with association(port) as connection:
        assert connection.store(first).status == 0
        connection.send(part)
        time.sleep(0.05)  # so that it was read
        receiver.kill()
        with pytest.raises(Ended):
            connection.read()
    return {first.sop_instance_uid}


def uids(study: list[Image]) -> set[str]:
    return {image.sop_instance_uid for image in study}


def assert_whole_files(settings: Settings, sent: list[Image]) -> None:
    """Fail if a file under a final name, with a row or without, holds anything but the whole data set of an image that was sent."""
    whole = {image.dataset for image in sent}
    for path in object_files(settings.data_folder)[0].values():
        assert split_part10(path.read_bytes())[1] in whole
