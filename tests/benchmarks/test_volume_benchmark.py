"""The benchmark of volumes runs, and compares voxels; nothing is said here of how long it took."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_the_benchmark_of_volumes_compares_the_node_with_pydicom_to_the_bit(tmp_path: Path) -> None:
    command = [sys.executable, Path(__file__).parent / "volume.py", "--slices", "8", "--rounds", "1", "--readers", "node,pydicom"]
    command += ["--folder", tmp_path, "--out", tmp_path / "volume.json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in {0, 3}, done.stdout + done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) == {
        "volume, ratio to pydicom",
        "seconds from closing to a volume read ahead",
    }
    written = json.loads((tmp_path / "volume.json").read_text(encoding="utf-8"))
    assert written["notes"] == dict.fromkeys(["node", "pydicom"], "int16, equal to the bit")
