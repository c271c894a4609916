"""Bundles as the Model Zoo ships them: added, checked, enabled, and one study each to SEG and SR that prove themselves."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

import dicomnode.analysis.check
import dicomnode.cli.rehearsal
from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.inference import check_package, load_model
from dicomnode.analysis.package import load_package
from dicomnode.analysis.select import select
from dicomnode.analysis.volume import read_volume
from dicomnode.cli import run
from dicomnode.cli.packages import known_package
from dicomnode.config import load_settings
from dicomnode.demo.scanner import scan_folder, send_study
from dicomnode.findings import Findings, RunIdentity, Volume
from dicomnode.phantoms.dicom import MR, SeriesHeader, write_ct_series
from dicomnode.phantoms.film import DX, Film, write_film
from dicomnode.phantoms.studies import check_volume
from dicomnode.results.proof import prove
from dicomnode.results.report import encode_report
from dicomnode.results.segmentation import encode_segmentation
from pacs import LOOPBACK, SCANNER_AET, Node, free_port, wait_until
from storage import open_storage
from zoo_bundles import write_bundle

pytestmark = pytest.mark.usefixtures("logs_restored")


def cropped(volume: Volume) -> Volume:
    """The middle of a phantom: a check of form needs no more."""
    if volume.is_projection:
        return volume
    slices, rows, columns = volume.voxels.shape
    k, r, c = (slices - 12) // 2, (rows - 40) // 2, (columns - 40) // 2
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_lps(np.array([k, r, c], dtype=np.float64))
    voxels = np.ascontiguousarray(volume.voxels[k : k + 12, r : r + 40, c : c + 40])
    return replace(volume, voxels=voxels, affine=affine, sop_instance_uids=volume.sop_instance_uids[k : k + 12])


@cache
def phantom(modality: str, contrast: str = "", *, whole: bool = False) -> Volume:
    volume = check_volume(modality=modality, contrast=contrast, projection=modality == "DX")
    return volume if whole else cropped(volume)


def write_study(folder: Path, modality: str, contrasts: tuple[str, ...], *, whole: bool) -> list[Path]:
    """A study of the modality; one series for each contrast, all in one frame of reference."""
    header = SeriesHeader(seed=f"zoo {modality}", study_description="Synthetic", series_description="Synthetic", body_part="")
    if modality == "DX":
        film = Film(pixels=phantom("DX").voxels[0] / 4095.0, pixel_mm=1.5)
        return write_film(folder, film, replace(header, sop_class_uid=DX, body_part="CHEST"))
    files: list[Path] = []
    for number, contrast in enumerate(contrasts, start=2):
        volume = phantom(modality, contrast, whole=whole)
        series = replace(header, series_number=number, contrast=contrast, **({"sop_class_uid": MR} if modality == "MR" else {}))
        files += write_ct_series(folder / contrast, volume.voxels.astype(np.float32), volume.affine, series)
    return files


def small_phantoms(_: Path, manifest: Any) -> dict[str, Volume]:
    """What a package is checked with here."""
    return {
        accepts.name: phantom("DX" if accepts.dimensions == 2 else accepts.modalities[0], next(iter(accepts.mr_contrasts), ""))
        for accepts in manifest.inputs
    }


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node whose checks run in this process, on small phantoms of the right kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DICOMNODE_CONFIG", raising=False)
    assert run(["init"]) == 0

    def in_this_process(folder: Path, volumes: Mapping[str, Volume], *, digest: str | None = None, **_: Any) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(json.dumps(check_package(folder, volumes, digest=digest)))
        return report

    monkeypatch.setattr(dicomnode.cli.rehearsal, "check_volumes", small_phantoms)
    monkeypatch.setattr(dicomnode.analysis.check, "check_in_child", in_this_process)
    return tmp_path


def analysed(package: str, files: list[Path]) -> tuple[Findings, pydicom.Dataset | None, pydicom.Dataset]:
    """What the pipeline does with a study, without the queue: findings, SEG, SR, proven."""
    settings = load_settings(None)
    storage = open_storage(settings.database_url, settings.data_folder)
    record = known_package(storage, package)
    assert record.state == "enabled"
    folder = storage.registry.package_folder(record.name, record.version)
    manifest = load_package(folder).manifest
    selection = select(manifest, read_headers(files))
    volumes = {series.input_name: read_volume(series) for series in selection.series}
    findings = load_model(folder, digest=record.digest, device="cpu")(volumes)
    volume, headers = volumes[selection.series[0].input_name], selection.series[0].headers
    identity = RunIdentity(
        study_instance_uid=volume.study_instance_uid, revision=1, package=record.name, version=record.version, digest=record.digest, run=1,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    segmentation = encode_segmentation(findings, volume, headers, identity)
    every = [header for series in selection.series for header in series.headers]
    report = encode_report(findings, volume, every, identity, segmentation)
    prove(segmentation, report, findings, volume, others=tuple(volumes.values())[1:])
    read = [pydicom.dcmread(io.BytesIO(made.data)) if made else None for made in (segmentation, report)]
    assert read[1] is not None
    return findings, read[0], read[1]


@pytest.mark.parametrize(
    ("name", "modality", "contrasts"),
    [
        ("spleen_ct_segmentation", "CT", ("",)),
        pytest.param("brats_mri_segmentation", "MR", ("t1c", "t1", "t2", "flair"), marks=pytest.mark.long),
        ("wholeBody_ct_segmentation", "CT", ("",)),
        ("prostate_mri_anatomy", "MR", ("t2",)),
        ("lung_nodule_ct_detection", "CT", ("",)),
        ("cxr_densenet_classification", "DX", ()),
        ("renalStructures_UNEST_segmentation", "CT", ("",)),
        ("segmentation_template", "CT", ("",)),
    ],
)
def test_a_bundle_of_the_zoo_is_added_checked_enabled_and_makes_seg_and_sr(
    node: Path, capsys: pytest.CaptureFixture[str], name: str, modality: str, contrasts: tuple[str, ...]
) -> None:
    for command in (["add", str(write_bundle(node / "brought", name))], ["check", name.lower()], ["enable", name.lower()]):
        assert run(["package", *command]) == 0, capsys.readouterr().err
    findings, segmentation, report = analysed(name.lower(), write_study(node / "study", modality, contrasts, whole="detection" in name))
    assert len(findings.findings) <= 50
    assert all(0 <= finding.probability <= 1 for finding in findings.findings)
    assert (segmentation is None) == (not findings.findings)
    assert str(report.Modality) == "SR"
    shapes = {finding.shape for finding in findings.findings}
    if name == "lung_nodule_ct_detection":
        assert shapes == {"box"}
    elif name == "cxr_densenet_classification":
        assert sum(score.probability for score in findings.scores) == pytest.approx(1, abs=1e-4)
        assert shapes <= {"heat map"}
    else:
        assert shapes == {"outline"}
    assert len(findings.other_series) == max(0, len(contrasts) - 1)


def test_a_bundle_that_needs_what_is_not_installed_says_which(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "breast_density_classification"
    assert run(["package", "add", str(write_bundle(node / "brought", name))]) == 0
    capsys.readouterr()
    assert run(["package", "check", name]) != 0
    said = capsys.readouterr().err
    assert "needs torchvision, which isn't installed" in said
    assert said.count("\n") == 1
    assert run(["package", "enable", name]) != 0


def test_a_serving_node_runs_a_bundle_with_scripts_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomnode.cli.rehearsal, "check_volumes", small_phantoms)
    name = "renalstructures_unest_segmentation"
    write_study(tmp_path / "study", "CT", ("",), whole=False)
    node = Node(tmp_path / "node")
    try:
        node.cli("peer", "add", SCANNER_AET, LOOPBACK, free_port(), "--sends")
        node.cli("peer", "add", "PACS", LOOPBACK, free_port(), "--receives")
        node.cli("package", "add", write_bundle(tmp_path / "brought", "renalStructures_UNEST_segmentation"))
        (report,) = json.loads(node.cli("package", "check", name, "--json"))
        assert isinstance(report["network_isolated"], bool)
        node.cli("package", "enable", name)
        node.cli("route", "add", "ct", "--from", SCANNER_AET, "--package", name, "--to", "PACS", "--quiet", 1)
        node.start()
        (study,), _ = scan_folder(tmp_path / "study")
        assert send_study(study, node.peer, calling_ae_title=SCANNER_AET) == []

        def analysed_jobs() -> list[dict[str, Any]]:
            return [
                job for job in node.listing("job", "list") if job["kind"] == "analyse" and job["state"] in ("done", "failed", "refused")
            ]

        wait_until(lambda: bool(analysed_jobs()), seconds=300, what="the analysis", log=node.log, every=1)
        (job,) = analysed_jobs()
        assert (job["state"], job["reason"]) == ("done", None)
        results = node.listing("study", "show", study.study_instance_uid)[0]["results"]
        assert sorted(result["modality"] for result in results) == ["SEG", "SR"]
        node.stop()
    finally:
        node.close()
