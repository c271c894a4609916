"""Each peer gets the objects of its display profile and no others, of findings as of reasons, and a retry makes the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest

from dicomnode.cli import run
from dicomnode.completion import close_complete_studies, reanalyse
from dicomnode.config import Settings
from dicomnode.engine import EngineClient
from dicomnode.phantoms.studies import write_check_study
from dicomnode.pipeline import Analyser
from storage.records import Peer

sys.path.insert(0, str(Path(__file__).parent))
from test_prefetch import Desk

LABEL_MAP, KEY_OBJECTS, STATE = (f"1.2.840.10008.5.1.4.1.1.{ending}" for ending in ("66.7", "88.59", "11.1"))
SEGMENTATION, REPORT, PLAIN_REPORT, CAPTURE = (
    f"1.2.840.10008.5.1.4.1.1.{ending}" for ending in ("66.4", "88.34", "88.33", "7")
)  # Segmentation, Comprehensive 3D SR, Comprehensive SR, Secondary Capture Image Storage


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_check_study(folder, "profiles")
    return folder


def modality(image: pydicom.Dataset) -> str:
    return str(image.Modality)


class Site(Desk):
    """A desk whose route has a destination for each profile."""

    def __init__(self, folder: Path, studies: Path, *, form: dict[str, Any] | None = None, **profiles: tuple[str, ...]) -> None:
        super().__init__(folder, studies)
        self.client = EngineClient(self.url)
        for name, objects in profiles.items():
            peer = Peer(ae_title=name, host="127.0.0.1", port=104, sends=False, receives=True, tls=False, client_cert=None)
            self.storage.registry.add_peer(replace(peer, objects=objects, **(form or {})))
        (route,) = self.storage.registry.routes()
        self.storage.registry.add_route(replace(route, to_ae_titles=tuple(profiles), report_refusals=True))

    def analyse(self, files: list[Path], *, stated: int | None = None) -> str:
        """Receive and analyse; return how the job ended."""
        self.receive(files, stated=stated)
        now = datetime.now(UTC)
        close_complete_studies(self.storage, self.client, now + timedelta(hours=1), up_since=now)
        (job,) = self.storage.jobs.jobs(study_instance_uid=self.study, kind="analyse")
        Analyser(Settings.model_validate({"analysis": {"device": "cpu"}}), self.storage, self.client).analyse(job.key, 0)
        ended = self.storage.jobs.job(job.key)
        assert ended is not None
        return ended.state

    def given(self) -> dict[str, list[str]]:
        """The SOP classes on their way to each peer."""
        classes = {result.sop_instance_uid: result.sop_class_uid for result in self.storage.jobs.results(study_instance_uid=self.study)}
        rows = self.storage.jobs.deliveries(study_instance_uid=self.study)
        return {peer: sorted({classes[row.sop_instance_uid] for row in rows if row.peer == peer}) for peer in {row.peer for row in rows}}


@pytest.fixture
def site(tmp_path: Path, study: Path) -> Iterator[Site]:
    site = Site(
        tmp_path,
        study,
        VIEWER=("seg", "sr"),
        PLAIN=("key-image",),
        BOTH=("seg", "sr-comprehensive", "key-image", "key-object", "presentation-state"),
        LABELS=("seg-labelmap", "sr"),
    )
    yield site
    site.client.close()
    site.storage.database.close()


def test_each_peer_is_given_the_objects_of_its_profile(site: Site) -> None:
    assert site.analyse(site.files) == "done"
    assert site.given() == {
        "VIEWER": sorted([SEGMENTATION, REPORT]),
        "PLAIN": [CAPTURE],
        "BOTH": sorted([SEGMENTATION, PLAIN_REPORT, CAPTURE, KEY_OBJECTS, STATE]),
        "LABELS": sorted([LABEL_MAP, REPORT]),
    }
    rows = site.storage.jobs.deliveries(study_instance_uid=site.study)
    files = {result.sop_instance_uid: site.storage.objects.path(result.stored.object_id) for result in site.storage.jobs.results()}
    for peer in ("VIEWER", "LABELS"):  # each report refers to the segmentation that goes with it
        segmentation, report = sorted((pydicom.dcmread(files[row.sop_instance_uid]) for row in rows if row.peer == peer), key=modality)
        assert str(segmentation.SOPInstanceUID) in report.to_json()


def test_a_reason_is_told_in_the_words_that_a_peer_can_show(site: Site) -> None:
    assert site.analyse(site.files[:3]) == "refused"
    assert site.given() == {"VIEWER": [REPORT], "PLAIN": [CAPTURE], "BOTH": sorted([PLAIN_REPORT, CAPTURE]), "LABELS": [REPORT]}


@pytest.mark.parametrize("images", [None, 3])
def test_what_was_analysed_or_not_of_an_incomplete_study_says_so_in_each_report(tmp_path: Path, study: Path, images: int | None) -> None:
    site = Site(tmp_path, study, VIEWER=("seg", "sr"), PLAIN=("sr-comprehensive", "key-image"))
    files = site.files[:images]
    assert site.analyse(files, stated=500) == ("done" if images is None else "refused")
    words = f"The study was incomplete when it was analysed: series 2: {len(files)} of 500 images."
    (revision,) = site.storage.index.revisions(site.study)
    assert revision.evidence.startswith(f"incomplete: series 2: {len(files)} of 500 images; ")
    results = [result for result in site.storage.jobs.results() if result.sop_class_uid in {REPORT, PLAIN_REPORT}]
    assert len(results) == 2
    for result in results:
        report = pydicom.dcmread(site.storage.objects.path(result.stored.object_id))
        assert any(words in text for text in texts(report)), texts(report)
    (job,) = site.storage.jobs.jobs(kind="analyse")
    assert images is None or words in str(job.reason)
    site.client.close()
    site.storage.database.close()


def texts(content: pydicom.Dataset) -> list[str]:
    """What a report says in words."""
    mine = [str(content.TextValue)] if content.get("ValueType") == "TEXT" else []
    return mine + [text for item in content.get("ContentSequence", ()) for text in texts(item)]


def test_pictures_are_made_only_where_somebody_is_given_them(tmp_path: Path, study: Path) -> None:
    site = Site(tmp_path, study, VIEWER=("seg", "sr"))
    assert site.analyse(site.files) == "done"
    assert {result.sop_class_uid for result in site.storage.jobs.results()} == {SEGMENTATION, REPORT}
    site.client.close()
    site.storage.database.close()


def test_a_route_gives_its_peers_what_it_names_and_each_peer_its_own_form(tmp_path: Path, study: Path) -> None:
    site = Site(tmp_path, study, form={"seg_per": "finding", "empty_frames": True}, VIEWER=("seg", "sr"), ARCHIVE=("sr",))
    (route,) = site.storage.registry.routes()
    site.storage.registry.add_route(replace(route, name="a", to_ae_titles=("VIEWER",), objects=("sr", "presentation-state")))
    site.storage.registry.add_route(replace(route, name="b", to_ae_titles=("VIEWER",), objects=("key-image",)))  # named later
    assert site.analyse(site.files) == "done"
    assert site.given() == {"VIEWER": sorted([STATE, REPORT]), "ARCHIVE": [REPORT]}
    (job,) = site.storage.jobs.jobs(study_instance_uid=site.study, kind="analyse")
    assert job.objects == {"VIEWER": ("sr", "presentation-state")}
    for name in ("a", "b"):
        site.storage.registry.remove_route(name)
    (key,) = reanalyse(site.storage, site.client, next(iter(site.storage.index.studies())))
    Analyser(Settings.model_validate({"analysis": {"device": "cpu"}}), site.storage, site.client).analyse(key, 0)
    made = {result.sop_instance_uid: result for result in site.storage.jobs.results(job_key=key)}
    rows = [
        row for row in site.storage.jobs.deliveries(study_instance_uid=site.study) if row.peer == "VIEWER" and row.sop_instance_uid in made
    ]
    objects = [pydicom.dcmread(site.storage.objects.path(made[row.sop_instance_uid].stored.object_id)) for row in rows]
    (report,) = (one for one in objects if one.Modality == "SR")
    segmentations = [one for one in objects if one.Modality == "SEG"]
    assert [len(one.SegmentSequence) for one in segmentations] == [1] * len(job.detail["findings"])
    for one in segmentations:
        assert one.NumberOfFrames == len(site.files)
        assert str(one.SOPInstanceUID) in report.to_json()
    site.client.close()
    site.storage.database.close()


def test_a_profile_is_a_field_of_the_peer_for_the_administrator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", str(tmp_path / "node")]) == 0
    config = ["--config", str(tmp_path / "node" / "dicomnode.toml")]
    add = ["peer", "add", "PACS", "pacs.example", "104", *config]
    for options, said in (
        (["--sends", "--profile", "plain"], "need --receives"),
        (["--receives", "--profile", "fancy"], "'fancy' is no display profile: standard, plain, ohif, orthanc"),
        (["--receives", "--object", "seg"], "no finding must be said"),
        (["--sends", "--empty-frames"], "need --receives"),
        (["--receives", "--seg-per", "slice"], "'slice'"),
        (["--receives", "--object", "gif"], "'gif' is no kind of result object"),
    ):
        assert run([*add, *options]) == 2
        assert said in capsys.readouterr().err
    site = tmp_path / "site.toml"
    for number, (options, objects) in enumerate(
        (([], '"seg", "sr"'), (["--profile", "plain"], '"key-image"'), (["--object", "key-image", "--object", "seg"], '"seg", "key-image"'))
    ):
        assert run([*add, "--receives", *options]) == 0
        file = site.with_stem(f"site{number}")
        assert run(["registry", "export", str(file), *config]) == 0
        assert f"objects = [{objects}]" in file.read_text(encoding="utf-8")
        assert run(["registry", "import", str(file), *config]) == 0
    assert run(["peer", "list", *config]) == 0
    assert "seg, key-image" in capsys.readouterr().out
    assert run([*add, "--receives", "--seg-per", "finding", "--empty-frames"]) == 0
    assert run(["registry", "export", str(site.with_stem("form")), *config]) == 0
    assert 'seg_per = "finding"\nempty_frames = true\n' in site.with_stem("form").read_text(encoding="utf-8")
    assert run(["registry", "import", str(site.with_stem("form")), *config]) == 0
    assert run(["peer", "list", "--json", *config]) == 0
    assert '"seg_per": "finding"' in capsys.readouterr().out
    file.write_text(file.read_text(encoding="utf-8").replace('"seg", "key-image"', '"seg"'), encoding="utf-8")
    assert run(["registry", "import", str(file), *config]) == 2
    assert "no finding must be said" in capsys.readouterr().err
