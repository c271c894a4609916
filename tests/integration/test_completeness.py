"""Many studies interleaved over 16 associations, slices shuffled, with gaps and late images: each revision is what it should be.

What it should be is written down with each study when it is made, before anything is sent, and nothing of the node is asked for it.
The clock is the test's: a study's silence is as long as `Bench.later` says, however long the machine takes.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from dimse_cases import a_dataset, encoded
from raw_dicom import Image, association, association_request
from stub_package import enable_stub_package

from dicomnode.cli import run as run_command
from dicomnode.completion import Seen, close_complete_studies
from dicomnode.config import ListenerSection, NodeSection, Settings
from dicomnode.engine import EngineClient, prepare_engine
from dicomnode.receiver import Receiver
from pacs import PATIENCE_SECONDS, loopback_peer, wait_until
from storage import open_storage, prepare_storage
from storage.records import Route

WORKER = Path(__file__).parents[1] / "recording_worker.py"
ASSOCIATIONS = 16
# Called AE titles: studies that wait for their quiet period, those of which a package starts on the first series, and those that are
# closed at any moment.
CALM, FIRST, HASTY = "CALM", "FIRST", "HASTY"
SETTLED = 1800.0  # a series is quiet for so long before a package starts on it
QUIET = 3600.0
WAITED = 5 * QUIET + 60  # a quiet period and, for what is absent, four more


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A study: what is sent of it in each round, and what must come of it."""

    uid: str
    called: str
    soon: list[Image]  # what is sent after the first round, when its series have been quiet
    rounds: tuple[list[Image], ...]  # 1: at first, 2: after a quiet period, 3: after the longest wait
    waits: int  # how many of the three times it is still open after: a quiet period, another one, the longest wait
    revisions: list[tuple[frozenset[str], tuple[str, ...]]]  # content, and what is said to be absent
    computed: list[frozenset[str]]  # what the package works on, one after the other: nothing twice; of hasty ones the last
    begins: bool  # whether its first revision is of its first series alone, while it stays open

    @property
    def images(self) -> frozenset[str]:
        return uids(image for sent in (self.soon, *self.rounds) for image in sent)


def uids(images: Iterable[Image]) -> frozenset[str]:
    return frozenset(image.sop_instance_uid for image in images)


def slices(study: str, series: int, count: int, stated: int | None = None) -> dict[int, Image]:
    """A CT series by Instance Number; each slice has UIDs of its own."""
    made = {}
    for number in range(1, count + 1):
        dataset = a_dataset(
            StudyInstanceUID=study, SeriesInstanceUID=f"{study}.{series}", SeriesNumber=series, InstanceNumber=number,
            AcquisitionNumber=series, FrameOfReferenceUID=f"{study}.9", PixelSpacing=[1, 1], RescaleSlope=1,
            RescaleIntercept=-1024, ImagePositionPatient=[-120.5, -99.25, 2.5 * number - 500], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        )  # fmt: skip
        if stated is not None:
            dataset.ImagesInAcquisition = stated
        made[number] = Image(dataset.SOPInstanceUID, encoded(dataset))
    return made


