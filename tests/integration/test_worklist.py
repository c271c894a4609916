"""UPS-RS: a RIS asks for analyses, watches them and has them cancelled, and each is done once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from dimse_cases import a_dataset
from test_dicomweb_access import a_peer, basic

from dicomnode.analyses import list_old_jobs
from dicomnode.analysis.package import digest_of
from dicomnode.completion import cancel, close_complete_studies, retry
from dicomnode.config import Settings
from dicomnode.engine import prepare_engine
from dicomnode.phantoms.studies import write_check_study
from dicomnode.pipeline import Analyser
from dicomweb_site import Site, file_of, serving
from storage.records import Job, Peer, Route

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "dicomnode"))
from small_bundle import MANIFEST, write_package

STUDY = "1.2.3.4"
JSON = "application/dicom+json"


@contextmanager
def worklist(folder: Path, url: str, *peers: Peer, **web: Any) -> Iterator[Site]:
    """A web role, with the engine's tables and an enabled package that nobody runs."""
    with serving(folder, url, *peers, **web) as site:
        prepare_engine(url)
        for name, version in (("stub", "1"), ("a-package-with-a-long-name", "2.0")):
            site.storage.registry.add_package(name, version, "d" * 64)
            site.storage.registry.set_check(name, version, "d" * 64, {}, passed=True)
            site.storage.registry.enable(name, version)
        yield site


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Iterator[Site]:
    with worklist(tmp_path, database_url) as made:
        yield made


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Site]:
    """The same on SQLite, for what doesn't differ between the databases."""
    with worklist(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}") as made:
        yield made


def code(value: str, scheme: str = "99DICOMNODE") -> dict[str, Any]:
    keyword = "00080100" if len(value) <= 16 else "00080119"
    return {keyword: {"vr": "SH" if len(value) <= 16 else "UC", "Value": [value]}, "00080102": {"vr": "SH", "Value": [scheme]}}


def a_request(study: str = STUDY, package: str = "stub", **changes: Any) -> dict[str, Any]:
    """What a RIS sends to have a study analysed; of `changes` (by tag, with an x before it) None takes an attribute away."""
    values: dict[str, Any] = {
        "00741000": {"vr": "CS", "Value": ["SCHEDULED"]},
        "00741200": {"vr": "CS", "Value": ["MEDIUM"]},
        "00741204": {"vr": "LO", "Value": ["Nodules, please"]},
        "00741202": {"vr": "LO", "Value": ["AI"]},
        "00404005": {"vr": "DT", "Value": ["20261128120000+0000"]},
        "00404041": {"vr": "CS", "Value": ["READY"]},
        "0020000D": {"vr": "UI", "Value": [study]},
        "00404018": {"vr": "SQ", "Value": [code(package)]},
        "00404025": {"vr": "SQ", "Value": [code("DICOMNODE", "L")]},
        "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Doe^Jane"}]},
        "00100020": {"vr": "LO", "Value": ["P1"]},
        "0040A370": {"vr": "SQ", "Value": [{"00401001": {"vr": "SH", "Value": ["RP7"]}, "00080050": {"vr": "SH", "Value": ["A1"]}}]},
        "00081195": {"vr": "UI"},
        "00741216": {"vr": "SQ"},
    }
    values |= {tag.removeprefix("x"): value for tag, value in changes.items()}
    return {tag: value for tag, value in values.items() if value is not None}


def ask(site: Site, request: Any, uid: str | None = None, **headers: str) -> tuple[int, dict[str, str], str]:
    """Ask for a work item; return status, headers and text."""
    body = request if isinstance(request, bytes) else json.dumps([request]).encode()
    address = "/dicom-web/workitems" + (f"?{uid}" if uid else "")
    status, answered, text = site.request("POST", address, body, **({"Content_Type": JSON} | headers))
    return status, answered, text.decode()


def item(site: Site, uid: str) -> dict[str, Any]:
    """A work item as the node gives it."""
    status, _, body = site.get(f"/workitems/{uid}", Accept=JSON)
    assert status == 200, body
    (found,) = json.loads(body)
    return dict(found)


