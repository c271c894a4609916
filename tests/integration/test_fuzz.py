"""What strangers' bytes do to reception: the corpus of the fuzzer, a little fuzzing, and the corpus over a real connection."""

from __future__ import annotations

import importlib.util
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from fuzz import fuzz_reception as fuzz

from dicomnode.config import ListenerSection, NodeSection, Settings
from dicomnode.receiver import Receiver
from storage import open_storage, prepare_storage
from storage.records import Peer

SCRIPT = Path(fuzz.__file__)
CORPUS = sorted(path for path in fuzz.CORPUS.glob("*/*") if path.is_file())


@pytest.fixture
def _as_the_fuzzer() -> Iterator[None]:
    """Watch the log for failures of the node, as the fuzzer does."""
    configuration = structlog.get_config()
    fuzz.prepare()
    yield
    structlog.configure(**configuration)
    logging.disable(logging.NOTSET)


def test_the_corpus_is_small_and_has_each_target():
    assert {path.parent.name for path in CORPUS} == set(fuzz.TARGETS)
    assert sum(path.stat().st_size for path in CORPUS) < 300_000


@pytest.mark.usefixtures("_as_the_fuzzer")
@pytest.mark.filterwarnings("ignore::UserWarning")  # as the node does: pydicom's quote what came
@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_no_input_of_the_corpus_does_any_harm(path):
    fuzz.TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.usefixtures("_as_the_fuzzer")
def test_a_context_without_abstract_syntax_is_answered_with_an_abort():
    request = fuzz.association_request((fuzz.CT, fuzz.SYNTAXES[1]))
    peer = fuzz.Peer(request.replace(b"\x30\x00", b"\x31\x00", 1), chunk=4096, end=0)
    fuzz.serve(peer)
    assert peer.answer == bytes.fromhex("0700000000040000 0206")  # by the provider: invalid PDU parameter value


@pytest.mark.usefixtures("_as_the_fuzzer")
@pytest.mark.parametrize(
    "title", [b"SCANNER\r\n", b"\nSCANNER", b"SCANNER\0", b"\tSCANNER", b"SCAN\0NER", b"SCANNER\x85", b"SC\xc3\x84NNER", b"\0" * 16]
)
@pytest.mark.parametrize("offset", [10, 26], ids=["called", "calling"])
def test_an_ae_title_with_a_character_that_it_cannot_have_is_nobodys(title, offset):
    request = bytearray(fuzz.association_request((fuzz.CT, fuzz.SYNTAXES[1])))
    request[offset : offset + 16] = title.ljust(16)
    peer = fuzz.Peer(bytes(request) + fuzz.RELEASE, chunk=4096, end=0)
    fuzz.serve(peer)
    assert peer.answer[0] in {3, 7}  # rejected, or aborted as malformed


def run_fuzzer(target: str, seconds: int, tmp_path: Path) -> int:
    """Fuzz for so long, and return how many inputs were tried."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (it has wheels for Linux on x86_64 only)")
    command = [sys.executable, str(SCRIPT), target, "--seconds", str(seconds), "--artifacts", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 240)
    found = {path.name: path.read_bytes().hex() for path in tmp_path.iterdir()}
    assert (done.returncode, found) == (0, {}), done.stderr[-3000:]
    units = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert units is not None, done.stderr[-3000:]
    return int(units[1])


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_little_fuzzing_finds_nothing(target, tmp_path):
    assert run_fuzzer(target, 3, tmp_path) > 0  # how many says how busy the machine is


@pytest.mark.long
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_ten_minutes_of_fuzzing_find_nothing(target, tmp_path):
    assert run_fuzzer(target, 600, tmp_path) > 10_000


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_after_the_corpus_came_over_the_network_only_whole_objects_are_stored(tmp_path):
    """Each input as a connection of its own to a real receiver, which then still stores an image."""
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    prepare_storage(url, tmp_path)
    storage = open_storage(url, tmp_path)
    storage.registry.add_peer(Peer(ae_title="SCANNER", host="127.0.0.1", port=104, sends=True, receives=False, tls=False, client_cert=None))
    settings = ListenerSection(port=0, accept_deflated=True, association_seconds=1, pdu_seconds=1, dimse_timeout_seconds=1)
    receiver = Receiver(Settings(node=NodeSection(data=tmp_path), listener=settings), storage)
    receiver.start()
    whole = next(path for path in CORPUS if path.name == "store").read_bytes().replace(b"1.2.3\0", b"1.2.9\0")  # a new instance
    inputs = [path for path in CORPUS if path.parent.name == "pdu"]
    sent = [fuzz.connection_bytes(data)[0] for data in (*(path.read_bytes() for path in inputs), whole)]
    statuses = [fuzz.check_answer(_converse(receiver.port, data)) for data in sent]
    receiver.stop(drain_seconds=0)
    assert statuses[-1] == [0]
    files = [path for path in (tmp_path / "objects").rglob("*") if path.is_file() and path.suffix != ".lock"]
    objects = [path.name.removesuffix(".dcm") for path in files]
    instance = storage.index.find("1.2.9")
    known = storage.index.is_known(objects)
    storage.database.close()
    assert {status for answer in statuses for status in answer} <= fuzz.DOCUMENTED
    assert instance is not None
    assert known == set(objects)  # stored or quarantined, and nothing of what was cut off


def _converse(port: int, data: bytes) -> bytes:
    """Send bytes, and return all that is answered before the node closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        answer = bytearray()
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            pass
        return bytes(answer)
