"""The demo on a folder of mixed quality: what it sends, what it says of the rest, and summary.json as specified."""

from __future__ import annotations

import io
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from rich.console import Console

from dicomnode.cli import run
from dicomnode.cli.packages import add_package
from dicomnode.demo import run_demo
from dicomnode.findings import RunIdentity
from dicomnode.logs import configure_logs
from dicomnode.results.report import encode_refusal
from storage import Storage

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "dicomnode"))
from ct_series import write_series
from small_bundle import write_package

pytestmark = pytest.mark.usefixtures("logs_restored")
NUMBER = (int, float)
STUDY = {
    "study_instance_uid": str,
    "revision": int,
    "outcome": {"analysed", "refused", "failed"},
    "series": [{"series_instance_uid": str, "modality": str, "instances": int}],
    "packages": [{"name": str, "version": str, "accepted": bool, "reason_code": (str, type(None)), "reason": (str, type(None))}],
    "findings": [
        {
            "package": str,
            "tracking_uid": str,
            "label": str,
            "probability": NUMBER,
            "volume_ml": NUMBER,
            "long_axis_mm": (*NUMBER, type(None)),
            "centre_lps_mm": (list, type(None)),
            "box_px": (list, type(None)),
            "side": {"left", "right", None},
        }
    ],
    "scores": [{"package": str, "label": str, "probability": NUMBER, "threshold": NUMBER, "positive": bool}],
    "objects": [{"file": str, "modality": str, "sop_class_uid": str, "sop_instance_uid": str}],
    "seconds": dict.fromkeys(("receive", "complete", "volume", "inference", "results", "deliver", "total"), NUMBER),
}
SCHEMA = {"schema": int, "exit": int, "not_sent": [{"file": str, "reason": str}], "studies": [STUDY]}