def values(made: dict[str, Any], *path: str) -> list[Any]:
    """What stands at a path of tags, in the first item of each sequence."""
    for tag in path[:-1]:
        made = made[tag]["Value"][0]
    return list(made[path[-1]].get("Value", []))


def search(site: Site, query: str = "") -> list[str]:
    """The UIDs of the work items that match."""
    status, _, body = site.get(f"/workitems{query}")
    assert status in {200, 204, 206}, body
    return [one["00080018"]["Value"][0] for one in json.loads(body or b"[]")]


def receive(site: Site, *numbers: int, study: str = STUDY) -> None:
    """Store images of a study by STOW-RS."""
    files = [file_of(a_dataset(StudyInstanceUID=study, SeriesInstanceUID=f"{study}.5", InstanceNumber=n)) for n in numbers or (1,)]
    status, answer = site.stow(*files)
    assert status == 200, answer


def close(site: Site) -> None:
    """Let time pass until every study is complete."""
    now = datetime.now(UTC)
    close_complete_studies(site.storage, site.engine, now + timedelta(hours=1), up_since=now)


def jobs(site: Site) -> list[Job]:
    return site.storage.jobs.jobs(kind="analyse")


def state(site: Site, uid: str) -> str:
    return str(values(item(site, uid), "00741000")[0])


def test_a_ris_has_a_study_analysed_and_reads_where_the_results_are(tmp_path: Path) -> None:
    write_check_study(tmp_path / "study", "worklist")
    files = [file.read_bytes() for file in sorted((tmp_path / "study").glob("*.dcm"))]
    with worklist(tmp_path / "node", f"sqlite:///{tmp_path / 'node' / 'node.sqlite'}") as site:
        registry = site.storage.registry
        folder = registry.package_folder("bright", "1.0")
        write_package(folder, manifest=MANIFEST)
        registry.add_package("bright", "1.0", digest_of(folder))
        registry.set_check("bright", "1.0", digest_of(folder), {}, passed=True)
        registry.enable("bright", "1.0")
        assert site.stow(*files)[0] == 200
        (study,) = site.storage.index.studies()
        close(site)
        assert jobs(site) == [], "no route names a package"

        asked = a_request(study.study_instance_uid, "bright", x00100010=None, x00100020=None, x00741200={"vr": "CS", "Value": ["HIGH"]})
        status, headers, _ = ask(site, asked, "1.2.9")
        assert (status, headers["location"]) == (201, f"{site.url}/workitems/1.2.9")
        (job,) = jobs(site)
        assert (job.package, job.version, job.priority, job.state) == ("bright", "1.0", "stat", "queued")
        made = item(site, "1.2.9")
        assert values(made, "00741000") == ["SCHEDULED"]
        assert values(made, "00404041") == ["READY"]
        assert values(made, "00100020") == [study.patient_id], "who the patient is, the study says"
        assert len(values(made, "00404021", "00081199")) == len(files)
        assert "00081195" not in made
        assert search(site, "?ProcedureStepState=SCHEDULED&ScheduledProcedureStepPriority=HIGH") == ["1.2.9"]

        Analyser(Settings.model_validate({"analysis": {"device": "cpu"}}), site.storage, site.engine).analyse(job.key, 0)
        made = item(site, "1.2.9")
        assert values(made, "00741000") == ["COMPLETED"]
        assert values(made, "00741002", "00741004") == [100.0]
        assert values(made, "00741216", "00404028", "00080100") == ["DICOMNODE"]
        assert values(made, "00741216", "00741212", "0040A160") == ["bright"]
        outputs = [
            (series["0040E025"]["Value"][0]["00081190"]["Value"][0], reference["00081155"]["Value"][0])
            for series in values(made, "00741216", "00404033")
            for reference in series["00081199"]["Value"]
        ]
        results = site.storage.jobs.results(job_key=job.key)
        assert {result.modality for result in results} == {"SEG", "SR"}
        assert {uid for _, uid in outputs} == {result.sop_instance_uid for result in results}
        for url, uid in outputs:
            status, _, body = site.get(f"{url.removeprefix(site.url)}/instances/{uid}", Accept="application/dicom")
            assert (status, uid.encode() in body) == (200, True)
        assert search(site, "?00741000=COMPLETED") == ["1.2.9"]
        assert ask(site, asked, "1.2.10")[0] == 201
        again = jobs(site)[1]
        site.storage.jobs.start(again.key)
        site.storage.jobs.finish(again.key, "done", detail={"carried_over": {"revision": 1, "job": job.key}})
        stand = values(item(site, "1.2.10"), "00741216", "00404033")
        assert stand == values(made, "00741216", "00404033"), "results that stand are those of the job that made them"
        assert site.request("POST", "/dicom-web/workitems/1.2.9/cancelrequest")[0] == 409


