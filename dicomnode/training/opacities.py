"""Training films with opacities in the lungs and without, from projected phantoms: an endless, numbered stream.

A chest is projected once for each view; ribs, arms and breasts, opacities, technique and framing change from film to film. Film i of
a seed is always the same film. Real images never come in here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.utils.data import Dataset

from dicomnode.analysis.preparation import FILM_CONTEXT, local_contrast
from dicomnode.analysis.radiograph import filled
from dicomnode.phantoms.chest import ChestScene, chest_scene
from dicomnode.phantoms.opacities import conspicuity, crowd_opacities, with_decoys, with_opacities
from dicomnode.phantoms.radiograph import Technique, View, digital_technique, dressed, expose, project, random_technique, random_view
from dicomnode.phantoms.shadows import Shadow
from dicomnode.phantoms.shapes import Floats
from dicomnode.training.films import Film, between_percentiles, framed, with_marks
from dicomnode.training.recipe import Opacities

VIEWS_AT_A_TIME = 4
DRESSES_PER_VIEW = 5
FILMS_PER_DRESS = 16
PIXEL_MM, STEP_MM = 1.8, (2.5, 6.0, 2.5)
HINTED = 0.8  # an opacity of less conspicuity counts neither as one nor as none
OLDER = 0.1  # of the films are exposed by any technique, the others as today
MIRRORED = 0.3
TALLEST = 1.35  # the phantoms are made for CT, of people who lie


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A chest before the detector, without what changes from film to film."""

    scene: ChestScene
    view: View
    bare: Shadow


