"""Training patches from the phantoms: an endless, numbered stream. Patch i of a seed is always the same patch.

Real images never come in here.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dicomnode.phantoms.acquisition import apply_matrix, averaging, develop, interpolating, random_protocol
from dicomnode.phantoms.anatomy import points_in_lung
from dicomnode.phantoms.chest import ChestScene, chest_scene, render, scatter_nodules, true_mask
from dicomnode.phantoms.shapes import Grid
from dicomnode.training.recipe import NodulePatches

SCENES_AT_A_TIME = 4  # a batch of four shows four chests, and four batches in a row share them
PATCHES_PER_SCENE = 4  # three of them at a nodule, one where mistakes are likely

Patch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PhantomPatches(Dataset[Patch]):
    """Patch number -> (image (1, k, r, c) scaled to 0..1, truth (1, k, r, c) 0/1, region (1, k, r, c) 0/1), float32."""

    def __init__(self, data: NodulePatches, *, seed: int, count: int) -> None:
        self._data, self._seed, self._count = data, seed, count
        self._scenes: OrderedDict[int, ChestScene] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Patch:
        block, place = divmod(index, SCENES_AT_A_TIME * PATCHES_PER_SCENE)
        turn, lane = divmod(place, SCENES_AT_A_TIME)
        scene = self._scene(block * SCENES_AT_A_TIME + lane)
        rng = np.random.default_rng([self._seed, 11, index])
        if (turn + lane) % PATCHES_PER_SCENE != 3 and scene.nodules:
            nodule = scene.nodules[turn % len(scene.nodules)]
            centre = np.asarray(nodule.centre_lps_mm) + rng.uniform(-1, 1, 3) * (30, 30, 11)
        else:
            centre = _likely_mistake(scene, rng)
        return _patch(scene, centre, self._data, rng)

    def _scene(self, number: int) -> ChestScene:
        if number not in self._scenes:
            rng = np.random.default_rng([self._seed, 12, number])
            low, high, largest = self._data.diameters_mm
            diameters = np.exp(rng.uniform(np.log(low), np.log(high), self._data.nodules_per_scene))
            large = rng.random(len(diameters)) < self._data.large_share
            diameters[large] = rng.uniform(high, largest, int(large.sum()))
            scene = chest_scene(int(rng.integers(2**31)))
            self._scenes[number] = scatter_nodules(scene, rng, diameters)
            while len(self._scenes) > SCENES_AT_A_TIME:
                self._scenes.popitem(last=False)
        return self._scenes[number]


def _likely_mistake(scene: ChestScene, rng: np.random.Generator) -> NDArray[np.float64]:
    """A place in or near the lung where nets see nodules: dome, heart border, hilum, first rib; or anywhere."""
    anatomy = scene.anatomy
    kind = rng.random()
    if kind < 0.2:
        hilum = anatomy.mediastinum[-1 if rng.random() < 0.5 else -2]
        return np.asarray(hilum.centre) + rng.uniform(-1, 1, 3) * (25, 20, 18)
    if kind < 0.35:
        x, y, _ = anatomy.cage.centre
        return np.array([x + rng.choice([-1, 1]) * rng.uniform(35, 80), y + rng.uniform(-60, 40), anatomy.apex_z - rng.uniform(0, 40)])
    if kind < 0.55:
        dome = anatomy.domes[int(rng.integers(2))]
        top = dome.centre[2] + (dome.radii[2] if np.isfinite(dome.radii[2]) else 0)
        return np.array([dome.centre[0] + rng.uniform(-35, 35), rng.uniform(-50, 50), top + rng.uniform(-20, 10)])
    depth = (-3.0, 6.0) if kind < 0.85 else (0.0, np.inf)
    point: NDArray[np.float64] = points_in_lung(anatomy, rng, count=1, depth_mm=depth)[0] + rng.uniform(-1, 1, 3) * (20, 20, 8)
    return point


def _patch(scene: ChestScene, centre: NDArray[np.float64], data: NodulePatches, rng: np.random.Generator) -> Patch:
    step_z, step_y, step_x = data.spacing_mm
    slices, rows, columns = data.patch
    corner = centre - np.array([columns * step_x, rows * step_y, slices * step_z]) / 2
    protocol = random_protocol(rng)
    interval = protocol.thickness_mm * (1.0 if rng.random() < 0.6 else rng.uniform(0.5, 1.0))
    margin = interval + protocol.thickness_mm / 2 + 1
    fine = Grid(
        origin_lps_mm=(float(corner[0]), float(corner[1]), float(corner[2] - margin)),
        spacing_mm=(1.0, step_y, step_x),
        shape=(int(np.ceil(slices * step_z + 2 * margin)), rows, columns),
    )
    target = Grid(origin_lps_mm=(float(corner[0]), float(corner[1]), float(corner[2])), spacing_mm=data.spacing_mm, shape=data.patch)
    fine_z = fine.origin_lps_mm[2] + np.arange(fine.shape[0])
    target_z = target.origin_lps_mm[2] + step_z * np.arange(slices)
    slice_z = np.arange(target_z[0] - rng.uniform(0, interval), target_z[-1] + interval, interval)
    scanned = develop(apply_matrix(averaging(fine_z, slice_z, protocol.thickness_mm), render(scene, fine).hu), protocol, rng)
    hu = apply_matrix(interpolating(slice_z, target_z), scanned) + np.float32(rng.normal(0, 6))
    low, high = data.window_hu
    image = np.clip((hu - low) / (high - low), 0, 1).astype(np.float32)
    distance = scene.anatomy.lung_distance(target.axes)
    truth = np.zeros(target.shape, dtype=np.bool_)
    for nodule in scene.nodules:
        if (found := true_mask(scene, nodule, target)) is not None:
            truth[found[1]] |= found[0]
    region = (distance < data.region_margin_mm) | truth
    if rng.random() < 0.5:
        image, truth, region = image[:, :, ::-1], truth[:, :, ::-1], region[:, :, ::-1]
    if rng.random() < 0.3:
        image, truth, region = image[:, ::-1], truth[:, ::-1], region[:, ::-1]
    if rng.random() < 0.3:
        image, truth, region = image[::-1], truth[::-1], region[::-1]
    return (
        torch.from_numpy(image[None].copy()),
        torch.from_numpy(truth[None].astype(np.float32)),
        torch.from_numpy(region[None].astype(np.float32)),
    )