def test_what_a_route_asks_for_stands_on_the_worklist_too(one: Site) -> None:
    route = Route(name="r", from_ae_title="*", called_ae_title="*", package="stub", version=None, to_ae_titles=(), priority=None,
                  quiet_seconds=5, report_refusals=False)  # fmt: skip
    one.storage.registry.add_route(route)
    receive(one)
    close(one)
    (job,) = jobs(one)
    (uid,) = search(one)
    made = item(one, uid)
    assert values(made, "00404018", "00080100") == ["stub"]
    assert values(made, "0040A370", "00080050") == ["A1"]
    assert values(made, "00741210", "0040A160") == ["stub"]
    one.storage.jobs.start(job.key)
    one.storage.jobs.progress(job.key, 0.25)
    made = item(one, uid)
    assert (values(made, "00741000"), values(made, "00741002", "00741004")) == (["IN PROGRESS"], [25.0])
    reason = "The study has no series that fits."
    one.storage.jobs.finish(job.key, "refused", reason_code="no-series", reason=reason)
    made = item(one, uid)
    assert (values(made, "00741000"), values(made, "00741002", "00741238")) == (["CANCELED"], [reason])
    codes = [one["00080100"]["Value"][0] for one in values(made, "00741002", "0074100E")]
    assert codes == ["110522", "no-series"]


def test_an_analysis_that_is_done_again_is_another_work_item_and_no_state_goes_back(one: Site) -> None:
    receive(one)
    close(one)
    assert ask(one, a_request(), "1.2.9")[0] == 201
    (job,) = jobs(one)
    one.storage.jobs.start(job.key)
    one.storage.jobs.postpone(job.key, "the disk is full")
    assert state(one, "1.2.9") == "IN PROGRESS"
    postponed = one.storage.jobs.job(job.key)
    assert postponed is not None
    retry(one.storage, one.engine, postponed)
    assert state(one, "1.2.9") == "IN PROGRESS"
    one.storage.jobs.start(job.key)
    one.storage.jobs.finish(job.key, "failed", reason_code="dead-letter", reason="it ended its worker")
    failed = one.storage.jobs.job(job.key)
    assert failed is not None
    retry(one.storage, one.engine, failed)
    assert state(one, "1.2.9") == "CANCELED"
    first, second = search(one)
    assert (first, state(one, second)) == ("1.2.9", "SCHEDULED")
    one.storage.jobs.start(job.key)
    one.storage.jobs.finish(job.key, "done")
    assert (state(one, "1.2.9"), state(one, second)) == ("CANCELED", "COMPLETED")
    assert values(item(one, "1.2.9"), "00741002", "00741238") == ["it ended its worker"]
    assert len(jobs(one)) == 1


