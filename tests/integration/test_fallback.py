"""What a peer is sent of which it doesn't accept SOP class or transfer syntax: the same in its place, on the same association."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from lying_pacs import LyingPacs, lying_pacs, uids
from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID, PYNETDICOM_IMPLEMENTATION_VERSION

from dicomnode.config import Settings
from dicomnode.delivery import Sender
from dicomnode.dimse.recoding import recoded, simpler_class
from dicomnode.phantoms.studies import write_check_study
from dicomweb_site import deciding
from storage.records import Delivery, Quirks

sys.path.insert(0, str(Path(__file__).parent))
from test_display_profiles import LABEL_MAP, PLAIN_REPORT, REPORT, SEGMENTATION, Site

EXPLICIT, IMPLICIT, RLE = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.5"
ALL = {(LABEL_MAP, RLE), (SEGMENTATION, EXPLICIT), (REPORT, EXPLICIT), (PLAIN_REPORT, EXPLICIT)}


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site whose analysis is on its way to peers with different profiles."""
    studies = tmp_path_factory.mktemp("study")
    write_check_study(studies, "fallback")
    site = Site(
        tmp_path_factory.mktemp("site"),
        studies,
        LABELS=("seg-labelmap", "sr"),
        PACS=("seg-labelmap", "sr"),
        SHARES=("seg-fractional", "sr"),
    )
    assert site.analyse(site.files) == "done"
    yield site
    site.client.close()
    site.storage.database.close()


@pytest.fixture
def pacs(analysed: Site) -> Iterator[LyingPacs]:
    with lying_pacs() as pacs:
        yield pacs


def accept(pacs: LyingPacs, pairs: set[tuple[str, str]]) -> None:
    """Let the PACS accept these pairs of SOP class and transfer syntax alone, and keep what it gets."""
    syntaxes: dict[str, list[str]] = {}
    for sop_class, syntax in sorted(pairs):
        syntaxes.setdefault(sop_class, []).append(syntax)
    pacs.entity.supported_contexts = []
    for sop_class, accepted in syntaxes.items():
        pacs.entity.add_supported_context(sop_class, accepted)
    pacs.entity.add_supported_context("1.2.840.10008.1.20.1", [EXPLICIT])
    pacs.server.contexts = pacs.entity.supported_contexts


def deliver(site: Site, pacs: LyingPacs, name: str = "PACS", sender: Sender | None = None) -> list[Delivery]:
    """Send what waits for a peer as if it had never been sent; return its rows, the segmentation first."""
    known = site.storage.registry.peer(name)
    assert known is not None
    site.storage.registry.add_peer(replace(known, port=pacs.peer.port, commits=pacs.commits))
    return sent_anew(site, name, sender)


def sent_anew(site: Site, name: str, sender: Sender | None = None) -> list[Delivery]:
    (job,) = (job for job in site.storage.jobs.jobs(kind="deliver") if job.peer == name)
    for row in site.storage.jobs.deliveries(job_key=job.key):
        site.storage.jobs.record_delivery(row.sop_instance_uid, name, state="failed")
    site.storage.jobs.requeue(job.key)
    (sender or Sender(Settings(), site.storage, site.client)).deliver(job.key, 0)
    classes = {result.sop_instance_uid: result.modality for result in site.storage.jobs.results()}
    return sorted(site.storage.jobs.deliveries(job_key=job.key), key=lambda row: classes[row.sop_instance_uid])


@pytest.mark.parametrize(
    ("refused", "extra", "expected"),
    [
        (set(), set(), [(LABEL_MAP, RLE), (REPORT, EXPLICIT)]),
        ({(REPORT, EXPLICIT)}, set(), [(LABEL_MAP, RLE), (PLAIN_REPORT, EXPLICIT)]),
        ({(LABEL_MAP, RLE)}, {(LABEL_MAP, EXPLICIT)}, [(LABEL_MAP, EXPLICIT), (REPORT, EXPLICIT)]),
        ({(LABEL_MAP, RLE)}, {(LABEL_MAP, IMPLICIT)}, [(LABEL_MAP, IMPLICIT), (REPORT, EXPLICIT)]),
        ({(LABEL_MAP, RLE)}, set(), [(SEGMENTATION, EXPLICIT), (REPORT, EXPLICIT)]),
        (ALL, {(SEGMENTATION, IMPLICIT), (PLAIN_REPORT, IMPLICIT)}, [(SEGMENTATION, IMPLICIT), (PLAIN_REPORT, IMPLICIT)]),
    ],
)
def test_a_peer_gets_the_best_that_it_accepts_and_always_the_same_bytes(
    analysed: Site, pacs: LyingPacs, refused: set[tuple[str, str]], extra: set[tuple[str, str]], expected: list[tuple[str, str]]
) -> None:
    accept(pacs, (ALL - refused) | extra)
    segmentation, report = deliver(analysed, pacs)
    assert [row.state for row in (segmentation, report)] == ["sent", "sent"]
    assert len(pacs.associations) == 1
    files = {uid: pydicom.dcmread(BytesIO(data)) for uid, data in pacs.files.items()}
    sent = [files[row.at_peer] for row in (segmentation, report)]
    assert [(one.SOPClassUID, one.file_meta.TransferSyntaxUID) for one in sent] == expected
    for row, one, usual in zip((segmentation, report), sent, [(LABEL_MAP, RLE), (REPORT, EXPLICIT)], strict=True):
        as_wanted = (one.SOPClassUID, one.file_meta.TransferSyntaxUID) == usual and row.sent_as is None
        assert (row.note is None) == as_wanted
        assert as_wanted or "the peer does not accept" in (row.note or "")
    assert str(sent[0].SOPInstanceUID) in sent[1].to_json()  # the report refers to the segmentation that the peer has
    first = dict(pacs.files)
    deliver(analysed, pacs)
    assert pacs.files == first
    assert set(pacs.stored.values()) == {2}


