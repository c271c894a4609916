"""What goes wrong outside gets the documented answer, stands in `study show`, and loses nothing. The node is a real one."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless

from dicomnode.cli import run
from dicomnode.cli.packages import add_package
from dicomnode.config import ListenerSection, load_settings
from dicomnode.dimse.listener import Listener
from dicomnode.dimse.scp import ReceivedInstance, part10_prefix
from dicomnode.dimse.scu import Outgoing, SendOutcome, send
from dicomnode.dimse.storing import in_memory
from pacs import LOOPBACK, PATIENCE_SECONDS, Node, free_port, listens, running, wait_until
from storage import Storage, open_storage, prepare_storage
from storage.records import Peer, Route

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "dicomnode"))
from ct_series import write_series
from small_bundle import MANIFEST, write_package

pytestmark = pytest.mark.usefixtures("logs_restored")
SECONDS = PATIENCE_SECONDS
numbers = itertools.count(1)  # each study its own


class Pacs:
    """A Storage SCP that keeps what it is sent."""

    def __init__(self, ae_title: str, port: int = 0) -> None:
        self.received: dict[str, list[bytes]] = defaultdict(list)
        settings = ListenerSection(host=LOOPBACK, port=port)
        self._listener = Listener(settings, [ae_title], admit=lambda _caller: None, receive=in_memory(self._store))
        self._listener.start()
        self.port = self._listener.port

    def objects(self, study: str) -> dict[str, Dataset]:
        """What arrived of a study, by modality."""
        found = [dcmread(BytesIO(parts[0])) for parts in self.received.values()]
        return {str(dataset.Modality): dataset for dataset in found if dataset.StudyInstanceUID == study}

    def _store(self, received: ReceivedInstance) -> None:
        self.received[received.sop_instance_uid].append(part10_prefix(received) + bytes(received.dataset))

    def stop(self) -> None:
        self._listener.stop(5)


class Site:
    """A node with the package "bright", a PACS, and routes that differ by the calling AE title."""

    def __init__(self, node: Node, folder: Path) -> None:
        self.node, self.folder = node, folder
        settings = load_settings(node.configuration)
        prepare_storage(settings.database_url, settings.data_folder)
        self.storage: Storage = open_storage(settings.database_url, settings.data_folder)
        self.pacs = Pacs("PACS")
        self.peer("PACS", self.pacs.port, sends=True)
        self.enable(write_package(folder / "bright"))
        self.route("SCANNER")

    def peer(self, ae_title: str, port: int, *, sends: bool = False) -> None:
        self.storage.registry.add_peer(
            Peer(ae_title=ae_title, host=LOOPBACK, port=port, sends=sends, receives=True, tls=False, client_cert=None)
        )

    def route(self, caller: str, *, package: str = "bright", to: str = "PACS", report_refusals: bool = False) -> None:
        self.storage.registry.add_peer(
            Peer(ae_title=caller, host=LOOPBACK, port=104, sends=True, receives=False, tls=False, client_cert=None)
        )
        self.storage.registry.add_route(
            Route(
                name=caller.lower(), from_ae_title=caller, called_ae_title="*", package=package, version=None, to_ae_titles=(to,),
                priority=None, quiet_seconds=0.3, report_refusals=report_refusals,
            )
        )  # fmt: skip

    def enable(self, package: Path) -> None:
        """Add and enable a package as after a passed check, which test_package_check and test_cli try."""
        added = add_package(self.storage, package)
        self.storage.registry.set_check(added.name, added.version, added.digest, {}, passed=True)
        self.storage.registry.enable(added.name, added.version)

    def send(self, *files: Path, caller: str = "SCANNER") -> list[SendOutcome]:
        headers = [(file, dcmread(file, stop_before_pixels=True, force=True)) for file in files]
        outgoing = [
            Outgoing(
                sop_class_uid=header.SOPClassUID,
                sop_instance_uid=header.SOPInstanceUID,
                transfer_syntax_uid=header.file_meta.TransferSyntaxUID,
                path=file,
            )
            for file, header in headers
        ]
        return send(self.node.peer, outgoing, calling_ae_title=caller)

    def show(self, study: str) -> dict[str, Any]:
        """What `dicomnode study show UID --json` prints."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert run(["study", "show", study, "--json", "--config", str(self.node.configuration)]) == 0
        (shown,) = json.loads(output.getvalue())
        return dict(shown)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, what=f"{what}; {[(j.key, j.state, j.reason) for j in self.storage.jobs.jobs()]}", log=self.node.log)

    def settled(self, study: str, revision: int = 1) -> dict[str, Any]:
        """Wait until every job of the study's n-th revision has ended, and show the study."""

        def ended() -> bool:
            known = self.storage.index.study(study)
            states = {job.state for job in self.storage.jobs.jobs(study_instance_uid=study)}
            return known is not None and known.revision == revision and not states & {"queued", "running"}

        self.wait(ended, f"revision {revision} of {study}")
        return self.show(study)

    def stop(self) -> None:
        self.node.close()
        self.pacs.stop()
        self.storage.database.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A running site on SQLite; each test sends studies of its own."""
    folder = tmp_path_factory.mktemp("site")
    site = Site(Node(folder / "node"), folder)
    try:
        site.node.start()
        yield site
        site.node.stop()
    finally:
        site.stop()


def chest(folder: Path, *, slices: int = 6, **values: Any) -> tuple[str, list[Path]]:
    """Write a CT series of air with a bright box as a study of its own; return its Study Instance UID and the files."""
    number = next(numbers)
    stored = np.full((slices, 32, 32), 24, dtype=np.uint16)
    stored[1 : slices - 1, 10:18, 12:20] = 1424
    study = f"2.25.5.{number}"
    return study, write_series(folder / str(number), stored, SeriesNumber=number, StudyInstanceUID=study, **values)


def change(file: Path, edit: Callable[[Dataset], None]) -> None:
    """Change one attribute or more of a file, as a faulty device might have."""
    dataset = dcmread(file)
    edit(dataset)
    dataset.save_as(file, enforce_file_format=True)


def evaluation(report: Dataset) -> tuple[str, str]:
    """The evaluation of TID 1501's group, and all comments, of an SR."""
    text = str(report)
    codes = [code for code in ("111241", "111242", "111245") if code in text]
    comments = " ".join(item.TextValue for container in report.ContentSequence for item in _texts(container))
    return ",".join(codes), comments