def test_a_work_item_waits_for_its_study_and_shares_the_job_of_a_route(one: Site) -> None:
    """Of two that wait for the same package one stands for the route's job, and each is done once."""
    for uid, priority in (("1.2.8", "MEDIUM"), ("1.2.9", "HIGH")):
        assert ask(one, a_request(x00741200={"vr": "CS", "Value": [priority]}), uid)[0] == 201
    assert ask(one, a_request(package="a-package-with-a-long-name"), "1.2.10")[0] == 201
    assert jobs(one) == []
    made = item(one, "1.2.8")
    assert [waiting.uid for waiting in one.storage.workitems.of_study(STUDY)] == ["1.2.8", "1.2.9", "1.2.10"]
    assert (values(made, "00741000"), values(made, "00404041")) == (["SCHEDULED"], ["UNREADY"])
    assert values(made, "00100010") == [{"Alphabetic": "Doe^Jane"}]
    assert search(one, "?InputReadinessState=UNREADY&PatientName=doe*") == ["1.2.8", "1.2.9", "1.2.10"]
    route = Route(name="r", from_ae_title="*", called_ae_title="*", package="stub", version=None, to_ae_titles=(), priority=None,
                  quiet_seconds=5, report_refusals=False)  # fmt: skip
    one.storage.registry.add_route(route)
    receive(one)
    assert jobs(one) == [], "images are still coming"
    close(one)
    assert sorted((job.package, job.run, job.priority) for job in jobs(one)) == [
        ("a-package-with-a-long-name", 1, "routine"), ("stub", 1, "routine"), ("stub", 2, "stat"),
    ]  # fmt: skip
    assert sorted(search(one)) == ["1.2.10", "1.2.8", "1.2.9"], "each job has one work item"
    assert {values(item(one, uid), "00404041")[0] for uid in search(one)} == {"READY"}


def test_a_work_item_of_another_patient_or_without_its_package_ends_with_the_reason(one: Site) -> None:
    other = {"vr": "LO", "Value": ["P2"]}
    assert ask(one, a_request(x00100020=other), "1.2.7")[0] == 201
    assert ask(one, a_request(package="a-package-with-a-long-name"), "1.2.8")[0] == 201
    one.storage.registry.disable("a-package-with-a-long-name", "2.0")
    receive(one)
    close(one)
    assert ask(one, a_request(x00100020=other), "1.2.9")[0] == 201
    assert jobs(one) == []
    reasons = [values(item(one, uid), "00741002", "00741238")[0] for uid in ("1.2.7", "1.2.8", "1.2.9")]
    assert reasons[0] == reasons[2] == "the study is another patient's than the one that was named"
    assert reasons[1] == "package a-package-with-a-long-name is not enabled"


def test_cancelled_is_what_waits_what_is_queued_and_what_runs_and_nothing_that_has_ended(site: Site) -> None:
    def cancelled(uid: str, **reason: Any) -> tuple[int, str]:
        body = json.dumps([reason]).encode() if reason else None
        named = {"Content_Type": JSON} if reason else {}
        status, headers, _ = site.request("POST", f"/dicom-web/workitems/{uid}/cancelrequest", body, **named)
        return status, headers.get("warning", "")

    assert ask(site, a_request("1.2.3.9"), "1.2.1")[0] == 201
    receive(site)
    close(site)
    for uid in ("1.2.2", "1.2.3", "1.2.4"):
        assert ask(site, a_request(), uid)[0] == 201
    queued, running, done = jobs(site)
    site.storage.jobs.start(running.key)
    site.storage.jobs.start(done.key)
    site.storage.jobs.finish(done.key, "done")
    assert cancelled("1.2.1") == (202, "")
    assert cancelled("1.2.2") == (202, "")
    said = {"00741238": {"vr": "LT", "Value": ["ordered twice"]}, "0074100E": {"vr": "SQ", "Value": [code("110514", "DCM")]}}
    assert cancelled("1.2.3", **said) == (202, "")
    assert cancelled("1.2.4") == (409, '299 dicomnode "The UPS is already COMPLETED."')
    assert cancelled("1.2.3")[0] == 202
    assert "already in the requested state" in cancelled("1.2.3")[1]
    assert cancelled("1.2.5")[0] == 404
    assert [state(site, f"1.2.{n}") for n in (1, 2, 3, 4)] == ["CANCELED", "CANCELED", "CANCELED", "COMPLETED"]
    made = item(site, "1.2.3")
    assert values(made, "00741002", "00741238") == ["ordered twice"]
    assert values(made, "00741002", "0074100E", "00080100") == ["110514"]
    assert values(item(site, "1.2.2"), "00741002", "00741238") == ["cancelled as DICOMWEB asked"]
    assert {job.key: job.state for job in jobs(site)} == {queued.key: "cancelled", running.key: "cancelled", done.key: "done"}
    receive(site, study="1.2.3.9")
    close(site)
    assert len(jobs(site)) == 3, "who was cancelled while it waited never begins"


