"""Volumes read before their job: of exactly the images that the revision holds, within the budget, or not at all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dicomnode import pipeline
from dicomnode.analysis.decoding import Decoder
from dicomnode.analysis.manifest import parse_manifest
from dicomnode.analysis.package import digest_of
from dicomnode.analysis.volume import read_volume
from dicomnode.completion import close_complete_studies
from dicomnode.config import Settings
from dicomnode.engine import EngineClient, prepare_engine
from dicomnode.phantoms.studies import write_check_study
from dicomnode.pipeline import Analyser
from dicomnode.prefetch import Prefetcher
from storage import open_storage, prepare_storage
from storage.records import InstanceHeader, Route

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "dicomnode"))
from small_bundle import MANIFEST, write_package

BUDGET = 2**28


class Desk:
    """A storage with one enabled package and a route to it."""

    def __init__(self, folder: Path, studies: Path) -> None:
        self.url = f"sqlite:///{folder / 'node.sqlite'}"
        prepare_storage(self.url, folder)
        prepare_engine(self.url)
        self.storage = open_storage(self.url, folder)
        self.files = sorted(studies.glob("*.dcm"))
        registry = self.storage.registry
        self.package = registry.package_folder("bright", "1.0")
        write_package(self.package, manifest=MANIFEST)
        registry.add_package("bright", "1.0", digest_of(self.package))
        registry.set_check("bright", "1.0", digest_of(self.package), {}, passed=True)
        registry.enable("bright", "1.0")
        registry.add_route(
            Route(name="r", from_ae_title="*", called_ae_title="*", package="bright", version=None, to_ae_titles=(), priority=None,
                  quiet_seconds=1, report_refusals=False)
        )  # fmt: skip
        self.study = ""

    def receive(self, files: list[Path], *, stated: int | None = None) -> None:
        """Put files into the store and the index; each says that its acquisition has `stated` images."""
        for file in files:
            image = pydicom.dcmread(file, stop_before_pixels=True)
            self.study = str(image.StudyInstanceUID)
            stored = self.storage.objects.put(file.read_bytes())
            header = InstanceHeader(
                sop_instance_uid=str(image.SOPInstanceUID), sop_class_uid=str(image.SOPClassUID),
                transfer_syntax_uid=str(image.file_meta.TransferSyntaxUID), series_instance_uid=str(image.SeriesInstanceUID),
                study_instance_uid=self.study, dataset_sha256=stored.sha256, kind="image", modality="CT", instance_number=None,
                patient_id=str(image.PatientID), patient_name=str(image.PatientName), study_date=str(image.StudyDate),
                study_description="", accession_number="", series_number=2,
                series_description="", requested_priority="routine", calling_ae_title="SCANNER", called_ae_title="NODE",
                images_in_acquisition=stated,
            )  # fmt: skip
            assert self.storage.index.add_instance(header, stored) == "stored"

    def prefetcher(self, maximum_bytes: int = BUDGET) -> Prefetcher:
        return Prefetcher(self.storage, Decoder(processes=1), maximum_bytes)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_check_study(folder, "prefetched")
    return folder


@pytest.fixture
def desk(tmp_path: Path, study: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path, study)
    yield desk
    desk.storage.database.close()


def test_a_study_that_is_quiet_is_read_and_taken_for_its_images_alone(desk: Desk) -> None:
    desk.receive(desk.files[:-1])
    prefetcher = desk.prefetcher()
    prefetcher.look()
    before = desk.storage.index.instances(desk.study)
    assert prefetcher.take(desk.study, before) is None  # it may still be receiving
    prefetcher.look()
    read = prefetcher.take(desk.study, before)
    assert read is not None
    manifest = parse_manifest(MANIFEST.encode(), Path("bright"))
    (series,) = read.selection(manifest).series
    volume = read.volume(series)
    assert volume is not None
    np.testing.assert_array_equal(volume.voxels, read_volume(series).voxels)

    desk.receive(desk.files[-1:])  # a late image
    after = desk.storage.index.instances(desk.study)
    assert prefetcher.take(desk.study, after) is None
    prefetcher.look()
    prefetcher.look()
    again = prefetcher.take(desk.study, after)
    assert again is not None
    assert len(again.headers) == len(desk.files)
    assert prefetcher.take(desk.study, before) is None


def test_a_volume_beyond_the_budget_is_not_held(desk: Desk) -> None:
    desk.receive(desk.files)
    prefetcher = desk.prefetcher(maximum_bytes=1000)
    prefetcher.look()
    prefetcher.look()
    read = prefetcher.take(desk.study, desk.storage.index.instances(desk.study))
    assert read is not None
    assert not read.volumes


def test_a_job_takes_what_was_read_while_its_study_was_open(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.receive(desk.files)
    prefetcher = desk.prefetcher()
    prefetcher.look()
    prefetcher.look()
    client = EngineClient(desk.url)
    now = datetime.now(UTC)
    close_complete_studies(desk.storage, client, now + timedelta(hours=1), up_since=now)
    (job,) = desk.storage.jobs.jobs(study_instance_uid=desk.study)

    def read_again(*_: object) -> None:
        raise AssertionError("it was read already")

    monkeypatch.setattr(pipeline, "read_volume", read_again)
    monkeypatch.setattr(pipeline, "read_headers", read_again)
    settings = Settings.model_validate({"analysis": {"device": "cpu"}})
    Analyser(settings, desk.storage, client, prefetcher=prefetcher).analyse(job.key, 0)
    ended = desk.storage.jobs.job(job.key)
    assert ended is not None
    assert ended.state == "done", ended.reason
    client.close()