def _texts(item: Dataset) -> Iterator[Dataset]:
    if item.ValueType == "TEXT":
        yield item
    for child in item.get("ContentSequence", []):
        yield from _texts(child)


def test_a_study_is_analysed_and_its_results_that_come_back_are_no_new_images(site: Site, tmp_path: Path) -> None:
    study, files = chest(tmp_path)
    assert {outcome.state for outcome in site.send(*files)} == {"sent"}
    before = site.settled(study)
    assert [(job["kind"], job["state"]) for job in before["jobs"]] == [("analyse", "done"), ("deliver", "done")]
    arrived = site.pacs.objects(study)
    assert set(arrived) == {"SEG", "SR"}

    returned = []
    for modality, dataset in arrived.items():
        returned.append(tmp_path / f"{modality}.dcm")
        dataset.save_as(returned[-1], enforce_file_format=True)
    assert {outcome.state for outcome in site.send(*returned, caller="PACS")} == {"sent"}
    assert site.storage.index.receiving() == [] or study not in {s.study_instance_uid for s in site.storage.index.receiving()}
    after = site.show(study)
    assert after["study"][0]["instances"] == len(files) + 2
    assert after["study"][0]["state"] == "closed"
    assert (after["revisions"], after["jobs"], after["results"]) == (before["revisions"], before["jobs"], before["results"])


def test_a_late_image_makes_a_second_revision_with_results_of_its_own(site: Site, tmp_path: Path) -> None:
    study, files = chest(tmp_path)
    site.send(*files[:-1])
    first = site.settled(study)
    site.send(files[-1])
    second = site.settled(study, revision=2)
    assert [revision["number"] for revision in second["revisions"]] == [1, 2]
    assert [(job["kind"], job["revision"], job["state"]) for job in second["jobs"]] == [
        ("analyse", 1, "done"), ("deliver", 1, "done"), ("analyse", 2, "done"), ("deliver", 2, "done"),
    ]  # fmt: skip
    old = {result["sop_instance_uid"] for result in first["results"]}
    new = {result["sop_instance_uid"] for result in second["results"]} - old
    assert len(old) == len(new) == 2
    assert old | new <= set(site.pacs.received)
    assert all(len(site.pacs.received[uid]) == 1 for uid in old | new)


def test_an_object_that_is_no_image_is_stored_and_makes_no_revision(site: Site, tmp_path: Path) -> None:
    _, files = chest(tmp_path)
    site.send(*files)
    other, (report, *_) = chest(tmp_path)

    def as_text_report(dataset: Dataset) -> None:
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
        dataset.Modality = "SR"
        for keyword in ("PixelData", "Rows", "Columns", "BitsAllocated"):
            del dataset[keyword]

    change(report, as_text_report)
    assert [outcome.state for outcome in site.send(report)] == ["sent"]
    assert other not in {study.study_instance_uid for study in site.storage.index.receiving()}
    shown = site.show(other)
    assert shown["study"][0]["instances"] == 1
    assert shown["study"][0]["state"] == "closed"
    assert (shown["study"][0]["revision"], shown["revisions"], shown["jobs"], shown["refused"]) == (0, [], [], [])


