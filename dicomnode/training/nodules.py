"""Training patches from the phantoms: an endless, numbered stream. Patch i of a seed is always the same patch.

Patches come at several scales of one grid, as the network looks at a study: what is too large for a scale, or too small, isn't
counted there. Real images never come in here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dicomnode.phantoms.acquisition import Protocol, apply_matrix, averaging, develop, interpolating, random_protocol
from dicomnode.phantoms.anatomy import points_in_lung
from dicomnode.phantoms.chest import ChestScene, chest_scene, render, scatter_nodules, true_mask
from dicomnode.phantoms.nodules import Nodule
from dicomnode.phantoms.shapes import Floats, Grid, Tubes
from dicomnode.training.recipe import NodulePatches

SCENES_AT_A_TIME = 4  # a batch of four shows four chests, and twelve batches in a row share them
PLACES_PER_SCENE = 4  # of each kind in AT_PLACES one
AT_PLACES = ((0.0, 0.0), (0.0, 0.5), (1.0, 0.35), (0.3, 1.0))  # chance to be at the coarsest scale, and where mistakes are likely
SCANS_PER_PLACE = 3  # each rendered once and scanned with three protocols: rendering is what costs
THIN_MM = 0.7  # radius of vessels that a coarse grid doesn't show
LONGEST_MM = 5.0  # thickness and distance of slices
WEIGHED_MM = 12.0  # a nodule smaller than this counts more for each voxel, up to MOST_WEIGHT times, or its few voxels went unheard
MOST_WEIGHT = 5.0
LARGEST_GROUND_GLASS_MM = 25.0
TO_BE_FOUND_MM = (8.0, 45.0)  # at scale 1 anything up to the second; at a coarser one, times the scale, anything above the first

Patch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Thing = TypeVar("Thing")


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A box of a scene, rendered without noise, with slices thinner than any protocol's, reaching beyond the patch at both ends."""

    scale: float
    target: Grid
    fine_z: NDArray[np.floating]
    hu: Floats
    truth: NDArray[np.bool_]
    weight: Floats


class PhantomPatches(Dataset[Patch]):
    """Patch number -> (image (1, k, r, c) scaled to 0..1, truth (1, k, r, c) 0/1, weight (1, k, r, c), 0: isn't counted), float32."""

    def __init__(self, data: NodulePatches, *, seed: int, count: int) -> None:
        self._data, self._seed, self._count = data, seed, count
        self._scenes: OrderedDict[Any, ChestScene] = OrderedDict()
        self._places: OrderedDict[Any, _Place] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Patch:
        block, number = divmod(index, SCENES_AT_A_TIME * PLACES_PER_SCENE * SCANS_PER_PLACE)
        turn, lane = divmod(number, SCENES_AT_A_TIME)
        key = block * SCENES_AT_A_TIME + lane, turn % PLACES_PER_SCENE
        place = _kept(self._places, key, lambda: self._place(*key), most=SCENES_AT_A_TIME * PLACES_PER_SCENE)
        return _scanned(place, self._data, np.random.default_rng([self._seed, 11, index]))

    def _place(self, number: int, turn: int) -> _Place:
        scene = _kept(self._scenes, number, lambda: self._scene(number), most=SCENES_AT_A_TIME)
        rng = np.random.default_rng([self._seed, 13, number, turn])
        coarsest = max(self._data.scales)
        at_coarsest, at_mistakes = AT_PLACES[(turn + number) % PLACES_PER_SCENE]
        scale = coarsest if rng.random() < at_coarsest else 1.0
        mistakes = rng.random() < at_mistakes
        shown = [nodule for nodule in scene.nodules if _is_to_be_found(nodule, scale)]
        if mistakes or not shown:
            return _rendered(scene, _likely_mistake(scene, rng, hazy=0.3 * scale), scale, self._data)
        nodule = shown[int(rng.integers(len(shown)))]
        reach = 0.33 * scale * np.multiply(self._data.patch, self._data.spacing_mm)[::-1]
        return _rendered(scene, np.asarray(nodule.centre_lps_mm) + rng.uniform(-1, 1, 3) * reach, scale, self._data)

    def _scene(self, number: int) -> ChestScene:
        rng = np.random.default_rng([self._seed, 12, number])
        low, high, largest = self._data.diameters_mm
        diameters = np.exp(rng.uniform(np.log(low), np.log(high), self._data.nodules_per_scene))
        large = rng.random(len(diameters)) < self._data.large_share
        diameters[large] = rng.uniform(high, largest, int(large.sum()))
        scene = chest_scene(int(rng.integers(2**31)))
        return scatter_nodules(scene, rng, np.sort(diameters)[::-1])  # the largest first, while there is room


def _kept(things: OrderedDict[Any, Thing], key: Any, make: Callable[[], Thing], *, most: int) -> Thing:
    if key not in things:
        things[key] = make()
        while len(things) > most:
            things.popitem(last=False)
    return things[key]


def _is_to_be_found(nodule: Nodule, scale: float) -> bool:
    """Whether a scale shows a nodule well. A large one of ground glass alone looks like the areas that are none, and is never counted."""
    low, high = TO_BE_FOUND_MM
    if nodule.kind == "ground-glass" and (scale > 1 or nodule.diameter_mm > LARGEST_GROUND_GLASS_MM):
        return False
    return nodule.diameter_mm <= high if scale == 1 else nodule.diameter_mm >= low * scale