def plan(kind: str, uid: str, chance: random.Random) -> Planned:
    """A study of a kind."""
    count = chance.randrange(12, 18)
    by_number = slices(uid, 1, count)
    series, more = list(by_number.values()), list(slices(uid, 2, chance.randrange(3, 6)).values())
    counted = list(slices(uid, 1, count, count + 2).values())

    def part(*numbers: int) -> list[Image]:
        return [by_number[number] for number in numbers]

    def without(*numbers: int) -> list[Image]:
        return [image for number, image in by_number.items() if number not in numbers]

    gap = "series 1: Instance Number {} absent, where the slices have a gap".format
    whole, all_of_it = uids(series), uids(series + more)
    short = f"series 1: {count} of {count + 2} images of acquisition 1"
    rounds, waits, revisions, computed = {
        "whole": ((series, [], []), 0, [(whole, ())], [whole]),
        "two series": ((series + more, [], []), 0, [(all_of_it, ())], [whole]),
        "gap": ((without(8), [], []), 2, [(uids(without(8)), (gap("8 is"),))], []),
        "gap filled in time": ((without(8), part(8), []), 1, [(whole, ())], [whole]),
        "gap filled late": (
            (without(5, 8, 9), [], part(5, 8, 9)), 2, [(uids(without(5, 8, 9)), (gap("5, 8 to 9 are"),)), (whole, ())], [whole]
        ),
        "gap filled late in part": (
            (without(5, 8), [], part(5)), 2, [(uids(without(5, 8)), (gap("5, 8 are"),)), (uids(without(8)), (gap("8 is"),))], []
        ),
        "fewer than stated": ((counted, [], []), 2, [(uids(counted), (short,))], [uids(counted)]),
        "late series": ((series, more, []), 0, [(whole, ()), (all_of_it, ())], [whole]),
        "late twice": (
            (without(count), part(count), more), 0, [(uids(without(count)), ()), (whole, ()), (all_of_it, ())],
            [uids(without(count)), whole],
        ),
        "sent again": ((series, series, series), 0, [(whole, ())], [whole]),
        "first series": ((series, [], []), 0, [(whole, ()), (all_of_it, ())], [whole]),
        "first series, and more later": (
            (series, more[1:], []), 0, [(whole, ()), (uids(series + more[:1]), ()), (all_of_it, ())], [whole]
        ),
        "first series alone": ((series, [], []), 0, [(whole, ()), (whole, ())], [whole]),
        "first series cut off": (
            (without(count), [], []), 0, [(uids(without(count)), ()), (whole, ())], [uids(without(count)), whole]
        ),
        "first series with a gap": ((without(8), [], []), 0, [(whole, ())], [whole]),
        "hasty": ((series + more, [], []), 0, [], [whole]),
    }[kind]  # fmt: skip
    soon = {
        "first series": more,
        "first series, and more later": more[:1],
        "first series cut off": part(count),
        "first series with a gap": part(8),
    }.get(kind, [])
    called = HASTY if kind == "hasty" else FIRST if kind.startswith("first series") else CALM
    return Planned(
        uid=uid, called=called, soon=soon, rounds=tuple(map(list, rounds)), waits=waits, revisions=revisions, computed=computed,
        begins=called == FIRST and kind != "first series with a gap",
    )  # fmt: skip


KINDS = (
    "whole", "two series", "gap", "gap filled in time", "gap filled late", "gap filled late in part", "fewer than stated", "late series",
    "late twice", "sent again", "hasty", "hasty", "first series", "first series, and more later", "first series cut off",
    "first series with a gap",
    "first series alone",
)  # fmt: skip