def test_one_of_many_who_ask_for_the_same_uid_at_once_is_served(site: Site) -> None:
    receive(site)
    close(site)
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: ask(site, a_request(), "1.2.9")[0], range(8)))
    assert sorted(statuses) == [201] + [409] * 7
    assert len(jobs(site)) == 1
    status, headers, text = ask(site, a_request(), "1.2.9")
    assert (status, text) == (409, "There is a work item of this UID already.\n")
    assert headers["warning"] == '299 dicomnode "There is a work item of this UID already."'
    first, again = ask(site, a_request()), ask(site, a_request())
    assert (first[0], again[0]) == (201, 409), "the same request without a UID is the same work item"
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda n: ask(site, a_request(), f"1.2.9.{n}")[0], range(8)))
    assert statuses == [201] * 8
    assert len({job.key for job in jobs(site)}) == 10, "each work item has a run of its own"


def test_nobody_else_performs_a_work_item(one: Site) -> None:
    receive(one)
    close(one)
    assert ask(one, a_request(), "1.2.9")[0] == 201
    (job,) = jobs(one)

    def change(wanted: str, *, transaction: str | None = "1.2.77", uid: str = "1.2.9") -> tuple[int, str]:
        claim = {"00741000": {"vr": "CS", "Value": [wanted]}}
        claim |= {"00081195": {"vr": "UI", "Value": [transaction]}} if transaction else {}
        status, headers, _ = one.request("PUT", f"/dicom-web/workitems/{uid}/state", json.dumps(claim).encode(), Content_Type=JSON)
        return status, headers.get("warning", "").removeprefix("299 dicomnode ").strip('"')

    assert change("IN PROGRESS")[0] == 403
    assert change("CANCELED")[0] == 403
    assert change("IN PROGRESS", transaction=None) == (400, "The Transaction UID is missing.")
    assert change("DONE")[0] == 400
    assert change("IN PROGRESS", uid="1.2.8")[0] == 404
    one.storage.jobs.start(job.key)
    assert change("COMPLETED") == (409, "The Transaction UID is incorrect.")
    cancel(one.storage, one.engine, job)
    assert change("CANCELED") == (200, "The UPS is already in the requested state of CANCELED.")
    assert change("IN PROGRESS")[0] == 409
    assert state(one, "1.2.9") == "CANCELED"


def test_a_search_finds_by_keys_page_by_page(site: Site) -> None:
    for n in range(5):
        asked = a_request(f"1.2.3.{n}", x00404005={"vr": "DT", "Value": [f"202611280{n}0000.5+0000"]})
        assert ask(site, asked, f"1.2.9.{n}")[0] == 201
    every = [f"1.2.9.{n}" for n in range(5)]
    assert search(site) == every
    assert search(site, "?limit=2&offset=3") == every[3:]
    status, headers, _ = site.get("/workitems?limit=2")
    assert (status, headers["warning"]) == (206, '299 dicomnode "There are additional results that can be requested"')
    for query, found in (
        ("?SOPInstanceUID=1.2.9.1,1.2.9.2", every[1:3]),
        ("?StudyInstanceUID=1.2.3.4", every[4:]),
        ("?0040A370.00080050=A1&ReferencedRequestSequence.RequestedProcedureID=RP*", every),
        ("?ScheduledProcedureStepStartDateTime=20261128020000.5%2B0000", every[2:3]),
        ("?ScheduledProcedureStepStartDateTime=2026112803%2B0000-", every[3:]),
        ("?ScheduledProcedureStepStartDateTime=-20261128015959%2B0000", every[:2]),
        ("?ScheduledProcedureStepStartDateTime=20261128%2B0000-20261129%2B0000", every),
        ("?ScheduledWorkitemCodeSequence.CodeValue=stub&WorklistLabel=AI&ProcedureStepLabel=Nodules*", every),
        ("?ScheduledStationNameCodeSequence.CodeValue=DICOMNODE&PatientID=P1", every),
        ("?ScheduledStationNameCodeSequence.CodeValue=OTHER", []),
        ("?ProcedureStepState=IN%20PROGRESS", []),
        ("?PatientName=Roe", []),
        ("?ProcedureStepState=a%00b&WorklistLabel=%FF", []),
    ):
        assert search(site, query) == found, query
    for query in ("?ScheduledProcedureStepStartDateTime=yesterday", "?SOPInstanceUID=x", "?limit=-1", "?NoSuchKeyword=1"):
        assert site.get(f"/workitems{query}")[0] == 400, query
    assert "ignored" in site.get("/workitems?CommentsOnTheScheduledProcedureStep=x")[1]["warning"]
    assert site.get("/workitems", Accept="application/dicom+xml")[0] == 406
    assert site.get("/workitems/nothing")[0] == 400
    assert site.get("/workitems/1.2.99")[0] == 404


