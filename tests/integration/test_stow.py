"""Results on their way by STOW-RS: to the node's own DICOMweb, and to peers that answer in every way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from dimse_cases import CT, EXPLICIT, a_dataset, split_part10
from waiting_results import AET, Waiting

from certificates import Authority
from dicomnode.admission import hash_passcode
from dicomnode.cli import run
from dicomnode.completion import retry
from dicomnode.config import load_settings
from dicomnode.delivery import Sender
from dicomnode.dimse.scu import Outgoing
from dicomnode.errors import PeerUnavailable
from dicomnode.stow import post_each, reach
from dicomweb_site import HOST, PATIENCE_SECONDS, Site, deciding, file_of, serving
from pacs import free_port, http_server
from storage.records import Peer


def at(url: str, **values: Any) -> Peer:
    known = {"sends": False, "receives": True, "tls": False, "client_cert": None, "host": HOST, "port": 80, "stow_url": url}
    return Peer(ae_title="CLOUD", **(known | values))


def outgoing(folder: Path, count: int = 1, **attributes: Any) -> list[Outgoing]:
    made = []
    for number in range(count):
        dataset = a_dataset(InstanceNumber=number + 1, **attributes)
        path = folder / f"{dataset.SOPInstanceUID}.dcm"
        path.write_bytes(file_of(dataset))
        made.append(Outgoing(sop_class_uid=CT, sop_instance_uid=dataset.SOPInstanceUID, transfer_syntax_uid=EXPLICIT, path=path))
    return made


def outcomes(peer: Peer, objects: list[Outgoing], **arguments: Any) -> list[tuple[str, int | None, bool]]:
    return [(outcome.state, outcome.status, outcome.is_away) for outcome in post_each(peer, objects, **arguments)]


def test_what_is_sent_is_what_is_stored(small: Site, tmp_path: Path) -> None:
    objects = outgoing(tmp_path, 3)
    assert outcomes(at(small.url), objects) == [("sent", 0, False)] * 3
    for item in objects:
        (held,) = small.storage.query.held({"SOPInstanceUID": item.sop_instance_uid}, limit=2)
        assert split_part10(small.storage.objects.read(held.object_id))[1] == split_part10(item.path.read_bytes())[1]
    assert outcomes(at(small.url), objects) == [("sent", 0, False)] * 3, "what the peer has is no failure"
    reach(at(small.url))
    changed = a_dataset(SOPInstanceUID=objects[0].sop_instance_uid, PatientID="P2")
    objects[0].path.write_bytes(file_of(changed))
    gone = replace(objects[1], path=tmp_path / "gone.dcm")
    assert outcomes(at(small.url), [objects[0], gone, objects[2]]) == [
        ("permanent", 0xC003, False),
        ("permanent", None, False),
        ("sent", 0, False),
    ]


def answer_of(reason: int, tag: str = "00081198") -> bytes:
    return json.dumps({tag: {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [reason]}}]}}).encode()


STORED = b'{"00081199": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": ["SENT"]}}]}}'


@contextmanager
def answering(status: int, body: bytes = b"", **headers: str) -> Iterator[tuple[str, list[str]]]:
    """A DICOMweb that reads what it is sent and always answers the same; yield its address and the requests' Authorization."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, the name is the base class's
            """Say nothing."""

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.headers.get("Authorization", ""))
            uid = sent[sent.index(b"DICM") :].split(b"\x03\x00UI", 1)[1][2:].split(b"\x02\x00\x10\x00")[0].rstrip(b"\x00")
            answer = body.replace(b"SENT", uid)
            if status == 0:
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

    with http_server(Handler) as address:
        yield f"{address}/dicom-web", seen


@pytest.mark.parametrize(
    ("status", "body", "expected", "requests"),
    [
        (200, b"", ("permanent", None, False), 2),
        (200, b"<NativeDicomModel/>", ("permanent", None, False), 2),
        (200, STORED.replace(b"SENT", b"1.2.3"), ("permanent", None, False), 2),
        (200, STORED, ("sent", 0, False), 2),
        (202, answer_of(0xA700), ("transient", 0xA700, False), 2),
        (409, answer_of(0x0110), ("transient", 0x0110, False), 2),
        (409, answer_of(0x0122), ("permanent", 0x0122, False), 2),
        (200, answer_of(0xC122, "0008119A"), ("permanent", 0xC122, False), 2),
        (409, b"", ("permanent", None, False), 2),
        (400, b"", ("permanent", None, False), 2),
        (404, b"x" * 3_000_000, ("permanent", None, False), 2),
        (415, b"", ("permanent", None, False), 2),
        (307, b"", ("permanent", None, False), 2),
        (500, b"", ("transient", None, False), 2),
        (0, b"", ("transient", None, False), 2),
        (401, b"", ("transient", None, True), 1),
        (503, b"", ("transient", None, True), 1),
    ],
)
def test_each_answer_has_its_class(tmp_path: Path, status: int, body: bytes, expected: tuple[str, int | None, bool], requests: int) -> None:
    with answering(status, body, Location="http://elsewhere.example/") as (url, seen):
        assert outcomes(at(url), outgoing(tmp_path, 2)) == [expected] * 2
    assert len(seen) == requests, "where nobody is let in or it is busy, nothing more is sent"


