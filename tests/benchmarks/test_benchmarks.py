"""The benchmarks run, and what they measure has arrived; nothing is said here of how long it took."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def test_the_benchmark_of_reception_compares_every_image_that_the_node_acknowledged(tmp_path: Path) -> None:
    out = tmp_path / "receive.json"
    command = [sys.executable, FOLDER / "receive.py", "--quick", "--images", "4", "--receivers", "node", "--folder", tmp_path, "--out", out]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}  # alone, the node is compared with nothing
    rows = [row for row in json.loads(out.read_text(encoding="utf-8"))["rows"] if not row["sender_tcp_quickack"]]
    compared = {row["case"]: row["images_compared_byte_for_byte"] for row in rows[:4]}
    assert compared == {"1 association": 4, "4 associations": 4, "16 associations": 16, "one image per association": 1}
    assert not any(tmp_path.glob("receive-*"))


@pytest.mark.long  # it checks the package and runs it six times
def test_the_benchmark_of_inference_compares_findings_and_says_which_goals_are_met(tmp_path: Path) -> None:
    out = tmp_path / "inference.json"
    command = [sys.executable, FOLDER / "inference.py", "--quick", "--out", out]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode in {0, 3}, done.stdout + done.stderr
    goals = json.loads(done.stdout.splitlines()[-1])
    assert all(set(goal) == {"measured", "goal", "met"} for goal in goals.values())
    content = json.loads(out.read_text(encoding="utf-8"))
    assert {row["backend"] for row in content["rows"]} == {"eager", "torch", content["chosen"]}
    assert (done.returncode == 0) is all(goal["met"] for goal in goals.values())


@pytest.mark.long  # it imports all that encodes, in three processes
def test_the_benchmark_of_segmentations_measures_each_encoder(tmp_path: Path) -> None:
    out = tmp_path / "seg.json"
    command = [sys.executable, FOLDER / "seg.py", "--slices", "12", "--rounds", "1", "--segments", "4", "--out", out]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in {0, 3}, done.stdout + done.stderr
    goals = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode == 0) is all(goal["met"] for goal in goals.values())
    rows = {(row["encoder"], row["kind"]): row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert {encoder for encoder, _ in rows} >= {"node", "highdicom", "packbits"}
    for kind in ("seg", "seg-labelmap"):  # all of them write the same frames
        assert rows["node", kind]["bytes"] == pytest.approx(rows["highdicom", kind]["bytes"], rel=0.3)


@pytest.mark.long  # it waits for a sender to come to rest, three times
def test_the_benchmark_of_delivery_delivers_each_result_that_waited_once(tmp_path: Path) -> None:
    out = tmp_path / "deliver.json"
    command = [sys.executable, FOLDER / "deliver.py", "--results", "20", "--out", out]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode in {0, 3}, done.stdout + done.stderr
    goals = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode == 0) is all(goal["met"] for goal in goals.values())
    assert goals["results not delivered once"]["met"]
    content = json.loads(out.read_text(encoding="utf-8"))
    assert [row["waiting"] for row in content["rows"]] == [0, 1, 2, 20]
