"""Images that a peer holds and that did not come are asked for by instance, a few times and no more, before their study is closed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import hostile_archive
import pytest
from held_objects import keep, receiving_node
from hostile_archive import Archive, an_image, running

from dicomnode.completion import Seen, close_complete_studies
from dicomnode.config import MissingSection, Settings
from dicomnode.dimse.find import FindLimits
from dicomnode.dimse.retrieving import Retriever
from dicomnode.engine import EngineClient, prepare_engine
from dicomnode.evidence import FetchEvidence
from dicomnode.inquiry import Inquirer, Inquiry
from dicomnode.missing import MissingImages
from dicomnode.reception import Reception
from pacs import wait_until
from storage import Storage
from storage.records import Revision, Route

STUDY = "1.2.3.1"
QUIET, AGAIN, LONGEST = 300.0, 1000.0, 6000.0  # far apart, as the time that the test itself takes counts, too
PATIENCE = 120.0


class Site:
    """A node that listens and closes studies at times of the test's choice, with an archive that it asks for what is missing."""

    def __init__(self, storage: Storage, client: EngineClient, archive: Archive, settings: MissingSection) -> None:
        self.storage, self.client, self.archive = storage, client, archive
        limits = FindLimits(seconds=PATIENCE)
        self.inquiry = Inquiry(storage, Inquirer(calling_ae_title="DICOMNODE", limits=limits, again_seconds=0.05, alone_seconds=0.0))
        reception = Reception(Settings().listener, storage)
        retriever = Retriever("DICOMNODE", None, reception.begin, reception.ended)
        self.missing = MissingImages(storage, settings, retriever)
        self.seen = Seen(storage)

    def look(self, seconds: float) -> list[Revision]:
        """Close what is complete so many seconds from now."""
        now = datetime.now(UTC)
        return close_complete_studies(
            self.storage, self.client, now + timedelta(seconds=seconds), up_since=now - timedelta(days=1), seen=self.seen,
            inquiry=self.inquiry, missing=self.missing,
        )  # fmt: skip

    def receive(self, *numbers: int) -> None:
        """Receive images from the scanner, whose association ends."""
        for number in numbers:
            keep(self.storage, an_image(STUDY, number))
        self.storage.index.mark_released({STUDY})

    def answered(self, absent: int) -> bool:
        """Whether the archive has said of the study as it is now that so many of its images aren't here."""
        study = self.storage.index.study(STUDY)
        assert study is not None
        return [(peer.state, peer.absent) for peer in self.inquiry.evidence(study, ["PACS"])] == [("answered", absent)]

    def fetches(self) -> tuple[FetchEvidence, ...]:
        study = self.storage.index.study(STUDY)
        assert study is not None
        return self.missing.evidence(study)

    def ended(self, tries: int) -> bool:
        """Whether so many tries have ended."""
        return [(fetch.state, fetch.tries) for fetch in self.fetches()] == [("ended", tries)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    with receiving_node(tmp_path) as (storage, receiver), running(Archive()) as archive:
        prepare_engine(url)
        client = EngineClient(url)
        archive.node_port = receiver.port
        archive.images = [an_image(STUDY, number) for number in range(1, 6)]
        storage.registry.add_peer(archive.peer())
        route = Route(
            name="r", from_ae_title="SCANNER", called_ae_title="*", package="none", version=None, to_ae_titles=(), priority=None,
            quiet_seconds=QUIET, report_refusals=False, longest_wait_seconds=LONGEST, completeness_peer="PACS", fetch_missing=True,
        )  # fmt: skip
        storage.registry.add_route(route)
        storage.registry.add_route(replace(route, name="other", from_ae_title="PACS", package="other", completeness_peer=None))
        site = Site(storage, client, archive, MissingSection(tries=2, again_seconds=AGAIN, maximum_instances=10))
        yield site
        site.missing.stop()
        site.inquiry.stop()
        client.close()


@pytest.mark.parametrize("way", ["move", "get"])
def test_exactly_what_is_missing_is_fetched_and_makes_no_revision_of_its_own(site: Site, way: Literal["move", "get"]) -> None:
    site.storage.registry.add_peer(site.archive.peer(retrieve_by=way))
    site.receive(1, 2, 4)
    wait_until(lambda: site.answered(2), what="the archive's answer", every=0.02)
    assert site.look(QUIET - 240) == []
    assert site.archive.retrieved == [], "nothing is asked for while the scanner may still send it"
    assert site.look(QUIET + 5) == []
    wait_until(lambda: site.ended(1), what="the end of the fetch", every=0.02)
    ((kind, asked),) = site.archive.retrieved
    assert (kind, asked.QueryRetrieveLevel, sorted(asked.SOPInstanceUID)) == (way, "IMAGE", [f"{STUDY}.1.3", f"{STUDY}.1.5"])
    wait_until(lambda: site.answered(0), what="the archive's second answer", every=0.02)
    wait_until(lambda: bool(site.storage.index.study(STUDY).released_at), what="the association's end", every=0.02)  # type: ignore[union-attr]
    revisions: list[Revision] = []

    def closed() -> bool:
        revisions.extend(site.look(QUIET + 5))
        return bool(revisions)

    wait_until(closed, what="the revision", every=0.05)
    (revision,) = revisions
    assert (revision.number, revision.incomplete) == (1, ())
    assert revision.evidence.endswith("2 image(s) were fetched from PACS")
    assert revision.facts["fetched"] == [
        {"peer": "PACS", "state": "ended", "tries": 1, "instances": 2, "arrived": 2, "reason": ""}
    ]  # fmt: skip
    assert len(site.storage.index.instances(STUDY, 1)) == 5
    # The archive's own route is not that of a study that it helped out with: the scanner's alone names a package.
    assert revision.outcome == "package none is not enabled"
    assert site.look(2 * LONGEST) == []


def test_a_peer_that_does_not_send_what_it_holds_is_asked_a_few_times(site: Site) -> None:
    site.archive.sending = hostile_archive.of_another_patient
    site.storage.registry.add_peer(site.archive.peer(retrieve_by="get"))
    site.receive(1, 2, 3, 4)
    wait_until(lambda: site.answered(1), what="the archive's answer", every=0.02)
    assert site.look(QUIET + 5) == []
    wait_until(lambda: site.ended(1), what="the end of the first try", every=0.02)
    assert site.look(QUIET + 100) == []
    assert site.ended(1), "the time to ask again has not come"
    assert site.look(QUIET + AGAIN + 100) == []
    wait_until(lambda: site.ended(2), what="the end of the second try", every=0.02)
    assert site.look(QUIET + 3 * AGAIN) == []
    assert site.ended(2), "it was asked often enough"
    assert len(site.archive.retrieved) == 2
    (revision,) = site.look(QUIET + LONGEST + 5)
    assert revision.incomplete == ("PACS holds 1 image(s) that aren't here", "PACS was asked 2 time(s) for what it holds")
    (fetched,) = revision.facts["fetched"]
    assert (fetched["tries"], fetched["arrived"]) == (2, 0)
    assert fetched["reason"] == "1 object(s) were refused: the instance is of another patient than the one demanded"


def test_a_study_waits_for_what_is_on_its_way(site: Site) -> None:
    site.archive.sending = hostile_archive.half_and_wait
    site.receive(1, 2, 3)
    wait_until(lambda: site.answered(2), what="the archive's answer", every=0.02)
    assert site.look(QUIET + 5) == []
    wait_until(lambda: len(site.storage.index.instances(STUDY)) == 4, what="the first of two", every=0.02)
    assert site.look(10 * LONGEST) == []
    assert [(fetch.state, fetch.instances) for fetch in site.fetches()] == [("asked", 2)]
    site.archive.goes_on.set()
    wait_until(lambda: site.ended(1), what="the end of the fetch", every=0.02)
    assert [fetch.arrived for fetch in site.fetches()] == [2]


def test_too_much_is_not_asked_for_and_a_node_that_stops_cancels(site: Site) -> None:
    site.archive.images += [an_image(STUDY, number) for number in range(6, 20)]
    site.receive(1, 2, 3)
    wait_until(lambda: site.answered(16), what="the archive's answer", every=0.02)
    assert site.look(QUIET + 5) == []
    wait_until(lambda: site.ended(1), what="the end of the try", every=0.02)
    assert site.archive.retrieved == []
    assert [fetch.reason for fetch in site.fetches()] == ["not fetched: 16 instances, and the limit is 10"]
    site.archive.images, site.archive.sending = site.archive.images[:5], hostile_archive.half_and_wait
    wait_until(lambda: site.answered(2), what="the archive's second answer", every=0.02)
    assert site.look(QUIET + AGAIN + 100) == []
    wait_until(lambda: bool(site.archive.retrieved), what="the second try to begin", every=0.02)
    site.missing.stop()
    assert site.archive.cancelled.wait(PATIENCE)
    assert [fetch.reason for fetch in site.fetches()] == ["it was not wanted any more, or too much"]