def test_what_is_no_work_item_is_refused_in_one_sentence_and_leaves_nothing(one: Site) -> None:
    deep: Any = {}
    for _ in range(50):
        deep = {"00404018": {"vr": "SQ", "Value": [deep]}}
    text = "x" * 20_000
    for request in (
        b"", b"{", b"[]", b"[1]", b"[{}, {}]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"00741000": {"vr": "FD", "Value": [NaN]}}',
        {}, {"0074": {}}, {"00741000": "SCHEDULED"}, deep,
        a_request(x00741000=None), a_request(x00741000={"vr": "CS", "Value": ["IN PROGRESS"]}),
        a_request(x00741000={"vr": "CS", "Value": {"a": 1}}), a_request(x00741000={"vr": "LO", "Value": ["SCHEDULED"]}),
        a_request(x00741200=None), a_request(x00741200={"vr": "CS", "Value": [[]]}), a_request(x00741200={"vr": "CS", "Value": ["STAT"]}),
        a_request(x00741204=None), a_request(x00741204={"vr": "LO", "Value": [text]}),
        a_request(x00404005=None), a_request(x00404005={"vr": "DT", "Value": ["20261301"]}),
        a_request(x00404005={"vr": "DT", "Value": [20261128]}), a_request(x00404041=None),
        a_request(x00081195={"vr": "UI", "Value": ["1.2"]}), a_request(x00741216={"vr": "SQ", "Value": [{}, {}]}),
        a_request("not a UID"), a_request(x0020000D=None, x00404021=None),
        a_request(x00404021={"vr": "SQ", "Value": [{"0020000D": {"vr": "UI", "Value": ["1.2.3.5"]}}]}),
        a_request(package="unknown"), a_request(package="../etc"), a_request(x00404018=None),
        a_request(x00404018={"vr": "SQ", "Value": [code("stub"), code("a-package-with-a-long-name")]}),
        a_request(x00404025={"vr": "SQ", "Value": [code("ELSEWHERE", "L")]}),
        a_request(x00404070={"vr": "SQ", "Value": [{"00404071": {"vr": "SQ", "Value": [{"21000140": {"vr": "AE", "Value": ["X"]}}]}}]}),
        a_request(x00080018={"vr": "UI", "Value": ["1.2.8"]}),
        a_request(x00100010={"vr": "PN", "Value": ["Doe^Jane"]}),
    ):  # fmt: skip
        status, headers, told = ask(one, request, "1.2.9")
        assert status == 400, request
        assert told.count("\n") == 1
        assert text not in told
        if request:
            assert "x" * 64 not in headers.get("warning", "")
    assert ask(one, a_request(), "not-a-uid")[0] == 400
    assert ask(one, a_request(), "1.2.9", Content_Type="application/dicom+xml")[0] == 415
    assert ask(one, json.dumps(a_request()).encode() + b" " * 2**21, "1.2.9")[0] == 413
    assert search(one) == []
    odd = a_request(x00741204={"vr": "LO", "Value": ["\0 \ud800 ü"]}, x00091001={"vr": "LO", "Value": ["private"]})
    status, headers, _ = ask(one, odd, "1.2.9")
    assert (status, search(one)) == (201, ["1.2.9"])


