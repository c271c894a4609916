"""Packages around MONAI Bundles for tests: a manifest, and bundles whose answer is known without training."""

import json
from pathlib import Path
from typing import Any

import torch

from dicomnode.analysis.bundle import BundleModel, load_bundle
from dicomnode.analysis.manifest import parse_manifest
from dicomnode.analysis.package import package_files

HEAD = """
schema = 1
name = "zoo"
version = "1.0"
title = "A bundle"
manufacturer = "nobody"
algorithm_name = "zoo"
licence = "Apache-2.0"
intended_use = "RESEARCH USE ONLY"
training_data = "none"
kind = "{kind}"
[bundle]
"""
INPUT = """
[[inputs]]
name = "{name}"
modality = "CT"
sop_classes = ["1.2.840.10008.5.1.4.1.1.2"]
dimensions = {dimensions}
"""
OUTPUT = """
[[outputs]]
channel = {channel}
label = "thing {channel}"
activation = "{activation}"
{more}
category = {{ value = "123037004", scheme = "SCT", meaning = "Anatomical Structure" }}
type = {{ value = "78961009", scheme = "SCT", meaning = "Spleen" }}
"""

# Bright is 1, dark is 0: of two channels the second is larger above the middle of what ScaleIntensityRanged makes 0..1.
BRIGHT = {
    "network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1},
    "network": "$@network_def.to(@device)",
    "bundle_root": "/somewhere/else",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image"},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
            {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"},
            {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -1000, "a_max": 400, "b_min": 0, "b_max": 1, "clip": True},
            {"_target_": "CropForegroundd", "keys": "image", "source_key": "image", "margin": 3},
        ],
    },
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 16], "sw_batch_size": 2, "overlap": 0.25},
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
            {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False},
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {"_target_": "SaveImaged", "keys": "pred", "output_dir": "$@bundle_root + '/eval'"},
        ],
    },
    "run": ["$@evaluator.run()"],
}
BRIGHT_WEIGHTS = {"weight": torch.tensor([0.0, 40.0]).reshape(2, 1, 1, 1, 1), "bias": torch.tensor([0.0, -20.0])}


def manifest_of(
    *, kind: str = "segmentation", inputs: tuple[str, ...] = ("image",), dimensions: int = 3, outputs: tuple[int, ...] = (1,),
    activation: str = "softmax", more: str = "", head: str = "",
) -> str:  # fmt: skip
    """The text of a manifest; `more` goes into each output, `head` before the tables."""
    return "".join(
        [
            head,
            HEAD.format(kind=kind),
            *(INPUT.format(name=name, dimensions=dimensions) for name in inputs),
            *(OUTPUT.format(channel=channel, activation=activation, more=more) for channel in outputs),
        ]
    )


def write_zoo_package(
    folder: Path, config: dict[str, Any], weights: Any, *, manifest: str | None = None, scripts: dict[str, str] | None = None
) -> Path:
    """Write a package around a bundle with this configuration."""
    for inner in ("configs", "models"):
        (folder / "bundle" / inner).mkdir(parents=True)
    (folder / "manifest.toml").write_text(manifest or manifest_of())
    (folder / "bundle/configs/inference.json").write_text(json.dumps(config))
    torch.save(weights, folder / "bundle/models/model.pt")
    for name, text in (scripts or {}).items():
        (folder / "bundle" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "bundle" / name).write_text(text)
    return folder


def load(folder: Path) -> BundleModel:
    """Load a package around a bundle, on the CPU."""
    contents = {name: path.read_bytes() for name, path in package_files(folder).items()}
    return load_bundle(contents, parse_manifest(contents["manifest.toml"], folder), "0" * 64, torch.device("cpu"))
