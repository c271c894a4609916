"""Running a package once: in a child without network, under limits, with one sentence when it isn't fit."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_bundle import HALF, affine_of, spheres, volume_of, write_package
from zoo_package import BRIGHT, BRIGHT_WEIGHTS, write_zoo_package

from dicomnode.analysis.check import check_in_child
from dicomnode.analysis.package import digest_of
from dicomnode.errors import PackageError
from dicomnode.findings import Volume

AXIAL = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])


@pytest.fixture
def volume() -> Volume:
    affine = affine_of((2.0, 1.0, 1.0), (-30.0, -30.0, -20.0), AXIAL)
    return volume_of(spheres((20, 60, 60), affine, [((0.0, 0.0, 0.0), 8.0)]), affine)


def test_a_sound_package_is_reported_with_its_findings_digest_and_cost(tmp_path: Path, volume: Volume) -> None:
    folder = write_package(tmp_path / "p")
    report = check_in_child(folder, {"image": volume}, digest=digest_of(folder), device="cpu")
    assert report["digest"] == digest_of(folder)
    assert len(report["findings"]) == 1
    assert report["findings"][0]["volume_ml"] == pytest.approx(2.145, rel=0.1)  # a ball of 8 mm radius
    assert report["peak_memory_bytes"] > 0
    assert set(report["seconds"]) == {"load", "region", "inference", "findings"}
    assert report["network_isolated"] in (True, False)
    json.dumps(report)


def test_the_parent_does_not_load_torch(tmp_path: Path) -> None:
    code = "import sys, dicomnode.analysis.check; print('torch' in sys.modules, 'monai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_another_digest_is_not_run(tmp_path: Path, volume: Volume) -> None:
    with pytest.raises(PackageError, match="digest"):
        check_in_child(write_package(tmp_path / "p"), {"image": volume}, digest="0" * 64)


def test_a_network_that_fails_is_a_sentence(tmp_path: Path, volume: Volume) -> None:
    weights = HALF | {"bias": torch.full((1,), float("nan"))}
    with pytest.raises(PackageError, match="not finite"):
        check_in_child(write_package(tmp_path / "p", weights=weights), {"image": volume})


def test_a_bundle_with_large_papers_and_data_is_run_from_its_private_copy(tmp_path: Path, volume: Volume) -> None:
    folder = write_zoo_package(tmp_path / "p", BRIGHT, BRIGHT_WEIGHTS)
    for name in ("docs/picture.png", "scripts/atlas.bin"):
        (folder / "bundle" / name).parent.mkdir()
        (folder / "bundle" / name).write_bytes(bytes(3 * 2**20))
    assert len(check_in_child(folder, {"image": volume}, device="cpu")["findings"]) == 1


def test_a_package_beyond_its_memory_is_ended(tmp_path: Path, volume: Volume) -> None:
    network = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 10**9, "kernel_size": 3}  # 108 GB of weights
    with pytest.raises(PackageError):
        check_in_child(write_package(tmp_path / "p", config={"network_def": network}), {"image": volume}, memory_bytes=2 * 2**30)


def test_a_package_beyond_its_time_is_ended(tmp_path: Path, volume: Volume) -> None:
    with pytest.raises(PackageError, match="longer than"):
        check_in_child(write_package(tmp_path / "p"), {"image": volume}, seconds=0.2)  # not even Python starts that fast with torch


def test_without_network_even_the_loopback_is_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            "import socket\nfrom dicomnode.analysis.check import leave_network\n"
            "left = leave_network()\n"
            f"try: socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)\n"
            "except OSError: print(left, 'refused')\n"
            "else: print(left, 'connected')\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"OPENBLAS_NUM_THREADS": "1"})
    left, answer = done.stdout.split()
    if left == "False":
        pytest.skip("this kernel lets no process leave its network")
    assert answer == "refused"