def test_a_request_may_say_the_same_in_other_words(one: Site) -> None:
    """The package as a processing parameter with its version, the study by its input, the results' peer by its AE title."""
    receiver = a_peer("PACS", receives=True)
    one.storage.registry.add_peer(receiver)
    parameters = [
        {"0040A043": {"vr": "SQ", "Value": [code(value, "DCM")]}, "0040A160": {"vr": "UT", "Value": [text]}}
        for value, text in (("111001", "stub"), ("111003", "1"))
    ]
    asked = a_request(
        x00404018={"vr": "SQ", "Value": [code("110004", "DCM")]},
        x00741210={"vr": "SQ", "Value": parameters},
        x0020000D=None,
        x00404021={"vr": "SQ", "Value": [{"0020000D": {"vr": "UI", "Value": [STUDY]}}]},
        x00404070={"vr": "SQ", "Value": [{"00404071": {"vr": "SQ", "Value": [{"21000140": {"vr": "AE", "Value": ["PACS"]}}]}}]},
        x00741200={"vr": "CS", "Value": ["LOW"]},
    )
    status, headers, _ = one.request("POST", "/dicom-web/workitems?workitem=1.2.9", json.dumps(asked).encode(), Content_Type=JSON)[:3]
    assert (status, headers["warning"]) == (201, '299 dicomnode "The Workitem was created with modifications."')
    receive(one)
    close(one)
    (job,) = jobs(one)
    assert (job.package, job.version, job.to_ae_titles) == ("stub", "1", ("PACS",))
    made = item(one, "1.2.9")
    assert values(made, "00741200") == ["MEDIUM"]
    assert values(made, "00404018", "00080100") == ["110004"], "what the RIS said of it is shown again"
    assert values(made, "00404070", "00404071", "21000140") == ["PACS"]


def test_who_may_send_may_ask_and_who_may_query_may_look(tmp_path: Path) -> None:
    peers = (a_peer("RIS", "s3cret", queries=True), a_peer("VIEWER", "s3cret", sends=False), a_peer("SCANNER", "s3cret", queries=False))
    with worklist(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}", *peers, credentials=True) as site:
        ris, viewer, scanner = (basic(name, "s3cret") for name in ("RIS", "VIEWER", "SCANNER"))
        assert ask(site, a_request(), "1.2.9")[0] == 401
        assert ask(site, a_request(), "1.2.9", Authorization=viewer)[0] == 403
        assert ask(site, a_request(), "1.2.9", Authorization=ris)[0] == 201
        assert [site.get("/workitems/1.2.9", Authorization=who)[0] for who in (ris, viewer, scanner)] == [200, 200, 403]
        cancel_it = "/dicom-web/workitems/1.2.9/cancelrequest"
        assert site.request("POST", cancel_it, Authorization=viewer)[0] == 403
        assert site.request("POST", cancel_it, Authorization=ris)[0] == 202
        found = json.loads(site.get("/workitems/1.2.9", Authorization=viewer)[2])[0]
        assert values(found, "00741002", "00741238") == ["cancelled as RIS asked"]


def test_analyses_of_before_the_worklist_are_put_on_it(one: Site) -> None:
    receive(one)
    close(one)
    with one.storage.database.writing() as connection:
        for n in (1, 2):
            one.storage.jobs.create(connection, key=f"analyse/{n}", kind="analyse", study_instance_uid=STUDY, revision=1, package="stub",
                                    version="1", digest="d", run=n, priority="routine")  # fmt: skip
    assert search(one) == []
    list_old_jobs(one.storage)
    found = search(one)
    assert len(found) == 2
    list_old_jobs(one.storage)
    assert search(one) == found
