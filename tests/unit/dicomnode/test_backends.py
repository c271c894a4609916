"""Backends: each gives what torch gives, twice the same bits, and is used only where a check has shown so."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_bundle import MANIFEST, affine_of, spheres, volume_of, write_package

from dicomnode.analysis import backends
from dicomnode.analysis.backends import TORCH, available, backend_for, choose
from dicomnode.analysis.inference import OwnModel, check_package, compare_backends, least_dice, load_model
from dicomnode.analysis.networks import build_network
from dicomnode.analysis.package import digest_of
from dicomnode.findings import Volume

CPU = torch.device("cpu")
OTHERS = [name for name in available(CPU) if name != TORCH]


def u_net(seed: int = 1) -> torch.nn.Module:
    arguments = {"spatial_dims": 3, "features": [4, 4, 8, 8, 8, 4], "out_channels": 2}
    config = json.dumps({"network_def": {"_target_": "monai.networks.nets.BasicUNet", **arguments}}).encode()
    torch.manual_seed(seed)
    return build_network(config, "p").eval().requires_grad_(requires_grad=False)


def ball() -> Volume:
    affine = affine_of((2.0, 1.5, 1.5), (0, 0, 0), np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]]))
    return volume_of(spheres((24, 40, 40), affine, [((30.0, 30.0, 24.0), 15.0)]), affine)


def loaded(folder: Path, **package: Any) -> OwnModel:
    write_package(folder, **package)
    model = load_model(folder, digest=digest_of(folder), device="cpu")
    assert isinstance(model, OwnModel)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_says_the_same_in_each_backend(name: str) -> None:
    windows = torch.rand(3, 1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    network = u_net()
    expected = backend_for(network, TORCH, device=CPU, threads=2)(windows)
    result = backend_for(network, name, device=CPU, threads=2)(windows)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=0.05 if "bf16" in name else 1e-4, rtol=0.05 if "bf16" in name else 1e-3)


@pytest.mark.parametrize("name", available(CPU))
def test_the_same_windows_give_the_same_bits(name: str) -> None:
    windows = torch.rand(3, 1, 16, 32, 32)
    network = u_net()
    first, second = (backend_for(network, name, device=CPU, threads=2) for _ in range(2))
    result = first(windows)
    assert torch.equal(result, first(windows))
    assert torch.equal(result, second(windows))
    if name != TORCH:
        assert torch.equal(result[2:], first(windows[2:]))  # whichever windows go with it


@pytest.mark.parametrize("name", OTHERS)
def test_windows_of_another_shape_are_computed_too(name: str) -> None:
    network = u_net()
    backend = backend_for(network, name, device=CPU, threads=1)
    for edge in (16, 32, 48):
        assert backend(torch.rand(1, 1, 16, edge, 32)).shape == (1, 2, 16, edge, 32)


def test_openvino_s_telemetry_is_not_there() -> None:
    if not OTHERS:
        pytest.skip("OpenVINO is for x86")
    backend_for(u_net(), OTHERS[0], device=CPU, threads=1)(torch.rand(1, 1, 16, 32, 32))
    assert sys.modules["openvino_telemetry"] is None


def test_a_check_compares_the_findings_of_each_backend_and_names_those_that_agree(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write_package(folder)
    report = check_package(folder, {"image": ball()}, device="cpu")
    assert set(report["backends"]) == set(available(CPU))
    for row in report["backends"].values():
        assert row["passed"]
        assert row["dice"] >= 0.998
    assert choose(report, "auto", CPU) in available(CPU)
    assert choose(report, "torch", CPU) == TORCH


def test_a_backend_whose_findings_differ_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not OTHERS:
        pytest.skip("OpenVINO is for x86")
    model = loaded(tmp_path / "p")
    volumes = {"image": ball()}
    result = model(volumes)

    def shifted(network: torch.nn.Module, which: str, **_: Any) -> Any:
        return replace(backend_for(network, TORCH, device=CPU, threads=1), network=torch.nn.Sequential(network, Roll()))

    monkeypatch.setattr("dicomnode.analysis.inference.backend_for", shifted)
    rows = compare_backends(model, volumes, result)
    assert rows[TORCH]["passed"]
    assert not any(rows[name]["passed"] for name in OTHERS)
    assert choose({"backends": rows}, "auto", CPU) == TORCH


class Roll(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.roll(1, dims=-1)


def test_without_a_finding_nothing_is_shown_and_torch_computes(tmp_path: Path) -> None:
    model = loaded(tmp_path / "p")
    empty = ball()
    volumes = {"image": replace(empty, voxels=np.full_like(empty.voxels, -1000))}
    assert set(compare_backends(model, volumes, model(volumes))) == {TORCH}


def test_of_those_that_passed_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "available", lambda _: (TORCH, "openvino-bf16", "openvino-f32"))
    rows = {
        TORCH: {"seconds": 4.0, "passed": True}, "openvino-bf16": {"seconds": 1.0, "passed": False},
        "openvino-f32": {"seconds": 2.0, "passed": True}, "of another machine": {"seconds": 0.1, "passed": True},
    }  # fmt: skip
    assert choose({"backends": rows}, "auto", CPU) == "openvino-f32"
    assert choose({"backends": rows}, "openvino", CPU) == "openvino-f32"
    assert choose({"backends": rows}, "torch", CPU) == TORCH
    assert choose({"backends": rows}, "auto", torch.device("cuda")) == TORCH
    assert choose(None, "auto", CPU) == choose({"backends": {}}, "openvino", CPU) == TORCH


def test_dice_of_findings_is_that_of_the_pair_that_differs_most(tmp_path: Path) -> None:
    findings = loaded(tmp_path / "p")({"image": ball()}).findings
    assert least_dice(findings, findings) == 1
    assert least_dice(findings, ()) == 0
    (found,) = findings
    k, r, c = found.segment.origin
    moved = replace(found, segment=replace(found.segment, origin=(k + 1, r, c)))
    overlap = 2 * np.count_nonzero(found.segment.mask[1:] & found.segment.mask[:-1]) / (2 * found.segment.voxel_count)
    assert least_dice((found,), (moved,)) == pytest.approx(overlap)
    assert least_dice((found,), (replace(found, label="other"),)) == 0


class Hungry(torch.nn.Module):
    """Fails for want of memory above a number of windows, or voxels."""

    def __init__(self, network: torch.nn.Module, most: int, error: Exception) -> None:
        super().__init__()
        self.network, self.most, self.error = network, most, error

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        if len(windows) > self.most:
            raise self.error
        result: torch.Tensor = self.network(windows)
        return result


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_where_memory_is_short_fewer_windows_go_at_a_time_and_the_findings_are_the_same(tmp_path: Path, error: Exception) -> None:
    model = loaded(tmp_path / "p", manifest=MANIFEST.replace("batch = 2", "batch = 8"))
    expected = model({"image": ball()})
    hungry = replace(model, backend=backend_for(Hungry(model.network, 1, error), TORCH, device=CPU, threads=1))
    result = hungry({"image": ball()})
    assert result.notes == ()
    assert least_dice(expected.findings, result.findings) == 1
    for mine, other in zip(expected.findings, result.findings, strict=True):
        assert math.isclose(mine.probability, other.probability, abs_tol=1e-5)


def starved(folder: Path, text: str) -> Any:
    model = loaded(folder, manifest=text)
    slides = []

    class Short(torch.nn.Module):
        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            slides.append(len(windows))
            if len(slides) < 4:  # two windows, one window, and the first at half the resolution
                raise torch.OutOfMemoryError("CUDA out of memory.")
            result: torch.Tensor = model.network(windows)
            return result

    return replace(model, backend=backend_for(Short(), TORCH, device=CPU, threads=1))


def test_half_the_resolution_is_the_last_resort_where_the_manifest_allows_it_and_is_said(tmp_path: Path) -> None:
    allowed = MANIFEST.replace("batch = 2", "batch = 4\nhalf_resolution = true")
    model = starved(tmp_path / "p", allowed)
    result = model({"image": ball()})
    assert len(result.notes) == 1
    assert "1/2 of the resolution" in result.notes[0]
    whole = loaded(tmp_path / "q", manifest=allowed.replace('"bright"', '"q"'))({"image": ball()})
    assert result.findings[0].volume_ml == pytest.approx(whole.findings[0].volume_ml, rel=0.1)
    assert np.linalg.norm(np.subtract(result.findings[0].centre_lps_mm, whole.findings[0].centre_lps_mm)) < 1.0


def test_without_that_the_analysis_fails_with_a_sentence(tmp_path: Path) -> None:
    from dicomnode.errors import AnalysisFailed

    with pytest.raises(AnalysisFailed, match="more memory than there is"):
        starved(tmp_path / "p", MANIFEST.replace("batch = 2", "batch = 4"))({"image": ball()})