def test_a_truncated_image_is_refused_with_its_status_and_shown(site: Site, tmp_path: Path) -> None:
    study, files = chest(tmp_path)
    change(files[0], lambda dataset: setattr(dataset, "Rows", 64))
    (outcome,) = site.send(files[0])
    assert (outcome.state, outcome.status) == ("permanent", 0xC002)
    assert "shorter than its header says" in (outcome.error or "")
    shown = site.show(study)
    assert shown["study"] == []
    (refused,) = shown["refused"]
    assert (refused["sop_instance_uid"], refused["calling_ae_title"], refused["dimse_status"]) == (
        outcome.sop_instance_uid, "SCANNER", 0xC002,
    )  # fmt: skip
    assert "shorter than its header says" in refused["reason"]


def test_an_image_that_no_decoder_reads_fails_the_job_and_the_pacs_is_told(site: Site, tmp_path: Path) -> None:
    study, files = chest(tmp_path)

    def as_broken_jpeg(dataset: Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
        dataset.PixelData = encapsulate([b"\xff\x4f\xff\x51 this is no codestream "])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True

    change(files[2], as_broken_jpeg)
    assert {outcome.state for outcome in site.send(*files)} == {"sent"}
    shown = site.settled(study)
    analysis, delivery = shown["jobs"]
    assert (analysis["state"], analysis["reason_code"]) == ("failed", "analysis-failed")
    assert dcmread(files[2], stop_before_pixels=True).SOPInstanceUID in analysis["reason"]
    assert delivery["state"] == "done"
    assert shown["study"][0]["instances"] == len(files)
    (report,) = site.pacs.objects(study).values()
    code, comments = evaluation(report)
    assert code == "111245"
    assert "cannot be decoded" in comments


def test_a_series_of_two_slices_is_refused_with_a_reason_and_reported_where_wanted(site: Site, tmp_path: Path) -> None:
    site.route("REPORTING", report_refusals=True)
    silent, files = chest(tmp_path, slices=2)
    told, more = chest(tmp_path, slices=2)
    site.send(*files)
    site.send(*more, caller="REPORTING")
    for study in (silent, told):
        analysis = site.settled(study)["jobs"][0]
        assert (analysis["state"], analysis["reason_code"]) == ("refused", "too-few-slices")
        assert "2" in analysis["reason"]
    assert site.pacs.objects(silent) == {}
    code, comments = evaluation(site.pacs.objects(told)["SR"])
    assert code == "111245"
    assert "too-few-slices" in comments


def test_an_ae_title_that_nobody_knows_is_let_in_nowhere(site: Site, tmp_path: Path) -> None:
    study, files = chest(tmp_path)
    outcomes = site.send(*files, caller="STRANGER")
    assert {outcome.state for outcome in outcomes} == {"transient"}
    assert all("rejected" in (outcome.error or "") for outcome in outcomes)
    assert site.storage.index.study(study) is None
    assert "STRANGER" in site.node.log.read_text(encoding="utf-8")


def test_a_package_whose_files_changed_after_it_was_enabled_is_not_run(site: Site, tmp_path: Path) -> None:
    site.enable(write_package(tmp_path / "tampered", manifest=MANIFEST.replace('"bright"', '"tampered"', 1)))
    site.route("TAMPER", package="tampered")
    study, files = chest(tmp_path)
    site.send(*files, caller="TAMPER")
    assert site.settled(study)["jobs"][0]["state"] == "done"

    manifest = site.storage.registry.package_folder("tampered", "1.0") / "manifest.toml"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace("minimum_slices = 4", "minimum_slices = 2"), encoding="utf-8")
    study, files = chest(tmp_path, slices=3)
    site.send(*files, caller="TAMPER")
    shown = site.settled(study)
    assert (shown["jobs"][0]["state"], shown["jobs"][0]["reason_code"]) == ("failed", "package")
    assert "digest" in shown["jobs"][0]["reason"]
    assert evaluation(site.pacs.objects(study)["SR"])[0] == "111245"


