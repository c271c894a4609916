"""Training volumes of heads from phantoms: an endless, numbered stream. Volume i of a seed is always the same volume.

The contrast is drawn at random, so that the network learns shapes and not a sequence (B. Billot et al., SynthSeg, Med. Image
Anal. 86, 2023). Real images never come in here.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.utils.data import Dataset

from dicomnode.phantoms.head import CONTRASTS, TISSUES, head_scene, receive, render_head
from dicomnode.phantoms.shapes import Floats, Grid, random_waves
from dicomnode.training.films import scaled
from dicomnode.training.recipe import Heads

HEADS_AT_A_TIME = 3
VOLUMES_PER_HEAD = 10
MARGIN = 10  # voxels around a patch, so that a turned and shifted one finds image

Patch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Head = tuple[dict[str, NDArray[np.uint8]], NDArray[np.uint8]]  # shares of tissues and of the brain, 0 to 255


class PhantomHeads(Dataset[Patch]):
    """Number -> (image (1, k, r, c) scaled to 0..1, truth (1, k, r, c) the brain, region (1, k, r, c) the field of view), float32."""

    def __init__(self, data: Heads, *, seed: int, count: int) -> None:
        self._data, self._seed, self._count = data, seed, count
        self._heads: OrderedDict[int, Head] = OrderedDict()
        slices, rows, columns = (n + 2 * MARGIN for n in data.patch)
        dz, dy, dx = data.spacing_mm
        # the brain's middle lies somewhat above the patch's middle: a face and a neck are below it
        origin = (-(columns - 1) * dx / 2, -(rows - 1) * dy / 2 + 8, -(slices - 1) * dz / 2 - 15)
        self._grid = Grid(origin_lps_mm=origin, spacing_mm=data.spacing_mm, shape=(slices, rows, columns))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Patch:
        rng = np.random.default_rng([self._seed, 71, index])
        block, place = divmod(index, HEADS_AT_A_TIME * VOLUMES_PER_HEAD)
        shares, brain = self._head(block * HEADS_AT_A_TIME + place % HEADS_AT_A_TIME)
        if rng.random() < self._data.others:
            image, truth = _no_head(self._grid, rng), np.zeros(self._grid.shape, dtype=np.float32)
        else:
            image, truth = _contrast(shares, brain, rng), np.asarray(brain / np.float32(255), dtype=np.float32)
        image, truth = _placed(image, truth, self._data.patch, rng)
        image = _acquired(image, self._data.spacing_mm, rng)
        seen, image = np.isfinite(image), scaled(image)
        return (
            torch.from_numpy(image[None]),
            torch.from_numpy(((truth > 0.5) & seen).astype(np.float32)[None]),
            torch.from_numpy(seen.astype(np.float32)[None]),
        )

    def _head(self, number: int) -> Head:
        if number not in self._heads:
            rng = np.random.default_rng([self._seed, 72, number])
            lesion = float(rng.uniform(10, 60)) if rng.random() < 0.4 else 0.0
            shares, brain = render_head(head_scene(int(rng.integers(2**31)), lesion_mm=lesion), self._grid)
            self._heads[number] = {name: _bytes(share) for name, share in shares.items()}, _bytes(brain)
            while len(self._heads) > HEADS_AT_A_TIME:
                self._heads.popitem(last=False)
        return self._heads[number]


def _bytes(share: Floats) -> NDArray[np.uint8]:
    return np.asarray(np.round(255 * share), dtype=np.uint8)


def _contrast(shares: dict[str, NDArray[np.uint8]], brain: NDArray[np.uint8], rng: np.random.Generator) -> Floats:
    """An image of random contrast: a usual one with every tissue changed somewhat, or one without any likeness."""
    usual = CONTRASTS[str(rng.choice(list(CONTRASTS)))]
    if rng.random() < 0.6:
        values = {name: max(0.0, usual[name] * float(np.exp(rng.normal(0, 0.25))) + float(rng.normal(0, 0.05))) for name in TISSUES}
    else:
        values = {name: float(rng.uniform(0, 1)) for name in TISSUES}
        values["bone"] = float(rng.uniform(0, 0.3))
    values["air"] = float(abs(rng.normal(0, 0.02)))
    image = np.zeros(brain.shape, dtype=np.float32)
    for name, share in shares.items():
        image += np.float32(values[name] / 255) * share
    texture = ndimage.gaussian_filter(rng.standard_normal(brain.shape, dtype=np.float32), float(rng.uniform(0.6, 2.0)))
    image *= 1 + np.float32(rng.uniform(0, 0.12)) * texture / max(float(texture.std()), 1e-6)
    kind = rng.random()
    if kind < 0.12:  # somebody has taken the skull away
        image = np.where(brain > 127, image, np.float32(rng.choice([0.0, values["white"] * 0.5])))
    return np.asarray(image, dtype=np.float32)


def _no_head(grid: Grid, rng: np.random.Generator) -> Floats:
    """A bottle, a limb, blobs of any kind or noise."""
    z, y, x = grid.axes
    image = np.zeros(grid.shape, dtype=np.float32)
    for _ in range(int(rng.integers(0, 9))):
        centre, radii = rng.uniform(-70, 70, 3), rng.uniform(8, 110, 3)
        if rng.random() < 0.4:
            radii[int(rng.integers(3))] = 1e6  # a bottle, a bone
        form = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + ((z - centre[2]) / radii[2]) ** 2
        image = np.where(form < 1, np.float32(rng.uniform(0, 1)), image)
    if rng.random() < 0.5:
        image = image * (1 + 0.3 * random_waves(rng, count=24, wavelengths_mm=(8, 60), deviation=1.0)(grid.axes))
    return np.asarray(np.maximum(image, 0), dtype=np.float32)


def _placed(image: Floats, truth: Floats, patch: tuple[int, int, int], rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Turned, stretched, shifted and cut to the patch; sometimes a part of it lies outside the field of view."""
    angles = rng.normal(0, 0.12, 3)
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = (a for a in range(3) if a != axis)
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    matrix = matrix @ np.diag(np.exp(rng.normal(0, 0.07, 3)))
    middle = (np.array(image.shape) - 1) / 2 + rng.normal(0, 4, 3)
    offset = middle - matrix @ ((np.array(patch) - 1) / 2)
    image, truth = (
        ndimage.affine_transform(part, matrix, offset, output_shape=patch, order=1, mode="constant", cval=0.0) for part in (image, truth)
    )
    if rng.random() < 0.5:
        image, truth = image[:, :, ::-1].copy(), truth[:, :, ::-1].copy()
    return image, truth


