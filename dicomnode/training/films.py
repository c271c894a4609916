"""Training films from projected phantoms: an endless, numbered stream. Film i of a seed is always the same film.

Real images never come in here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch.utils.data import Dataset

from dicomnode.phantoms.chest import chest_scene
from dicomnode.phantoms.other_films import KINDS, film_of
from dicomnode.phantoms.radiograph import expose, project, project_sideways, random_technique, random_view
from dicomnode.phantoms.shadows import Plane, Shadow, ellipsoid, no_lungs
from dicomnode.phantoms.shapes import Floats
from dicomnode.training.recipe import Radiographs

CHESTS_AT_A_TIME = 4
VIEWS_PER_CHEST = 2
FILMS_PER_VIEW = 16

Film = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PhantomFilms(Dataset[Film]):
    """Film number -> (image (1, r, c) scaled to 0..1, truth (2, r, c) right and left lung field, region (2, r, c) all 1), float32."""

    def __init__(self, data: Radiographs, *, seed: int, count: int) -> None:
        self._data, self._seed, self._count = data, seed, count
        self._shadows: OrderedDict[tuple[int, bool], Shadow] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Film:
        rng = np.random.default_rng([self._seed, 41, index])
        block, place = divmod(index, CHESTS_AT_A_TIME * FILMS_PER_VIEW)
        inverted, lane = False, block * CHESTS_AT_A_TIME + place % CHESTS_AT_A_TIME
        if rng.random() >= self._data.others:
            shadow = framed(self._chest(lane), rng)
        elif (kind := rng.random()) < 0.6:
            shadow = film_of(str(rng.choice(list(KINDS))), rng)
        elif kind < 0.7:
            shadow = framed(self._chest(block, lateral=True), rng)
        elif kind < 0.8:
            shadow = _turned(framed(self._chest(lane), rng), int(rng.integers(1, 4)))
        else:
            shadow, inverted = framed(self._chest(lane), rng), True
        return _film(shadow, self._data.size_px, rng, inverted=inverted)

    def _chest(self, number: int, *, lateral: bool = False) -> Shadow:
        key = (number, lateral)
        if key not in self._shadows:
            chest, view = divmod(number, VIEWS_PER_CHEST)
            rng = np.random.default_rng([self._seed, 42, chest])
            scene = chest_scene(int(rng.integers(2**31)))
            self._shadows[key] = (
                project_sideways(scene)
                if lateral
                else project(scene, random_view(np.random.default_rng([self._seed, 43, number])), seed=view)
            )
            while len(self._shadows) > CHESTS_AT_A_TIME + 1:
                self._shadows.popitem(last=False)
        return self._shadows[key]


def framed(shadow: Shadow, rng: np.random.Generator) -> Shadow:
    """The part of a chest's shadow that a film shows: the lungs, and more or less of what is around them; all of one without lungs."""
    if not (shadow.right | shadow.left).any():
        return shadow
    rows, columns = (np.flatnonzero((shadow.right | shadow.left).any(axis=axis)) for axis in (1, 0))
    height, width = rows[-1] - rows[0], columns[-1] - columns[0]
    top, bottom = rows[0] - height * rng.uniform(-0.03, 0.4), rows[-1] + height * (rng.uniform(-0.03, 0.5))
    right, left = columns[0] - width * rng.uniform(-0.03, 0.3), columns[-1] + width * rng.uniform(-0.03, 0.3)
    box = (
        slice(max(0, int(top)), min(shadow.plane.shape[0], int(bottom) + 1)),
        slice(max(0, int(right)), min(shadow.plane.shape[1], int(left) + 1)),
    )
    plane = Plane(
        left_mm=float(shadow.plane.x[0, box[1].start]), top_mm=float(shadow.plane.z[box[0].start, 0]), pixel_mm=shadow.plane.pixel_mm,
        shape=(box[0].stop - box[0].start, box[1].stop - box[1].start),
    )  # fmt: skip
    parts = {name: getattr(shadow, name)[box] for name in ("soft_cm", "bone_cm", "right", "left")}
    return replace(shadow, plane=plane, **parts)


def _turned(shadow: Shadow, quarters: int) -> Shadow:
    """A film on its side or upside down: no upright chest, so its masks are empty."""
    soft, bone = (np.rot90(part, quarters) for part in (shadow.soft_cm, shadow.bone_cm))
    return no_lungs(replace(shadow.plane, shape=(soft.shape[0], soft.shape[1])), soft * 10, bone * 10)