def _likely_mistake(scene: ChestScene, rng: np.random.Generator, *, hazy: float) -> NDArray[np.float64]:
    """A place in or near the lung where nets see nodules: dome, heart border, hilum, first rib, ground glass, scars; or anywhere.

    Where there are ground glass or scars, they are it with the chance `hazy`.
    """
    anatomy = scene.anatomy
    kind = rng.random()
    soft = (*anatomy.hazes, *anatomy.bands)
    if soft and rng.random() < hazy:
        return np.asarray(soft[int(rng.integers(len(soft)))].centre) + rng.uniform(-1, 1, 3) * 15
    if kind < 0.25:
        side = int(rng.integers(2))
        hilum = anatomy.mediastinum[-1 - side]
        outward = np.array([12.0 * (1 if hilum.centre[0] > 0 else -1), 0, 0])  # where its vessels branch in the lung
        branching: NDArray[np.float64] = np.asarray(hilum.centre) + outward + rng.uniform(-1, 1, 3) * (20, 25, 35)
        return branching
    if kind < 0.35:
        x, y, _ = anatomy.cage.centre
        return np.array([x + rng.choice([-1, 1]) * rng.uniform(35, 80), y + rng.uniform(-60, 40), anatomy.apex_z - rng.uniform(0, 40)])
    if kind < 0.55:
        dome = anatomy.domes[int(rng.integers(2))]
        top = dome.centre[2] + (dome.radii[2] if np.isfinite(dome.radii[2]) else 0)
        return np.array([dome.centre[0] + rng.uniform(-35, 35), rng.uniform(-50, 50), top + rng.uniform(-20, 10)])
    if kind < 0.65:
        return np.asarray(anatomy.heart.centre) + rng.uniform(-1, 1, 3) * anatomy.heart.radii
    depth = (-3.0, 6.0) if kind < 0.88 else (0.0, np.inf)
    point: NDArray[np.float64] = points_in_lung(anatomy, rng, count=1, depth_mm=depth)[0] + rng.uniform(-1, 1, 3) * (20, 20, 8)
    return point


def _rendered(scene: ChestScene, centre: NDArray[np.float64], scale: float, data: NodulePatches) -> _Place:
    step_z, step_y, step_x = (step * scale for step in data.spacing_mm)
    slices, rows, columns = data.patch
    corner = centre - np.array([columns * step_x, rows * step_y, slices * step_z]) / 2
    margin = 1.5 * LONGEST_MM + 1
    thin = 1.25 * scale
    fine = Grid(
        origin_lps_mm=(float(corner[0]), float(corner[1]), float(corner[2] - margin)),
        spacing_mm=(thin, step_y, step_x),
        shape=(int(np.ceil((slices * step_z + 2 * margin) / thin)), rows, columns),
    )
    target = Grid(
        origin_lps_mm=(float(corner[0]), float(corner[1]), float(corner[2])), spacing_mm=(step_z, step_y, step_x), shape=data.patch
    )  # fmt: skip
    weight = np.asarray(scene.anatomy.lung_distance(target.axes) < data.region_margin_mm, dtype=np.float32)
    truth = np.zeros(target.shape, dtype=np.bool_)
    for nodule in scene.nodules:
        if (found := true_mask(scene, nodule, target)) is not None:
            mask, box = found
            if _is_to_be_found(nodule, scale):
                truth[box] |= mask
                weight[box][mask] = np.clip((WEIGHED_MM * scale / nodule.diameter_mm) ** 1.5, 1, MOST_WEIGHT)
            else:
                weight[box][mask] = 0
    return _Place(
        scale=scale, target=target, fine_z=fine.origin_lps_mm[2] + thin * np.arange(fine.shape[0]),
        hu=render(scene if scale == 1 else _without_thin_vessels(scene), fine).hu,
        truth=truth, weight=weight,
    )  # fmt: skip


def _without_thin_vessels(scene: ChestScene) -> ChestScene:
    """What a coarse grid shows of a scene: there are thousands of thin vessels, and they fade there."""
    tubes = scene.anatomy.vessels
    seen = tubes.start_radii > THIN_MM
    kept = Tubes(starts=tubes.starts[seen], ends=tubes.ends[seen], start_radii=tubes.start_radii[seen], end_radii=tubes.end_radii[seen])
    return replace(scene, anatomy=replace(scene.anatomy, vessels=kept))


def _scanned(place: _Place, data: NodulePatches, rng: np.random.Generator) -> Patch:
    protocol = random_protocol(rng)
    interval = protocol.thickness_mm * (1.0 if rng.random() < 0.6 else rng.uniform(0.5, 1.0))
    target_z = place.target.origin_lps_mm[2] + place.target.spacing_mm[0] * np.arange(place.target.shape[0])
    slice_z = np.arange(target_z[0] - rng.uniform(0, interval), target_z[-1] + interval, interval)
    slices = apply_matrix(averaging(place.fine_z, slice_z, protocol.thickness_mm), place.hu)
    scanned = develop(slices, _seen_at(protocol, place.scale), rng)
    hu = apply_matrix(interpolating(slice_z, target_z), scanned) + np.float32(rng.normal(0, 6))
    low, high = data.window_hu
    image = np.clip((hu - low) / (high - low), 0, 1).astype(np.float32)
    turns = tuple(slice(None, None, -1) if rng.random() < share else slice(None) for share in (0.3, 0.3, 0.5))
    image, truth, weight = (np.asarray(part[turns], dtype=np.float32)[None] for part in (image, place.truth, place.weight))
    return torch.from_numpy(image.copy()), torch.from_numpy(truth.copy()), torch.from_numpy(weight.copy())


def _seen_at(protocol: Protocol, scale: float) -> Protocol:
    """What remains of noise and blur where `scale` x `scale` pixels became one."""
    return replace(protocol, noise_hu=protocol.noise_hu / scale, blur_px=protocol.blur_px / scale + 0.3 * (scale - 1))
