"""Small model packages and volumes for tests: networks whose answer is known without training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from dicomnode.findings import Volume

Triple = tuple[float, float, float]

MANIFEST = """
schema = 1
name = "bright"
version = "1.0"
title = "Bright things"
manufacturer = "dicomnode"
algorithm_name = "bright"
licence = "Apache-2.0"
intended_use = "RESEARCH USE ONLY"
training_data = "none"
kind = "segmentation"
[input]
modality = "CT"
sop_classes = ["1.2.840.10008.5.1.4.1.1.2"]
body_parts = ["CHEST"]
minimum_slices = 4
slice_spacing_mm = [0.4, 5.5]
pixel_spacing_mm = [0.3, 1.5]
[preprocessing]
spacing_mm = [2.0, 1.5, 1.5]
window = [-1000.0, 400.0]
[inference]
window = [16, 32, 32]
overlap = 0.25
batch = 2
[[outputs]]
channel = 0
label = "Bright thing"
minimum_ml = 0.03
minimum_score = 0.5
category = { value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }
type = { value = "27925004", scheme = "SCT", meaning = "Nodule" }
"""
IDENTITY = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 1}
HALF = {
    "weight": torch.full((1, 1, 1, 1, 1), 40.0),
    "bias": torch.full((1,), -20.0),
}  # 0.5 at mid-window


def write_package(
    folder: Path,
    *,
    manifest: str = MANIFEST,
    config: dict[str, Any] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write a package; by default its network answers "brighter than the middle of the window"."""
    (folder / "bundle/configs").mkdir(parents=True)
    (folder / "bundle/models").mkdir()
    (folder / "manifest.toml").write_text(manifest)
    (folder / "bundle/configs/metadata.json").write_text("{}")
    (folder / "bundle/configs/inference.json").write_text(json.dumps(config or {"network_def": IDENTITY}))
    safetensors.torch.save_file(weights or HALF, folder / "bundle/models/model.safetensors")
    return folder


def volume_of(voxels: NDArray[np.float32], affine: NDArray[np.float64]) -> Volume:
    """Wrap an array as a volume with made-up UIDs."""
    return Volume(
        voxels=np.ascontiguousarray(voxels, dtype=np.float32),
        affine=affine,
        sop_instance_uids=tuple(f"2.25.1.{k}" for k in range(voxels.shape[0])),
        series_instance_uid="2.25.2",
        study_instance_uid="2.25.3",
        frame_of_reference_uid="2.25.4",
        modality="CT",
    )


def affine_of(spacing: Triple, origin: Triple, directions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the affine for (k, r, c): `directions` has the LPS unit vectors of the slice, row-index and column-index axis as columns."""
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing)
    affine[:3, 3] = origin
    return affine


def spheres(shape: tuple[int, int, int], affine: NDArray[np.float64], balls: list[tuple[Triple, float]]) -> NDArray[np.float32]:
    """Return 400 HU balls (centre LPS mm, radius mm) in -1000 HU air, edges a voxel's diagonal wide as partial volume makes them."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    positions = index @ affine[:3, :3].T + affine[:3, 3]
    edge = float(np.linalg.norm(affine[:3, :3], axis=0).mean())
    filled = np.zeros(shape)
    for centre, radius in balls:
        distance = np.linalg.norm(positions - np.array(centre), axis=-1)
        filled = np.maximum(filled, np.clip((radius - distance) / edge + 0.5, 0, 1))
    return (-1000 + 1400 * filled).astype(np.float32)
