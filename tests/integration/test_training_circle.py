"""The circle: DICOM images with SEG objects become a data set, a network, a package that the node runs, and the next study's SEG."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dicomnode.cli import run
from dicomnode.completion import close_complete_studies
from dicomnode.config import load_settings
from dicomnode.engine import EngineClient, prepare_engine
from dicomnode.pipeline import Analyser
from dicomnode.training.dataset import load_dataset, read_case
from storage import Storage, open_storage
from storage.records import InstanceHeader, Job, Route

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "dicomnode"))
from labelled_studies import DIAMETER_MM, SHAPE, SPACING, Point, ball, read_series, write_seg, write_study

pytestmark = pytest.mark.usefixtures("logs_restored")

NEXT: Point = (9.0, -3.0, 6.0)  # LPS mm, where the next study's ball is
RECIPE = """
[data]
kind = "dataset"
patch = [8, 24, 24]
channels = ["image"]
labels = ["Lung nodule"]
foreground = 0.6
augmentation = { flip_axes = ["row", "column"], noise = 0.5, noise_deviation = 0.02 }

[network]
name = "UNet"
[network.arguments]
spatial_dims = 3
in_channels = 1
out_channels = 1
channels = [4, 8]
strides = [2]

[training]
seed = 3
steps = 120
batch = 2
learning_rate = 2e-2
weight_decay = 0.0
warm_up_steps = 2
ema_decay = 0.9
bce_weight = 1.0
worst_weight = 0.5
worst_share = 0.1
dice_weight = 1.0
clip_norm = 5.0
checkpoint_every = 120
workers = 0

[validation]
every = 40
patches = 4

[package]
schema = 1
name = "bright-ball"
version = "1.0"
title = "Bright balls"
manufacturer = "dicomnode"
algorithm_name = "bright ball"
licence = "Apache-2.0"
intended_use = "RESEARCH USE ONLY. Not for diagnosis."
training_data = "Made for a test."
kind = "segmentation"

[package.input]
modality = "CT"
sop_classes = ["1.2.840.10008.5.1.4.1.1.2"]

[package.preprocessing]
spacing_mm = [2.5, 1.0, 1.0]
window = [-1000.0, 200.0]

[package.inference]
window = [16, 48, 48]

[[package.outputs]]
channel = 0
label = "Lung nodule"
minimum_ml = 0.2
category = { value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }
type = { value = "27925004", scheme = "SCT", meaning = "Nodule" }
"""


class Desk:
    """A node's folder, its commands, and an analyser that is handed its jobs by the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done("init", folder)
        self.config = folder / "dicomnode.toml"
        self.settings = load_settings(self.config)
        self.done("package", "list", "--config", self.config)  # makes the storage
        prepare_engine(self.settings.database_url)
        self.storage: Storage = open_storage(self.settings.database_url, self.settings.data_folder)
        self.client = EngineClient(self.settings.database_url)

    def done(self, *words: str | Path) -> None:
        assert run([str(word) for word in words]) == 0

    def send(self, study: Path) -> None:
        """Store a study's images as the receiver does."""
        for file in sorted(study.glob("*.dcm")):
            image = pydicom.dcmread(file, stop_before_pixels=True)
            stored = self.storage.objects.put(file.read_bytes())
            header = InstanceHeader(
                sop_instance_uid=str(image.SOPInstanceUID), sop_class_uid=str(image.SOPClassUID),
                transfer_syntax_uid=str(image.file_meta.TransferSyntaxUID), series_instance_uid=str(image.SeriesInstanceUID),
                study_instance_uid=str(image.StudyInstanceUID), dataset_sha256=stored.sha256, kind="image", modality="CT",
                instance_number=None, patient_id=str(image.PatientID), patient_name="N", study_date="20260101", study_description="",
                accession_number="", series_number=2, series_description="", requested_priority="routine",
                calling_ae_title="SCANNER", called_ae_title="NODE",
            )  # fmt: skip
            assert self.storage.index.add_instance(header, stored) == "stored"

    def analyse(self) -> Job:
        """Close what was sent and do its job."""
        now = datetime.now(UTC)
        close_complete_studies(self.storage, self.client, now + timedelta(hours=1), up_since=now)
        (job,) = self.storage.jobs.jobs(kind="analyse", state="queued")
        Analyser(self.settings, self.storage, self.client).analyse(job.key, 1)
        ended = self.storage.jobs.job(job.key)
        assert ended is not None
        return ended


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "node")
    yield desk
    desk.client.close()
    desk.storage.database.close()


def random_place(rng: np.random.Generator) -> Point:
    """Somewhere in the volume, wholly inside."""
    half = (np.array(SHAPE) - 1) * SPACING / 2 - DIAMETER_MM / 2 - 1
    z, y, x = (rng.uniform(-1, 1, 3) * half).tolist()
    return (x, y, z - 1.0)


def test_what_was_marked_is_learnt_and_found_in_the_next_study(tmp_path: Path, desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    for number in range(6):
        place = random_place(rng)
        write_seg(write_study(tmp_path / "marked" / f"{number}", f"marked {number}", centres=[place], patient_id=f"P{number}"), [place])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE, encoding="utf-8")

    dataset = tmp_path / "dataset"
    desk.done("dataset", "build", dataset, tmp_path / "marked", "--model", recipe, "--shares", "0.67,0.33,0")
    desk.done("dataset", "check", dataset)
    desk.done("train", recipe, "--data", dataset, "--out", tmp_path / "run", "--device", "cpu")
    desk.done("package", "add", tmp_path / "run" / "package", "--config", desk.config)
    desk.done("package", "check", "bright-ball", "--config", desk.config)
    desk.done("package", "enable", "bright-ball", "--config", desk.config)
    desk.storage.registry.add_route(
        Route(name="r", from_ae_title="*", called_ae_title="*", package="bright-ball", version=None, to_ae_titles=(), priority=None,
              quiet_seconds=1, report_refusals=False)
    )  # fmt: skip
    study = write_study(tmp_path / "next", "next", centres=[NEXT], patient_id="NEXT")
    desk.send(study)
    job = desk.analyse()

    assert job.state == "done", job.reason
    (finding,) = job.detail["findings"]
    assert np.linalg.norm(np.subtract(finding["centre_lps_mm"], NEXT)) < 1.5
    volume = read_series(study)
    true_ml = ball(volume, NEXT).sum() * volume.voxel_ml
    assert finding["volume_ml"] == pytest.approx(true_ml, rel=0.5)

    # and round again: what the node found is a data set of its own
    again = tmp_path / "again"
    capsys.readouterr()
    desk.done("dataset", "build", again, "--results-of", "bright-ball@1.0", "--shares", "0,0,1", "--config", desk.config, "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert row["labels"] == {"Lung nodule": "present"}
    read = load_dataset(again)
    case = read_case(read, read.of_split("test")[0])
    assert np.array_equal(case.volumes["image"].voxels, volume.voxels)
    assert case.truth.sum() * volume.voxel_ml == pytest.approx(finding["volume_ml"])
    overlap = 2 * (case.truth[0] & ball(volume, NEXT)).sum() / (case.truth[0].sum() + ball(volume, NEXT).sum())
    assert overlap > 0.7