def test_results_for_a_pacs_that_is_down_wait_visibly_and_arrive_when_it_is_up(site: Site, tmp_path: Path) -> None:
    port = free_port()
    site.peer("LATE", port)
    site.route("FORLATE", to="LATE")
    study, files = chest(tmp_path)
    site.send(*files, caller="FORLATE")
    site.wait(
        lambda: [bool(d.attempts) for d in site.storage.jobs.deliveries(study_instance_uid=study)] == [True] * 2, "the first try of both"
    )
    shown = site.show(study)
    pacs = Pacs("LATE", port)  # before the last try
    assert {(d["state"], d["error"]) for d in shown["deliveries"]} == {
        ("waiting", "the peer cannot be reached, or broke off the association request")
    }
    assert all(d["next_at"] for d in shown["deliveries"])
    shown = site.settled(study)
    pacs.stop()
    assert {d["state"] for d in shown["deliveries"]} == {"sent"}
    assert set(pacs.objects(study)) == {"SEG", "SR"}


def test_a_delivery_that_was_given_up_is_shown_as_failed_and_can_be_retried(site: Site, tmp_path: Path) -> None:
    port = free_port()
    site.peer("DEAD", port)
    site.route("FORDEAD", to="DEAD")
    study, files = chest(tmp_path)
    site.send(*files, caller="FORDEAD")
    shown = site.settled(study)
    delivery = shown["jobs"][1]
    assert (delivery["state"], delivery["reason_code"]) == ("failed", "delivery-failed")
    assert "DEAD" in delivery["reason"]
    assert {(d["state"], d["next_at"], d["attempts"]) for d in shown["deliveries"]} == {("failed", None, 6)}

    pacs = Pacs("DEAD", port)
    assert run(["job", "retry", delivery["key"], "--config", str(site.node.configuration)]) == 0
    shown = site.settled(study)
    pacs.stop()
    assert [job["state"] for job in shown["jobs"]] == ["done", "done"]
    assert {d["state"] for d in shown["deliveries"]} == {"sent"}
    assert all(len(set(parts)) == 1 for parts in pacs.received.values()), "a re-send had other bytes"


def test_no_line_of_the_log_tells_of_the_patient(site: Site, tmp_path: Path) -> None:
    study, files = chest(tmp_path, PatientName="Vollname^Geheim", PatientID="GEHEIM4711", PatientBirthDate="19991231")
    site.send(*files)
    site.settled(study)
    log = site.node.log.read_text(encoding="utf-8")
    assert study in log
    assert [word for word in ("Vollname", "Geheim", "GEHEIM4711", "19991231", "Doe^Jane", "SECRET") if word in log] == []


@pytest.mark.parametrize("database_url", [pytest.param("postgresql", marks=pytest.mark.system)], indirect=True)
def test_a_backlog_survives_a_stop_amid_work_and_stat_goes_first_and_no_role_outlives_its_supervisor(node: Node, tmp_path: Path) -> None:
    site = Site(node, tmp_path)
    try:
        with running([sys.executable, "-m", "dicomnode", "run", "receiver", "--config", node.configuration], log=node.log) as receiver:
            wait_until(lambda: listens(node.peer), what="the receiver to listen", log=node.log)
            routine = [chest(tmp_path) for _ in range(4)]
            urgent = chest(tmp_path, RequestedProcedurePriority="STAT")
            for _, files in [*routine, urgent]:
                assert {outcome.state for outcome in site.send(*files)} == {"sent"}
            site.wait(lambda: len(site.storage.jobs.jobs(state="queued")) == 5, "five jobs")
            receiver.terminate()
            assert receiver.wait(SECONDS) == 0, "a drained role ends with 0"
        studies = [study for study, _ in [*routine, urgent]]

        node.start()
        site.wait(lambda: site.storage.jobs.jobs(kind="analyse", state="done") != [], "the first analysis")
        node.stop()  # SIGTERM amid the work; fails unless it exits with 0

        node.start()
        shown = [site.settled(study) for study in studies]
        roles = node.roles()
        node.kill()
        wait_until(lambda: not any(Path(f"/proc/{role}").exists() for role in roles), what="the roles to end", log=node.log)

        assert [[job["state"] for job in study["jobs"]] for study in shown] == [["done", "done"]] * 5
        assert all(len(set(parts)) == 1 for parts in site.pacs.received.values()), "a re-send had other bytes"
        assert {study: set(site.pacs.objects(study)) for study in studies} == {study: {"SEG", "SR"} for study in studies}
        analyses = sorted(site.storage.jobs.jobs(kind="analyse"), key=lambda job: str(job.started_at))
        assert (analyses[0].study_instance_uid, analyses[0].priority) == (urgent[0], "stat")
    finally:
        site.stop()