def _acquired(image: Floats, spacing_mm: tuple[float, float, float], rng: np.random.Generator) -> Floats:
    """Thick slices along one axis, blur, bias field and noise; outside a smaller field of view it is not a number."""
    axis = int(rng.choice(3, p=(0.6, 0.2, 0.2)))
    thick = float(rng.uniform(1.0, 7.0)) / spacing_mm[axis]
    if thick > 1.2:
        count = max(4, round(image.shape[axis] / thick))
        factors = np.ones(3)
        factors[axis] = count / image.shape[axis]
        coarse = ndimage.zoom(
            ndimage.uniform_filter1d(image, max(1, round(thick)), axis=axis), factors, order=1, grid_mode=True, mode="nearest"
        )
        factors[axis] = image.shape[axis] / count
        image = ndimage.zoom(coarse, factors, order=1, grid_mode=True, mode="nearest")
    if rng.random() < 0.3:
        image = ndimage.gaussian_filter(image, float(rng.uniform(0.2, 0.8)))
    image = receive(image, rng, noise=float(rng.uniform(0.0, 0.06)), bias=float(rng.uniform(0, 0.35)))
    image = image ** np.float32(np.exp(rng.normal(0, 0.2)))
    if rng.random() < 0.4:
        seen = np.zeros(image.shape, dtype=np.bool_)
        cuts = [(int(rng.integers(0, 14)), int(rng.integers(0, 14))) if rng.random() < 0.5 else (0, 0) for _ in range(3)]
        seen[tuple(slice(first, n - last) for (first, last), n in zip(cuts, image.shape, strict=True))] = True
        image = np.where(seen, image, np.float32(np.nan))
    return np.asarray(image, dtype=np.float32)