def mistakes(value: Any, schema: Any, where: str = "summary") -> list[str]:
    """Compare a summary with schema 1: the keys it must have, and the type of each value."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where} is no object"]
        lacking = [f"{where}.{key} is absent" for key in schema if key not in value]
        return lacking + [m for key, part in schema.items() if key in value for m in mistakes(value[key], part, f"{where}.{key}")]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [m for index, item in enumerate(value) for m in mistakes(item, schema[0], f"{where}[{index}]")]
    if isinstance(schema, set):
        return [] if value in schema else [f"{where} is {value!r}"]
    return [] if isinstance(value, schema) else [f"{where} is {value!r}"]


def test_a_mixed_folder_is_sent_as_far_as_it_can_be_and_each_study_ends_with_an_outcome(tmp_path: Path) -> None:
    source = tmp_path / "source"
    good = series(source / "a" / "good", 1)
    series(source / "b", 2, slices=2)
    (report,) = only_report(source / "c", series(tmp_path / "elsewhere", 3))
    (source / "notes.txt").write_text("no DICOM", encoding="utf-8")
    Path(os.fsdecode(os.fsencode(source) + b"/\xff\x1b[31m.dcm")).write_bytes(b"no DICOM and no UTF-8")
    broken = source / "broken.dcm"
    broken.write_bytes(good[0].read_bytes()[:200])
    change(series(source / "e", 4, slices=1)[0], b"2.25.6.4", b"2.25.6.x")  # Series Instance UID
    change(series(source / "f", 5, slices=1)[0], b"\x28\x00\x10\x00US\x02\x00\x20\x00", b"\x28\x00\x10\x00US\x02\x00\x40\x00")  # Rows

    def enable(storage: Storage) -> list[str]:
        added = add_package(storage, write_package(tmp_path / "bright"))
        storage.registry.set_check(added.name, added.version, added.digest, {}, passed=True)
        storage.registry.enable(added.name, added.version)
        return [added.name]

    out, shown = tmp_path / "out", io.StringIO()
    configure_logs("warning", json_lines=False)
    assert run_demo(source, out, 300, Console(file=shown, width=300), enable_packages=enable) == 0

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert mistakes(summary, SCHEMA) == []
    assert (summary["schema"], summary["exit"]) == (1, 0)
    assert {Path(item["file"]).name: item["reason"] for item in summary["not_sent"]} == {
        "notes.txt": "not a DICOM file",
        "\N{REPLACEMENT CHARACTER}\x1b[31m.dcm": "not a DICOM file",
        "broken.dcm": "not readable as DICOM: AttributeError",
        "4-000.dcm": "a UID is malformed",
        "5-000.dcm": "0xC002 status 0xC002: pixel data is shorter than its header says",
    }
    studies = {study["study_instance_uid"]: study for study in summary["studies"]}
    assert {uid: study["outcome"] for uid, study in studies.items()} == {
        "2.25.5.1": "analysed", "2.25.5.2": "refused", "2.25.5.3": "refused", "2.25.5.5": "refused",
    }  # fmt: skip
    analysed = studies["2.25.5.1"]
    assert analysed["series"] == [{"series_instance_uid": "2.25.6.1", "modality": "CT", "instances": 6}]
    assert [finding["label"] for finding in analysed["findings"]] == ["Bright thing"]
    assert analysed["packages"] == [{"name": "bright", "version": "1.0", "accepted": True, "reason_code": None, "reason": None}]
    assert sorted(made["modality"] for made in analysed["objects"]) == ["SEG", "SR"]
    assert all(dcmread(out / made["file"]).SOPInstanceUID == made["sop_instance_uid"] for made in analysed["objects"])
    assert {study: s["packages"][0]["reason_code"] for study, s in studies.items() if s["outcome"] == "refused"} == {
        "2.25.5.2": "too-few-slices", "2.25.5.3": "no-images", "2.25.5.5": "no-images",
    }  # fmt: skip
    assert sorted(path.name for path in (out / "pacs").iterdir()) == sorted(f"{m['sop_instance_uid']}.dcm" for m in analysed["objects"])
    assert sorted(path.name for path in (out / "preview").iterdir()) == ["2.25.5.1_1.png", "2.25.5.2_1.png", "2.25.5.5_1.png"]
    assert sorted(path.name for path in out.iterdir()) == ["pacs", "preview", "summary.json"]
    assert report.exists()
    assert "notes.txt: not a DICOM file" in shown.getvalue()
    assert "\x1b" not in shown.getvalue()


@pytest.mark.parametrize("source", ["absent", "empty", "texts", "texts/a.txt"])
def test_a_folder_without_dicom_is_wrong_input_and_leaves_nothing_behind(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no DICOM", encoding="utf-8")
    assert run(["demo", "--input", str(tmp_path / source), "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("dicomnode: ")
    assert errors.count("\n") == 1
    assert source in errors
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious", encoding="utf-8")
    for out in (tmp_path / "out", tmp_path / "out" / "mine"):
        assert run(["demo", "--out", str(out)]) == 2
        assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert (tmp_path / "out" / "mine").read_text(encoding="utf-8") == "precious"


def series(folder: Path, number: int, *, slices: int = 6) -> list[Path]:
    """A CT series of air with a bright box, as study 2.25.5.`number`."""
    stored = np.full((slices, 32, 32), 24, dtype=np.uint16)
    stored[1 : slices - 1, 10:18, 12:20] = 1424
    return write_series(folder, stored, SeriesNumber=number, StudyInstanceUID=f"2.25.5.{number}")


def change(file: Path, old: bytes, new: bytes) -> None:
    """Replace bytes of a file by as many others."""
    content = file.read_bytes()
    assert content.count(old) == 1
    assert len(old) == len(new)
    file.write_bytes(content.replace(old, new))


def only_report(folder: Path, images: list[Path]) -> list[Path]:
    """A study that holds nothing but a Structured Report about `images`."""
    headers = [dcmread(file, stop_before_pixels=True) for file in images]
    identity = RunIdentity(
        study_instance_uid=headers[0].StudyInstanceUID, revision=1, package="other", version="1", digest="d" * 64, run=1,
        created_at=datetime.now(UTC),
    )  # fmt: skip
    report = encode_refusal("none", "an older report", headers, identity, manufacturer="other", algorithm_name="other")
    folder.mkdir(parents=True)
    (folder / "report.dcm").write_bytes(report.data)
    return [folder / "report.dcm"]