class Bench:
    """A receiver, a thread that closes studies all the time, and a worker that writes down what each analysis is given."""

    def __init__(self, url: str, folder: Path) -> None:
        prepare_storage(url, folder)
        prepare_engine(url)
        self.storage = open_storage(url, folder)
        self.client = EngineClient(url)
        self.journal = folder / "journal"
        self.later = timedelta()
        self._register()
        settings = Settings(node=NodeSection(data=folder, ae_title=CALM, more_ae_titles=(FIRST, HASTY)), listener=ListenerSection(port=0))
        self.receiver = Receiver(settings, self.storage)
        self.receiver.start()
        self._worker = subprocess.Popen([sys.executable, str(WORKER), url, str(folder), str(self.journal)])
        self._stopping = threading.Event()
        self.trouble: list[Exception] = []
        self.looked = 0
        self._closer = threading.Thread(target=self._close)
        self._closer.start()

    def _register(self) -> None:
        registry = self.storage.registry
        registry.add_peer(loopback_peer("SCANNER", 104))
        enable_stub_package(registry)
        for called, quiet, first in ((CALM, QUIET, None), (FIRST, QUIET, SETTLED), (HASTY, 0.0, None)):
            registry.add_route(
                Route(name=called, from_ae_title="*", called_ae_title=called, package="stub", version=None, to_ae_titles=("SCANNER",),
                      priority=None, quiet_seconds=quiet, report_refusals=False, first_series_seconds=first)
            )  # fmt: skip

    def _close(self) -> None:
        seen = Seen(self.storage)
        while not self._stopping.wait(0.1):
            now = datetime.now(UTC)
            try:
                close_complete_studies(self.storage, self.client, now + self.later, up_since=now - timedelta(days=1), seen=seen)
            except Exception as error:  # noqa: BLE001  told by whoever waits
                self.trouble.append(error)
            self.looked += 1

    def send(self, called: str, images: Sequence[Image]) -> list[str]:
        """Send over one association, in this order; return the SOP Instance UIDs in the order of their Success."""
        taken = []
        request = association_request(called=called)
        with association(self.receiver.port, request=request, seconds=PATIENCE_SECONDS) as connection:
            for image in images:
                assert connection.store(image).status == 0
                taken.append(image.sop_instance_uid)
            connection.release()
        return taken

    def send_round(self, number: int, studies: Sequence[Planned], chance: random.Random) -> list[list[str]]:
        """Send a round of all studies, shuffled, over 16 associations at a time; return what each sent, in its order."""
        return self.send_all({study.uid: study.rounds[number] for study in studies}, studies, chance)

    def send_all(self, sent: Mapping[str, list[Image]], studies: Sequence[Planned], chance: random.Random) -> list[list[str]]:
        """Send these images of each study likewise."""
        parts: list[tuple[str, list[Image]]] = []
        for called, associations in ((CALM, ASSOCIATIONS - 8), (FIRST, 4), (HASTY, 4)):
            images = [image for study in studies if study.called == called for image in sent[study.uid]]
            chance.shuffle(images)
            parts += [(called, images[start::associations]) for start in range(associations) if images]
        with ThreadPoolExecutor(ASSOCIATIONS) as pool:
            return list(pool.map(lambda part: self.send(*part), parts))

    def open(self) -> set[str]:
        """The studies with images that no revision holds yet."""
        return {study.study_instance_uid for study in self.storage.index.receiving()}

    def settle(self, later: float, still_open: set[str], what: str) -> None:
        """Let so many seconds pass, and wait until none but these studies are open, and they are; then let time stand again."""
        self.wait(self._released, f"the ends of the associations before {what}")
        self.later = timedelta(seconds=later)
        self.wait(lambda: self.open() <= still_open, what)
        looked = self.looked
        self.wait(lambda: self.looked > looked + 2, "another look at those that stay open")
        self.later = timedelta()
        assert self.open() == still_open, what

    def wait(self, condition: Any, what: str) -> None:
        wait_until(lambda: bool(self.trouble) or condition(), what=what)
        assert self.trouble == []

    def _released(self) -> bool:
        return all(study.released_at and study.released_at >= study.last_received_at for study in self.storage.index.receiving())

    def records(self, what: str) -> list[tuple[str, frozenset[str]]]:
        """Each analysis by its key, and what it was "given", or what it "computed"."""
        lines = self.journal.read_text(encoding="utf-8").splitlines() if self.journal.exists() else []
        return [(key, frozenset(uids)) for kind, key, uids in map(json.loads, lines) if kind == what]

    def at_rest(self) -> bool:
        """Whether every analysis has ended."""
        return not any(self.storage.jobs.jobs(kind="analyse", state=state) for state in ("queued", "running"))

    def close(self) -> None:
        self._stopping.set()
        self._closer.join()
        self._worker.terminate()
        self._worker.wait(PATIENCE_SECONDS)
        self.receiver.stop(drain_seconds=0)
        self.client.close()
        self.storage.database.close()


@contextmanager
def a_bench(url: str, folder: Path) -> Iterator[Bench]:
    bench = Bench(url, folder)
    try:
        yield bench
    finally:
        bench.close()


def run(bench: Bench, number: int) -> None:
    chance = random.Random(20260128)
    studies = [plan(KINDS[n % len(KINDS)], f"1.2.826.0.1.{n + 1}", chance) for n in range(number)]
    calm = {study.uid for study in studies if study.called != HASTY}

    def still_open(times: int) -> set[str]:
        return {study.uid for study in studies if study.waits > times}

    sent = bench.send_round(0, studies, chance)
    assert calm <= bench.open(), "closed before its time"
    bench.settle(SETTLED, calm, "the series that are whole")
    sent += bench.send_all({study.uid: study.soon for study in studies}, studies, chance)
    bench.settle(QUIET + 60, still_open(0), "the studies that are whole")
    sent += bench.send_round(1, studies, chance)
    bench.settle(QUIET + 60, still_open(1), "the studies that have become whole")
    bench.settle(WAITED, set(), "the studies that were waited for in vain")
    sent += bench.send_round(2, studies, chance)
    bench.settle(WAITED, set(), "what came late")
    bench.wait(bench.at_rest, "the analyses")
    check(bench, studies, sent)


