"""Detections and classifications of bundles: boxes and heat maps lie in the patient where the network saw something."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_bundle import affine_of, volume_of
from zoo_package import BRIGHT, load, manifest_of, write_zoo_package

from dicomnode.analysis.heatmap import heat_map
from dicomnode.findings import Volume

DETECTOR = """import torch


class Brightest:
    def __init__(self, half):
        self.half = half

    def __call__(self, inputs, network):
        answers = []
        for image in inputs:
            network(image[None])
            place = torch.nonzero(image[0] > 0.5).float()
            low, high = place.amin(dim=0), place.amax(dim=0)
            boxes = torch.stack([torch.cat([low, high]), torch.cat([low, high])])
            answers.append({"box": boxes, "label": torch.tensor([0, 0]), "label_scores": torch.tensor([0.9, 0.1])})
        return answers
"""
ROTATED = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
ONE = {"weight": torch.ones(1, 1, 1, 1, 1), "bias": torch.zeros(1)}


def block(low: tuple[int, int, int], high: tuple[int, int, int]) -> Volume:
    """A bright block of the voxels low..high in an oblique volume."""
    voxels = np.full((24, 40, 44), -1000, dtype=np.float32)
    voxels[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = 400
    return volume_of(voxels, affine_of((2.0, 1.5, 1.5), (10.0, -3.0, 44.0), ROTATED))


@pytest.mark.parametrize("low", [(4, 10, 20), (12, 4, 5)])
def test_a_detected_box_lies_on_what_was_detected_in_an_oblique_volume(tmp_path: Path, low: tuple[int, int, int]) -> None:
    high = (low[0] + 6, low[1] + 8, low[2] + 11)
    config: dict[str, Any] = {
        **BRIGHT,
        "network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 1},
        "inferer": {"_target_": "scripts.detect.Brightest", "half": 0.5},
        "postprocessing": {"_target_": "Compose", "transforms": [{"_target_": "DeleteItemsd", "keys": ["image"]}]},
    }
    manifest = manifest_of(kind="detection", outputs=(0,), more="minimum_score = 0.5")
    scripts = {"scripts/__init__.py": "", "scripts/detect.py": DETECTOR}
    model = load(write_zoo_package(tmp_path / "p", config, ONE, manifest=manifest, scripts=scripts))
    volume = block(low, high)
    (finding,) = model({"image": volume}).findings
    assert finding.shape == "box"
    assert finding.long_axis is None
    assert finding.probability == pytest.approx(0.9)
    middle = volume.to_lps((np.array(low) + np.array(high)) / 2)
    off = np.linalg.inv(volume.affine[:3, :3]) @ (np.array(finding.centre_lps_mm) - middle)
    assert np.abs(off).max() <= 1.0  # resampling to 1.5 x 1.5 x 2 mm moves an edge by up to half a voxel
    lengths = {m.name.meaning: m.value for m in finding.measurements}
    assert lengths == pytest.approx({"Width": 11 * 1.5, "Height": 8 * 1.5, "Depth": 6 * 2.0}, abs=3.0)
    assert finding.volume_ml == 0  # a box has no volume of what is in it


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_heat_map_is_warm_where_the_class_was_seen(dimensions: int, gradients: bool) -> None:
    convolution = {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dimensions]
    pool = {2: torch.nn.AdaptiveAvgPool2d, 3: torch.nn.AdaptiveAvgPool3d}[dimensions]
    network = torch.nn.Sequential(convolution(1, 2, 3, padding=1, bias=False), torch.nn.ReLU(), pool(1), torch.nn.Flatten()).eval()
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].weight[(1, 0, *(1,) * dimensions)] = 50.0
    for parameter in network.parameters():
        parameter.requires_grad = False
    if not gradients:
        inner = network
        network = Blind(inner)
    image = torch.zeros(1, 1, *(30,) * dimensions)
    image[(0, 0, slice(18, 24), slice(6, 12), *(slice(6, 12),) * (dimensions - 2))] = 1.0
    heat = heat_map(network, image, 1)
    assert heat.shape == (30,) * dimensions
    assert heat.max() == pytest.approx(1)
    warm = np.argwhere(heat > 0.5).mean(axis=0)
    np.testing.assert_allclose(warm, [20.5, 8.5, 8.5][:dimensions], atol=3)


class Blind(torch.nn.Module):
    """A network that answers without gradients, as onnxruntime does."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            answer: torch.Tensor = self.network(image)
        return answer


def test_every_class_has_a_score_and_a_positive_one_a_place_on_the_film(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        **BRIGHT,
        "network_def": {"_target_": "scripts.net.Net"},
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "ScaleIntensityd", "keys": "image"},
                {"_target_": "Resized", "keys": "image", "spatial_size": [32, 32]},
            ],
        },
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {"_target_": "Compose", "transforms": [{"_target_": "Activationsd", "keys": "pred", "softmax": True}]},
    }
    net = (
        "import torch\n\n\nclass Net(torch.nn.Sequential):\n    def __init__(self):\n        super().__init__(\n"
        "            torch.nn.Conv2d(1, 3, 1), torch.nn.ReLU(), torch.nn.AdaptiveMaxPool2d(1), torch.nn.Flatten()\n        )\n"
    )
    weights = {"0.weight": torch.tensor([0.0, 9.0, 1.0]).reshape(3, 1, 1, 1), "0.bias": torch.zeros(3)}
    manifest = manifest_of(kind="classification", dimensions=2, outputs=(0, 1, 2))
    model = load(write_zoo_package(tmp_path / "p", config, weights, manifest=manifest, scripts={"scripts/net.py": net}))
    pixels = np.zeros((1, 60, 90), dtype=np.float32)
    pixels[0, 40:52, 66:80] = 1000
    film = Volume(
        voxels=pixels, affine=np.diag([1.0, 0.5, 0.5, 1.0])[[2, 1, 0, 3]], sop_instance_uids=("2.25.1",), series_instance_uid="2.25.2",
        study_instance_uid="2.25.3", frame_of_reference_uid=None, modality="DX", calibration="detector",
    )  # fmt: skip
    found = model({"image": film})
    assert [score.positive for score in found.scores] == [False, True, False]
    assert sum(score.probability for score in found.scores) == pytest.approx(1, abs=1e-5)
    (finding,) = found.findings
    assert finding.shape == "heat map"
    assert finding.centre_lps_mm is None
    left, top, right, bottom = finding.bounds_px
    assert (left + right) / 2 == pytest.approx(72.5, abs=4)
    assert (top + bottom) / 2 == pytest.approx(45.5, abs=4)
    assert finding.measurements == ()
