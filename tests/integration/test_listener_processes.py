"""Several listener processes share one port; another node on that port is told, instead of taking its associations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dimse_cases import CT, EXPLICIT, a_dataset, associate, closing_connections, encoded, store

from pacs import free_port, tail, wait_until
from storage import open_storage
from storage.records import Peer

PAIRS = [(CT, EXPLICIT)]


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    file = tmp_path / "dicomnode.toml"
    file.write_text(f"[listener]\nport = {free_port()}\nprocesses = 2\n[storage]\nreserve_bytes = 0\n", encoding="utf-8")
    return file


def run_receiver(configuration: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        command = [sys.executable, "-m", "dicomnode", "run", "receiver", "--config", configuration]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


@pytest.fixture
def receiver(configuration: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    log = tmp_path / "log"
    process = run_receiver(configuration, log)
    wait_until(lambda: log.read_bytes().count(b'"listening"') == 2, what="two processes to listen", log=log)
    yield process
    if process.poll() is None:
        process.terminate()
    assert process.wait(120) == 0, tail(log)


def children_of(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_two_processes_take_studies_on_one_port_and_one_of_them_may_die(receiver, configuration, tmp_path):
    port = int(configuration.read_text(encoding="utf-8").split("port = ")[1].split()[0])
    storage = open_storage(f"sqlite:///{tmp_path / 'data' / 'dicomnode.sqlite'}", tmp_path / "data")
    storage.registry.add_peer(Peer(ae_title="SCANNER", host="127.0.0.1", port=104, sends=True, receives=False, tls=False, client_cert=None))
    first, second = children_of(receiver)
    with closing_connections():
        sent = [a_dataset() for _ in range(8)]
        for dataset in sent:
            association = associate(port, PAIRS)
            assert store(association, encoded(dataset), uid=dataset.SOPInstanceUID).Status == 0
            association.release()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: first not in children_of(receiver), what="the death of a process to be noticed")
        association = associate(port, PAIRS)  # whatever the other one is doing
        assert association.is_established
        association.release()
    assert second in children_of(receiver)
    assert all(storage.index.find(dataset.SOPInstanceUID) is not None for dataset in sent)
    storage.database.close()


def test_a_second_node_on_the_port_is_refused_with_a_sentence(receiver, configuration, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "dicomnode.toml").write_text(configuration.read_text(encoding="utf-8"), encoding="utf-8")
    log = tmp_path / "other.log"
    assert run_receiver(other / "dicomnode.toml", log).wait(120) == 1
    assert "cannot listen on 127.0.0.1" in tail(log)
    assert "Traceback" not in tail(log)