def test_an_accepted_context_whose_objects_are_refused_by_their_class_is_as_good_as_refused(analysed: Site, pacs: LyingPacs) -> None:
    accept(pacs, ALL)
    results = {result.sop_instance_uid: result.sop_class_uid for result in analysed.storage.jobs.results()}
    pacs.store_status = lambda uid: 0x0122 if results.get(uid) in {LABEL_MAP, REPORT} else 0
    segmentation, report = deliver(analysed, pacs)
    assert results[segmentation.at_peer] == SEGMENTATION
    assert (report.sent_class, report.state) == (PLAIN_REPORT, "sent")


def test_a_segmentation_that_is_there_decides_for_a_report_that_comes_later(analysed: Site, pacs: LyingPacs) -> None:
    accept(pacs, ALL - {(LABEL_MAP, RLE)})
    pacs.store_status = lambda uid: 0 if uid in segmentations else 0xA700
    segmentations = {result.sop_instance_uid for result in analysed.storage.jobs.results() if result.modality == "SEG"}
    segmentation, report = deliver(analysed, pacs)
    assert (segmentation.state, report.state) == ("sent", "waiting")
    accept(pacs, ALL)  # it has learnt to take label maps meanwhile
    pacs.store_status = lambda _uid: 0
    (job,) = (job for job in analysed.storage.jobs.jobs(kind="deliver") if job.peer == "PACS")
    Sender(Settings(), analysed.storage, analysed.client).deliver(job.key, 1)
    document = next(one for one in map(pydicom.dcmread, map(BytesIO, pacs.files.values())) if one.Modality == "SR")
    assert segmentation.at_peer in document.to_json()
    assert segmentation.sop_instance_uid not in document.to_json()


def test_what_probing_found_out_holds_from_the_next_association_on_and_is_said_with_its_day(analysed: Site, pacs: LyingPacs) -> None:
    accept(pacs, ALL)
    sender = Sender(Settings(), analysed.storage, analysed.client)
    registry = analysed.storage.registry
    quirks = Quirks(
        probed_at=datetime(2026, 5, 4, tzinfo=UTC),
        implementation_class_uid=PYNETDICOM_IMPLEMENTATION_UID,
        implementation_version_name=PYNETDICOM_IMPLEMENTATION_VERSION,
        refuses={LABEL_MAP: (RLE, EXPLICIT, IMPLICIT)},
    )
    classes = {result.sop_instance_uid: result.sop_class_uid for result in analysed.storage.jobs.results()}
    for known, sent, said in (
        (None, LABEL_MAP, None),
        (quirks, SEGMENTATION, "on 2026-05-04, when it was"),
        (None, LABEL_MAP, None),
    ):
        peer = registry.peer("PACS")
        assert peer is not None
        registry.add_peer(replace(peer, quirks=known))
        assert registry.peer("PACS") == replace(peer, quirks=known)
        segmentation, report = deliver(analysed, pacs, sender=sender)
        assert (segmentation.state, report.state, classes[segmentation.at_peer]) == ("sent", "sent", sent)
        assert segmentation.note is None if said is None else said in str(segmentation.note)


def test_probabilities_go_native_where_rle_is_not_accepted(analysed: Site, pacs: LyingPacs) -> None:
    accept(pacs, {(SEGMENTATION, EXPLICIT), (REPORT, EXPLICIT)})
    pacs.ae_title = "SHARES"
    segmentation, _ = deliver(analysed, pacs, "SHARES")
    (result,) = (result for result in analysed.storage.jobs.results() if result.sop_instance_uid == segmentation.sop_instance_uid)
    stored = pydicom.dcmread(analysed.storage.objects.path(result.stored.object_id))
    sent = pydicom.dcmread(BytesIO(pacs.files[segmentation.at_peer]))
    assert (stored.file_meta.TransferSyntaxUID, sent.file_meta.TransferSyntaxUID) == (RLE, EXPLICIT)
    assert np.array_equal(stored.pixel_array, sent.pixel_array)
    assert stored.SegmentationType == sent.SegmentationType == "FRACTIONAL"