def test_a_peer_that_is_away_is_tried_once(tmp_path: Path) -> None:
    peer = at(f"http://{HOST}:{free_port()}")
    assert outcomes(peer, outgoing(tmp_path, 3)) == [("transient", None, True)] * 3
    with pytest.raises(PeerUnavailable, match="no answer"):
        reach(peer)


def test_credentials_are_read_at_each_request(tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    with answering(200, STORED) as (url, seen):
        peer = at(url, stow_credentials=str(file))
        assert outcomes(peer, outgoing(tmp_path)) == [("transient", None, True)]
        for line in ("Bearer abc.def", "reader:pässword"):
            file.write_text(line + "\n", encoding="utf-8")
            assert outcomes(peer, outgoing(tmp_path)) == [("sent", 0, False)]
        file.write_text("nothing of the kind", encoding="utf-8")
        assert outcomes(peer, outgoing(tmp_path)) == [("transient", None, True)]
    assert seen == ["Bearer abc.def", "Basic cmVhZGVyOnDDpHNzd29yZA=="]


def test_over_tls_each_side_shows_its_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    pacs, node, other = (authority.issue(name) for name in ("pacs", "node", "other"))
    sender = Peer(
        ae_title="NODE",
        host=HOST,
        port=104,
        sends=True,
        receives=False,
        tls=True,
        client_cert=node.sha256,
        passcode_hash=hash_passcode("x"),
        user="n",
    )
    credentials = tmp_path / "credentials"
    credentials.write_text("n:x", encoding="utf-8")
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    with serving(tmp_path, url, sender, certificates=authority.settings(pacs), tls="mutual", credentials=True) as site:
        secure = site.url.replace("http:", "https:")
        peer = at(secure, tls=True, client_cert=pacs.sha256, stow_credentials=str(credentials))
        objects = outgoing(tmp_path)
        wrong = [
            (peer, authority.settings(other)),  # not the certificate that the peer knows
            (replace(peer, client_cert=other.sha256), authority.settings(node)),  # not the one that the node knows
            (replace(peer, tls=False), authority.settings(node)),  # not of an authority that the world knows
        ]
        for called, certificate in wrong:
            assert outcomes(called, objects, tls=certificate) == [("transient", None, True)]
        assert outcomes(peer, objects) == [("permanent", None, False)], "without a certificate of the node's own"
        assert outcomes(peer, objects, tls=authority.settings(node), timeout_seconds=PATIENCE_SECONDS) == [("sent", 0, False)]


def test_a_delivery_by_stow_ends_waits_and_fails_as_one_by_c_store_does(tmp_path: Path) -> None:
    with closing(Waiting(tmp_path / "node", schedule=(60.0, 60.0))) as waiting:
        settings = load_settings(waiting.config, {})
        sender = Sender(settings, waiting.storage, waiting.client)

        def delivered(key: str, url: str) -> tuple[str, str, str | None]:
            """Deliver once to that address; return the states of job and delivery, and what the job says."""
            waiting.storage.registry.add_peer(replace(at(url), ae_title=AET))
            sender.deliver(key, 0)
            job, (delivery,) = waiting.storage.jobs.job(key), waiting.storage.jobs.deliveries(job_key=key)
            assert job is not None
            return job.state, delivery.state, job.reason

        done, refused, busy, away = waiting.add(4)
        with serving(tmp_path / "pacs", f"sqlite:///{tmp_path / 'pacs' / 'node.sqlite'}") as site:
            assert delivered(done, site.url)[:2] == ("done", "sent")
            assert len(site.storage.query.held({"StudyInstanceUID": "1.2.3.4"}, limit=9)) == 1
        with answering(409, answer_of(0x0122)) as (url, _):
            state, of_object, reason = delivered(refused, url)
            assert (state, of_object) == ("failed", "failed")
            assert "failure reason 0x0122" in str(reason)
        with answering(202, answer_of(0xA700)) as (url, _):
            assert delivered(busy, url)[:2] == ("queued", "waiting")
        state, of_object, reason = delivered(away, f"http://{HOST}:{free_port()}")
        assert (state, of_object) == ("queued", "waiting")
        assert "cannot be reached: no answer" in str(reason)


@dataclass
class Delivering:
    """A node whose sender works off one delivery to a DICOMweb that says what it has."""

    waiting: Waiting
    sender: Sender
    key: str

    def until_it_ends(self, url: str) -> tuple[str, str, str | None]:
        """Deliver to this address as often as the job asks for; return the states of job and delivery, and what the job says."""
        self.waiting.storage.registry.add_peer(replace(at(url), ae_title=AET, commits=True))
        attempt = 0
        for _ in range(20):
            wait = self.sender.deliver(self.key, attempt)
            attempt = 0 if wait is None else attempt + 1  # a report that misses something draws a new ticket
            job, (delivery,) = self.waiting.storage.jobs.job(self.key), self.waiting.storage.jobs.deliveries(job_key=self.key)
            assert job is not None
            if job.state != "queued":
                break
        return job.state, delivery.state, job.reason


@pytest.fixture
def delivering(tmp_path: Path) -> Iterator[Delivering]:
    with closing(Waiting(tmp_path / "node", schedule=(0.0, 0.0, 0.0))) as waiting:
        key = waiting.add(5)[4]  # which is of the study that the object says it is of, 1.2.3.4
        yield Delivering(waiting, Sender(load_settings(waiting.config, {}), waiting.storage, waiting.client), key)


def test_a_dicomweb_that_is_to_prove_receipt_is_asked_for_what_it_was_sent(delivering: Delivering, tmp_path: Path) -> None:
    with serving(tmp_path / "pacs", f"sqlite:///{tmp_path / 'pacs' / 'node.sqlite'}") as site:
        assert delivering.until_it_ends(site.url) == ("done", "committed", None)
    (asked,) = delivering.waiting.storage.commitments.commitments(job_key=delivering.key)
    assert asked.state == "answered"


def test_what_a_dicomweb_does_not_show_is_sent_again_and_shown_or_has_failed(delivering: Delivering) -> None:
    looks = iter([False, False])
    with deciding(lambda _dataset: None, lambda _uid: next(looks, True)) as (url, stored):
        assert delivering.until_it_ends(url)[:2] == ("done", "committed")
        assert len(stored) == 3


@pytest.mark.parametrize(
    ("shows", "state", "said"), [(False, "failed", "not committed to by PACS"), (403, "sent", "its QIDO-RS answers with HTTP 403")]
)
def test_a_dicomweb_that_never_shows_a_result_ends_in_a_failure_that_can_be_replayed(
    delivering: Delivering, shows: int | bool, state: str, said: str
) -> None:
    with deciding(lambda _dataset: None, lambda _uid: shows) as (url, stored):
        job, of_object, reason = delivering.until_it_ends(url)
        assert (job, of_object) == ("failed", state)
        assert said in str(reason)
    sent = len(stored)
    with deciding(lambda _dataset: None) as (url, again):
        again.extend(stored)
        job_row = delivering.waiting.storage.jobs.job(delivering.key)
        assert job_row is not None
        retry(delivering.waiting.storage, delivering.waiting.client, job_row)
        assert delivering.until_it_ends(url)[:2] == ("done", "committed")
        assert len(again) == sent + (state == "failed")


REFUSED = (
    (("--stow", "ftp://x/"), "http://HOST"),
    (("--stow", "http://user@x/"), "without a user"),
    (("--stow", "http://x:99999/"), "no URL"),
    (("PACS.example", "104", "--stow-credentials", "file"), "needs --stow"),
    ((), "HOST and PORT"),
)


def test_a_peer_of_stow_is_added_by_its_address_or_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configuration = tmp_path / "dicomnode.toml"
    configuration.write_text("", encoding="utf-8")
    common = ["peer", "add", "CLOUD", "--receives", "--config", str(configuration)]
    for words, said in REFUSED:
        assert run([*common, *words]) == 2
        assert said in capsys.readouterr().err
    assert run([*common, "--stow", "https://pacs.example/rs/", "--stow-credentials", "token"]) == 0
    capsys.readouterr()
    assert run(["peer", "list", "--json", "--config", str(configuration)]) == 0
    (peer,) = json.loads(capsys.readouterr().out)
    assert (peer["host"], peer["port"], peer["stow_url"]) == ("pacs.example", 443, "https://pacs.example/rs")
    assert peer["stow_credentials"] == str(Path("token").absolute())
    site = tmp_path / "site.toml"
    assert run(["registry", "export", str(site), "--config", str(configuration)]) == 0
    assert run(["registry", "import", str(site), "--config", str(configuration)]) == 0