def check(bench: Bench, studies: Sequence[Planned], sent: Sequence[Sequence[str]]) -> None:
    records, computed = bench.records("given"), bench.records("computed")
    assert max(Counter(key for key, _ in records).values()) == 1, "analysed twice"
    given = dict(records)
    jobs = {job.key: job for job in bench.storage.jobs.jobs(kind="analyse")}
    keys = set()
    for study in studies:
        revisions = bench.storage.index.revisions(study.uid)
        contents = []
        for revision in revisions:
            key = f"analyse/{study.uid}/{revision.number}/stub/1"
            keys.add(key)
            contents.append(given[key])
            assert frozenset(i.sop_instance_uid for i in bench.storage.index.instances(study.uid, revision.number)) == given[key]
            assert revision.facts["images"] == len(given[key])
            assert revision.evidence.startswith("incomplete: ") == bool(revision.incomplete)
            assert revision.stays_open == (study.begins and revision.number == 1)
        assert [revision.number for revision in revisions] == list(range(1, len(revisions) + 1))
        mine = [inputs for key, inputs in computed if key.startswith(f"analyse/{study.uid}/")]
        if study.called == HASTY:
            assert mine[-1] == study.computed[-1]
            assert all(earlier != later for earlier, later in pairwise(mine)), "the same analysed again"
        else:
            assert mine == study.computed
            assert list(zip(contents, (revision.incomplete for revision in revisions), strict=True)) == study.revisions
        assert contents[-1] == study.images, "not all of it was analysed in the end"
        for number, (earlier, later) in enumerate(pairwise(contents), start=1):
            assert earlier < later or (earlier == later and revisions[number - 1].stays_open), "a revision without anything new"
        for one in sent:  # what an association sent before an image that a revision holds, the revision holds, too
            mine = [uid for uid in one if uid in study.images]
            for content in contents:
                known = [uid in content for uid in dict.fromkeys(mine)]
                assert known == sorted(known, reverse=True)
    assert set(given) == keys, "an analysis of no revision"
    assert set(jobs) == keys
    done = {key for key, job in jobs.items() if job.state == "done"}
    carried = {key for key, job in jobs.items() if job.carried_from is not None}
    assert done - carried == {key for key, _ in computed}
    assert {jobs[key].reason_code for key in carried} == {"carried-over"}
    assert {jobs[key].carried_from for key in carried} <= done - carried
    results = {result.sop_instance_uid: result.job_key for result in bench.storage.jobs.results()}
    assert sorted(results.values()) == sorted(done - carried), "something made twice, or of nothing"
    assert sorted(row.sop_instance_uid for row in bench.storage.jobs.deliveries()) == sorted(results), "something to deliver twice"


def test_40_studies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with a_bench(f"sqlite:///{tmp_path / 'dicomnode.sqlite'}", tmp_path) as bench:
        run(bench, 40)
    (tmp_path / "dicomnode.toml").write_text('[node]\ndata = "."\n', encoding="utf-8")
    config = ["--config", str(tmp_path / "dicomnode.toml")]
    gap = f"1.2.826.0.1.{KINDS.index('gap') + 1}"
    capsys.readouterr()
    assert run_command(["study", "show", gap, "--json", *config]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    (series,) = shown["revisions"][0]["facts"]["series"]
    assert (series["numbers"], series["absent"], series["slices"]) == ("gap", "8 is absent", "gap")
    assert run_command(["study", "show", gap, *config]) == 0
    assert "evident of series" in capsys.readouterr().out
    check_routes(config, capsys)


def check_routes(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """How a study closes is a matter of its routes, for the administrator."""
    add = ["route", "add", "x", "--package", "stub", "--to", "SCANNER", *config]
    assert run_command([*add, "--completeness-peer", "NOBODY"]) == 2
    assert "there is no peer 'NOBODY'" in capsys.readouterr().err
    assert run_command([*add, "--early", "--longest-wait", "90", "--completeness-peer", "SCANNER"]) == 0
    assert run_command(["route", "list", "--json", *config]) == 0
    (route,) = (row for row in json.loads(capsys.readouterr().out) if row["name"] == "x")
    assert (route["early"], route["longest_wait_seconds"], route["completeness_peer"]) == (True, 90.0, "SCANNER")


@pytest.mark.long
def test_300_studies(database_url: str, tmp_path: Path) -> None:
    with a_bench(database_url, tmp_path) as bench:
        run(bench, 300)