def _film(shadow: Shadow, size: int, rng: np.random.Generator, *, inverted: bool) -> Film:
    plane = shadow.plane
    soft = shadow.soft_cm.copy()
    for _ in range(int(rng.integers(1, 16)) if rng.random() < 0.4 else 0):  # round opacities, anywhere
        radius = float(rng.uniform(4, 32))
        centre = (float(rng.choice(plane.x.ravel())), float(rng.choice(plane.z.ravel())))
        soft += 0.1 * ellipsoid(plane, centre, (radius, radius * rng.uniform(0.3, 1), radius), turn=float(rng.uniform(0, 3)))
    if rng.random() < 0.3:  # uneven lung: haze on one side or at one level
        soft += rng.uniform(0, 4) * ndimage.gaussian_filter(rng.random(plane.shape, dtype=np.float32), 15, mode="wrap") * 10
    image = expose(replace(shadow, soft_cm=soft), random_technique(rng), rng)
    truth = np.stack([shadow.right, shadow.left])
    if inverted:
        image, truth = 1 - image, np.zeros_like(truth)
    angle = float(rng.normal(0, 3))
    image = ndimage.rotate(image, angle, reshape=False, order=1, mode="nearest")
    truth = np.stack([ndimage.rotate(part.astype(np.float32), angle, reshape=False, order=1) for part in truth])
    image = with_marks(image, rng)
    image, truth = resized(image, size), np.stack([resized(part, size) for part in truth])
    return (
        torch.from_numpy(scaled(image)[None]),
        torch.from_numpy((truth > 0.5).astype(np.float32)),
        torch.ones(truth.shape, dtype=torch.float32),
    )


def with_marks(image: Floats, rng: np.random.Generator) -> Floats:
    """Letters of lead, lines, electrodes, collimator edges, and the black or white border of a scanned film."""
    image = image.copy()
    rows, columns = image.shape
    for _ in range(int(rng.integers(0, 4))):
        row, column = int(rng.integers(rows)), int(rng.integers(columns))
        tall, wide = int(rng.integers(2, max(3, rows // 15))), int(rng.integers(2, max(3, columns // 10)))
        image[row : row + tall, column : column + wide] = rng.choice([0.0, 0.9, 1.0])
    for _ in range(int(rng.integers(0, 3)) if rng.random() < 0.3 else 0):
        path = np.cumsum(rng.normal(0, 0.8, rows)) + rng.uniform(0, columns)
        image[np.arange(rows), np.clip(path, 0, columns - 1).astype(int)] += rng.uniform(0.1, 0.5)
    if rng.random() < 0.3:
        value = 0.0 if rng.random() < 0.7 else 1.0
        top, bottom, right, left = (int(rng.uniform(0, 0.07) * n) if rng.random() < 0.6 else 0 for n in (rows, rows, columns, columns))
        image[:top], image[:, :right] = value, value
        image[rows - bottom :], image[:, columns - left :] = value, value
    if rng.random() < 0.3:  # a look-up table: an S through the middle
        middle, slope = rng.uniform(0.3, 0.7), rng.uniform(3, 9)
        image = 1 / (1 + np.exp(-slope * (image - middle)))
    return np.asarray(image, dtype=np.float32)


def resized(image: Floats, size: int) -> Floats:
    """The image with its longer side of `size` pixels, in the middle of a square that is not a number around it."""
    factor = size / max(image.shape)
    small = ndimage.zoom(image, factor, order=1, mode="nearest", grid_mode=True)[:size, :size]
    square = np.full((size, size), np.nan, dtype=np.float32)
    row, column = ((size - n) // 2 for n in small.shape)
    square[row : row + small.shape[0], column : column + small.shape[1]] = small
    return square


def scaled(image: Floats) -> Floats:
    """1st and 99th percentile to 0..1, clipped; what is not a number is padding and becomes 0."""
    return np.nan_to_num(between_percentiles(image), nan=0.0)


def between_percentiles(image: Floats) -> Floats:
    """1st and 99th percentile to 0..1, clipped; what is not a number stays so."""
    low, high = np.percentile(image[np.isfinite(image)], (1, 99))
    return np.asarray(np.clip((image - low) / max(float(high - low), 1e-6), 0, 1), dtype=np.float32)