def test_the_peer_is_asked_to_commit_to_what_it_has(analysed: Site, pacs: LyingPacs) -> None:
    accept(pacs, {(SEGMENTATION, EXPLICIT), (PLAIN_REPORT, EXPLICIT)})
    pacs.commits = True
    rows = deliver(analysed, pacs)
    (request,) = pacs.requests
    assert sorted(uids(request)) == sorted(row.at_peer for row in rows)
    assert {sop_class for sop_class, _ in request.references} == {SEGMENTATION, PLAIN_REPORT}
    assert all(row.sent_as is not None for row in rows)


def refusing(*refused: tuple[str, str | None, int]) -> Callable[[pydicom.Dataset], int | None]:
    """A DICOMweb that gives these answers to these SOP classes in these transfer syntaxes, None being any."""

    def judge(dataset: pydicom.Dataset) -> int | None:
        syntax = dataset.file_meta.TransferSyntaxUID
        return next((verdict for one, of, verdict in refused if one == dataset.SOPClassUID and of in {None, syntax}), None)

    return judge


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        ((), [(LABEL_MAP, RLE), (REPORT, EXPLICIT)]),
        (((LABEL_MAP, RLE, 0xC122),), [(LABEL_MAP, EXPLICIT), (REPORT, EXPLICIT)]),
        (((LABEL_MAP, None, 0x0122), (REPORT, None, 415)), [(SEGMENTATION, EXPLICIT), (PLAIN_REPORT, EXPLICIT)]),
        (((LABEL_MAP, None, 0xA900), (REPORT, None, 0xC000)), [(SEGMENTATION, EXPLICIT), (PLAIN_REPORT, EXPLICIT)]),
    ],
)
def test_a_dicomweb_gets_the_best_that_it_does_not_refuse(
    analysed: Site, refused: tuple[tuple[str, str | None, int], ...], expected: list[tuple[str, str]]
) -> None:
    with deciding(refusing(*refused)) as (url, stored):
        segmentation, report = deliver_by_stow(analysed, url)
        assert [row.state for row in (segmentation, report)] == ["sent", "sent"]
        assert [(one.SOPClassUID, one.file_meta.TransferSyntaxUID) for one in stored] == expected
        assert [row.at_peer for row in (segmentation, report)] == [one.SOPInstanceUID for one in stored]
        assert str(stored[0].SOPInstanceUID) in stored[1].to_json()  # the report refers to the segmentation that the peer has
        for row, one in zip((segmentation, report), expected, strict=True):
            assert (row.note is None) == (one in {(LABEL_MAP, RLE), (REPORT, EXPLICIT)})


def test_a_dicomweb_that_takes_no_form_or_fails_for_another_reason_gets_no_second_object(analysed: Site) -> None:
    tried: list[tuple[str, str]] = []

    def judge(dataset: pydicom.Dataset) -> int | None:
        tried.append((dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID))
        return {LABEL_MAP: 0x0122, SEGMENTATION: 0xA900}.get(dataset.SOPClassUID, 400)

    with deciding(judge) as (url, stored):
        segmentation, report = deliver_by_stow(analysed, url)
    assert stored == []
    assert tried == [(LABEL_MAP, RLE), (SEGMENTATION, EXPLICIT), (REPORT, EXPLICIT)]  # 400 isn't of the form; Implicit VR isn't tried
    assert (segmentation.state, report.state) == ("failed", "failed")
    assert segmentation.error is not None
    assert "failure reason 0x0122: the peer does not take Label Map Segmentation Storage in RLE Lossless" in segmentation.error
    assert "1 other form(s)" in segmentation.error


def deliver_by_stow(site: Site, url: str) -> list[Delivery]:
    known = site.storage.registry.peer("PACS")
    assert known is not None
    site.storage.registry.add_peer(replace(known, stow_url=url, commits=False))
    try:
        return sent_anew(site, "PACS")
    finally:
        site.storage.registry.add_peer(replace(known, commits=False))


def test_a_report_with_coordinates_in_space_has_no_simpler_class(analysed: Site, tmp_path: Path) -> None:
    result = next(result for result in analysed.storage.jobs.results() if result.sop_class_uid == REPORT)
    document = pydicom.dcmread(analysed.storage.objects.path(result.stored.object_id))
    simpler = simpler_class(REPORT, result.sop_instance_uid)
    assert simpler is not None
    as_simple = pydicom.dcmread(BytesIO(recoded(Path(document.filename), *simpler, EXPLICIT)))
    assert (as_simple.SOPClassUID, as_simple.ContentSequence) == (PLAIN_REPORT, document.ContentSequence)
    document.ContentSequence[-1].ValueType = "SCOORD3D"
    document.save_as(tmp_path / "space.dcm")
    with pytest.raises(ValueError, match="another SOP class"):
        recoded(tmp_path / "space.dcm", *simpler, EXPLICIT)