class OpacityFilms(Dataset[Film]):
    """Film number -> (part of a film around the lungs (1, r, c) as local contrast, opacities (1, r, c), lung fields (1, r, c)), float32."""

    def __init__(self, data: Opacities, *, seed: int, count: int) -> None:
        self._data, self._seed, self._count = data, seed, count
        self._standing: OrderedDict[int, Standing] = OrderedDict()
        self._dressed: OrderedDict[tuple[int, int], Shadow] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Film:
        rng = np.random.default_rng([self._seed, 51, index])
        place, lane = divmod(index, VIEWS_AT_A_TIME)
        block, film = divmod(place, DRESSES_PER_VIEW * FILMS_PER_DRESS)
        shadow = framed(self._shadow(block * VIEWS_AT_A_TIME + lane, film // FILMS_PER_DRESS), rng)
        opacities = crowd_opacities(shadow, rng) if rng.random() < self._data.positive else ()
        truth, counted = np.zeros(shadow.plane.shape, dtype=np.bool_), filled(shadow.right) | filled(shadow.left)
        for opacity in opacities:
            if conspicuity(shadow, opacity) < HINTED:
                counted[opacity.box] &= ~opacity.body
            else:
                truth[opacity.box] |= opacity.body
        image = expose(with_opacities(shadow, opacities), any_technique(rng), rng)
        return _augmented(image, truth, counted, self._data, rng)

    def _shadow(self, number: int, dress: int) -> Shadow:
        if (number, dress) not in self._dressed:
            standing = self._stand(number)
            rng = np.random.default_rng([self._seed, 52, number, dress])
            self._dressed[number, dress] = upright(standing, rng)
            while len(self._dressed) > VIEWS_AT_A_TIME:
                self._dressed.popitem(last=False)
        return self._dressed[number, dress]

    def _stand(self, number: int) -> Standing:
        if number not in self._standing:
            rng = np.random.default_rng([self._seed, 53, number])
            self._standing[number] = standing(int(rng.integers(2**31)), rng)
            while len(self._standing) > VIEWS_AT_A_TIME:
                self._standing.popitem(last=False)
        return self._standing[number]


def standing(seed: int, rng: np.random.Generator) -> Standing:
    """Project a random chest without haze, which would be an opacity that nobody counts."""
    scene = chest_scene(seed)
    scene = replace(scene, anatomy=replace(scene.anatomy, hazes=()))
    view = random_view(rng)
    return Standing(scene=scene, view=view, bare=project(scene, view, pixel_mm=PIXEL_MM, step_mm=STEP_MM, bare=True))


def upright(standing: Standing, rng: np.random.Generator) -> Shadow:
    """One film's shadow of a chest: dressed, with decoys, and as tall as the lungs of someone who stands and has breathed in."""
    shadow = dressed(standing.bare, standing.scene, standing.view, rng)
    factor = rng.uniform(1.0, TALLEST)
    parts = {
        name: ndimage.zoom(getattr(shadow, name), (factor, 1.0), order=1, mode="nearest", grid_mode=True)
        for name in ("soft_cm", "bone_cm", "right", "left")
    }
    return with_decoys(replace(shadow, plane=replace(shadow.plane, shape=parts["soft_cm"].shape), **parts), rng)


def any_technique(rng: np.random.Generator) -> Technique:
    """How a film is exposed: mostly as today."""
    return random_technique(rng) if rng.random() < OLDER else digital_technique(rng)


def _augmented(image: Floats, truth: NDArray[np.bool_], region: NDArray[np.bool_], data: Opacities, rng: np.random.Generator) -> Film:
    image = with_marks(image, rng)
    if rng.random() < 0.5:  # sharpened, or blurred, as a workstation does
        image = image + rng.uniform(-0.5, 1.5) * (image - ndimage.gaussian_filter(image, float(rng.uniform(0.7, 4))))
    if rng.random() < MIRRORED:
        image, truth, region = image[:, ::-1], truth[:, ::-1], region[:, ::-1]
    parts = _turned((image, truth.astype(np.float32), region.astype(np.float32)), data.size_px, rng)
    box = _around(parts[2] > 0.5, round(data.size_px * FILM_CONTEXT * rng.uniform(0.5, 1.5)))
    seen = local_contrast(torch.from_numpy(between_percentiles(parts[0][box]))[None])[0].numpy()
    within = parts[2][box] > 0.5
    bodies = (parts[1][box] > 0.5) & within
    here, there = zip(*(_window(n, data.patch_px, rng) for n in seen.shape), strict=True)
    result = np.zeros((3, data.patch_px, data.patch_px), dtype=np.float32)
    for whole, part in zip(result, (seen, bodies, within), strict=True):
        whole[there] = part[here]
    film, marked, counted = (torch.from_numpy(part[None]) for part in result)
    return film, marked, counted


def _around(region: NDArray[np.bool_], margin: int) -> tuple[slice, ...]:
    """The box around a region and so many pixels more, as analysis cuts it; all where the region is empty."""
    filled_axes = [np.flatnonzero(region.any(axis=axis)) for axis in (1, 0)]
    if not len(filled_axes[0]):
        return slice(None), slice(None)
    return tuple(slice(max(0, int(i[0]) - margin), int(i[-1]) + 1 + margin) for i in filled_axes)


def _window(size: int, patch: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Which part of `size` pixels a patch shows, and where in the patch it lies: in its middle if it is smaller."""
    if size <= patch:
        return slice(0, size), slice((patch - size) // 2, (patch - size) // 2 + size)
    start = int(rng.integers(0, size - patch + 1))
    return slice(start, start + patch), slice(0, patch)


def _turned(parts: tuple[Floats, ...], size: int, rng: np.random.Generator) -> list[Floats]:
    """Images turned, stretched and brought to a square of `size`; not a number beyond their border."""
    angle, stretch = np.deg2rad(rng.normal(0, 3)), np.exp(rng.normal(0, 0.06))
    shape = np.array(parts[0].shape) * (1.0, stretch)
    scale = max(shape) / size
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    matrix[1] /= stretch
    offset = (np.array(parts[0].shape) - 1) / 2 - matrix @ np.full(2, (size - 1) / 2)
    inside = np.floor(shape / scale + 1e-6).astype(int)
    rows, columns = (slice((size - n) // 2, (size - n) // 2 + n) for n in np.minimum(inside, size))
    result = []
    for part in parts:
        moved = ndimage.affine_transform(part, matrix, offset=offset, output_shape=(size, size), order=1, mode="nearest")
        square = np.full((size, size), np.nan, dtype=np.float32)
        square[rows, columns] = moved[rows, columns]
        result.append(square)
    return [result[0], *(np.nan_to_num(part) for part in result[1:])]
