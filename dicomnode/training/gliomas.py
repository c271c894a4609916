"""Training volumes of brains with gliomas and without: an endless, numbered stream. Volume i of a seed is always the same.

A few patients' tumours are made many: each is healed by tissue of the other side, set into other brains or into its own at another place,
turned, bent, scaled and given another contrast; the brain around it is bent, blurred, cut into thick slices and lit unevenly. Among
them are synthetic heads, of which most have no tumour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.data import Dataset

from dicomnode.analysis.preparation import normalised
from dicomnode.errors import UsageError
from dicomnode.training.glioma_heads import SyntheticHeads
from dicomnode.training.glioma_patients import INTENSITIES, Brain, Patient, read_patients
from dicomnode.training.recipe import Gliomas

Patch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class GliomaPatches(Dataset[Patch]):
    """Number -> (image (2, k, r, c), truth (2, k, r, c) glioma and enhancing core, region (2, k, r, c) where each counts), float32."""

    def __init__(self, data: Gliomas, *, seed: int, count: int, dataset: Path | None) -> None:
        """Read the patients.

        Raises:
            UsageError: there is no folder, or it holds no patient to train on.
        """
        if dataset is None:
            raise UsageError("gliomas are learned from patients: --data names the folder of a data set with FLAIR and T1c")
        self._data, self._seed, self._count = data, seed, count
        self._patients = read_patients(dataset, leave_out=data.leave_out)
        self._heads = SyntheticHeads(seed=seed, count=data.phantom_heads)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Patch:
        data, rng = self._data, np.random.default_rng([self._seed, 91, index])
        if rng.random() < data.phantoms:
            kind = str(rng.choice(("none", "own", "transplant"), p=data.phantom_tumours))
            brain = self._heads.any(rng).imaged(rng, with_glioma=kind == "own")
            return rendered(brain, self._drawn(rng, int(kind == "transplant")), data, rng)
        patient = self._patients[int(rng.integers(len(self._patients)))]
        if rng.random() < data.own:
            return rendered(patient.own, (), data, rng)
        return rendered(patient.healed, self._drawn(rng, int(rng.choice((0, 1, 2), p=data.transplants))), data, rng)

    def _drawn(self, rng: np.random.Generator, count: int) -> list[Patient]:
        return [self._patients[int(rng.integers(len(self._patients)))] for _ in range(count)]


def rendered(brain: Brain, donors: Sequence[Patient], data: Gliomas, rng: np.random.Generator) -> Patch:
    """One training volume: a brain as it is, and each donor's tumour somewhere in it."""
    places = _places(brain, data, rng)
    drawn = _sampled(torch.cat([brain.image, brain.outline, brain.truth, brain.unknown]), places)
    image, outline, truth, known = drawn[:2], drawn[2:3], drawn[3:5], (drawn[5:] < 0.2).float()
    for donor in donors:
        _transplant(image, truth, outline > 0.5, donor, data, rng)
    truth = (truth > 0.5).float() * (outline > 0.5)
    _contrast(image, truth, rng)
    if not brain.skull and rng.random() < data.shells:
        outline = _shelled(image, outline, data, rng)
    image = _acquired(image, outline, data, rng)
    region = known.repeat(2, 1, 1, 1)
    if rng.random() < data.without_t1c:
        image[1], region[1] = 0.0, 0.0
    return image, truth, region


def _places(brain: Brain, data: Gliomas, rng: np.random.Generator) -> torch.Tensor:
    """Where in the brain's voxels the patch's voxels come from, (k, r, c, 3)."""
    size = np.array(brain.image.shape[1:], dtype=np.float64)
    reach = np.maximum(0, size - np.array(data.patch) * data.spacing_mm / brain.step_mm) / 2
    middle = (size - 1) / 2 + rng.uniform(-1, 1, 3) * reach + rng.normal(0, 4, 3) / brain.step_mm
    flip = -1.0 if rng.random() < 0.5 else 1.0
    matrix = _turn(rng, 0.17) @ np.diag(np.exp(rng.normal(0, 0.09, 3)) * (1, 1, flip)) * (np.array(data.spacing_mm) / brain.step_mm)
    return _grid(data.patch, matrix, middle, rng, bend=float(rng.uniform(0, 4.0)) / brain.step_mm)


def _turn(rng: np.random.Generator, deviation: float) -> NDArray[np.float64]:
    matrix = np.eye(3)
    for axis, angle in enumerate(rng.normal(0, deviation, 3)):
        first, second = (a for a in range(3) if a != axis)
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def _grid(
    shape: tuple[int, int, int], matrix: NDArray[np.float64], middle: NDArray[np.float64], rng: np.random.Generator, *, bend: float
) -> torch.Tensor:
    """(k, r, c, 3) positions: `matrix` about the patch's middle, which lies at `middle`, bent by some voxels."""
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in shape]
    turned = torch.from_numpy(matrix.astype(np.float32))
    positions = (
        axes[0][:, None, None, None] * turned[:, 0]
        + axes[1][None, :, None, None] * turned[:, 1]
        + axes[2][None, None, :, None] * turned[:, 2]
    )
    waves = torch.from_numpy(rng.normal(0, bend, (1, 3, 5, 6, 5)).astype(np.float32))
    bent = functional.interpolate(waves, size=shape, mode="trilinear", align_corners=True)[0]
    return positions + torch.from_numpy(middle.astype(np.float32)) + bent.permute(1, 2, 3, 0)


def _sampled(image: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """An image (channels, k, r, c) at the places, linear; outside of it 0."""
    size = torch.tensor(image.shape[1:], dtype=torch.float32)
    unit = (2 * places + 1) / size - 1
    return functional.grid_sample(image[None], unit.flip(-1)[None], mode="bilinear", padding_mode="zeros", align_corners=False)[0]


def _transplant(
    image: torch.Tensor, truth: torch.Tensor, brain: torch.Tensor, donor: Patient, data: Gliomas, rng: np.random.Generator
) -> None:
    """Set a donor's tumour, turned, mirrored and scaled, anywhere in the brain, into image and truth."""
    inside = torch.nonzero(brain[0])
    if not len(inside):
        return
    target = inside[int(rng.integers(len(inside)))].numpy()
    scale = float(np.exp(rng.uniform(np.log(0.7), np.log(2.2))))  # millimetres of the donor for one here: large is a small tumour
    flips = np.where(rng.random(3) < (0.3, 0.3, 0.5), -1.0, 1.0)
    matrix = _turn(rng, 0.5) @ np.diag(np.exp(rng.normal(0, 0.15, 3)) * flips) * scale * (np.array(data.spacing_mm) / donor.own.step_mm)
    reach = np.ceil(1.2 * donor.reach_mm / scale / np.array(data.spacing_mm)).astype(int)
    low, high = np.maximum(target - reach, 0), np.minimum(target + reach + 1, data.patch)
    box = tuple(slice(int(first), int(last)) for first, last in zip(low, high, strict=True))
    middle = (np.array(donor.tumour.shape[1:]) - 1) / 2 + matrix @ ((low + high - 1) / 2 - target)
    shape = (int(high[0] - low[0]), int(high[1] - low[1]), int(high[2] - low[2]))
    drawn = _sampled(donor.tumour, _grid(shape, matrix, middle, rng, bend=float(rng.uniform(0, 3.0)) / donor.own.step_mm))
    theirs, masks = drawn[:2], drawn[2:]
    share = functional.avg_pool3d(masks[:1], 3, stride=1, padding=1).mul_(1.4).clamp_(0, 1) * brain[(slice(None), *box)]
    here = (slice(None), *box)
    image[here] = torch.lerp(image[here], theirs, share)
    truth[here] = torch.maximum(truth[here] * (1 - share), masks)


def _contrast(image: torch.Tensor, truth: torch.Tensor, rng: np.random.Generator) -> None:
    """Give the image's tumours another brightness: the whole and the enhancing core on FLAIR, the core on T1c."""
    for channel, label, low, high in ((0, 0, 1.3, 5.0), (0, 1, 0.4, 4.0), (1, 1, 1.2, 5.0)):
        found = torch.nonzero(truth[label] > 0.5)
        if rng.random() < 0.5 or len(found) < 20:
            continue
        box = tuple(slice(max(0, int(first) - 1), int(last) + 2) for first, last in zip(found.amin(0), found.amax(0), strict=True))
        part, mask = image[channel][box], truth[label][box]
        factor = float(np.clip(rng.uniform(low, high) / max(float(part[mask > 0.5].median()), 0.5), 0.3, 2.0))
        part *= 1 + (factor - 1) * functional.avg_pool3d(mask[None, None], 3, stride=1, padding=1)[0, 0]


def _shelled(image: torch.Tensor, outline: torch.Tensor, data: Gliomas, rng: np.random.Generator) -> torch.Tensor:
    """Put into the image what lies around a brain whose skull is on: fluid, then dura, bone and fat. Return an outline that holds both."""
    brain = outline > 0.5
    fluid = functional.max_pool3d(outline, 3, stride=1, padding=1)
    beyond = functional.max_pool3d(fluid, 3, stride=1, padding=1)
    for channel in range(len(image)):
        dark, level = float(rng.uniform(-4.0, -1.5)), float(rng.uniform(-3.5, 1.0))
        around = level + float(rng.uniform(0.5, 2.5)) * _waves(data.patch, (16, 20, 16), 1.0, rng)
        shell = torch.where(fluid[0] > 0.5, torch.full_like(around, dark), around)
        image[channel] = torch.where(brain[0], image[channel], shell)
    return functional.avg_pool3d(beyond, 3, stride=1, padding=1)


def _acquired(image: torch.Tensor, outline: torch.Tensor, data: Gliomas, rng: np.random.Generator) -> torch.Tensor:
    """Each series by itself: contrast, bias field, thick slices, noise; and normalised again, in an outline that is not quite right."""
    level = torch.full_like(outline, 0.5)
    if rng.random() < 0.6:  # some millimetres in or out, here more and there less
        level += _waves(data.patch, (6, 7, 6), 0.18, rng)
    brain = (outline > level.clamp_(0.2, 0.8))[0]
    channels = []
    for channel in image:
        value = (channel + 6.0).clamp_(min=0.2).div_(6.0)  # positive, so that a power bends it
        value = value ** float(np.exp(rng.normal(0, 0.25)))
        value *= _waves(data.patch, (3, 3, 3), float(rng.uniform(0, data.bias)), rng).exp_()
        if rng.random() < 0.45:
            value = _thick(value, data, rng)
        noise = float(rng.uniform(0, 0.04))
        if rng.random() < 0.5:
            value += torch.from_numpy(rng.standard_normal(data.patch, dtype=np.float32)) * noise
        else:
            value += _waves(data.patch, (data.patch[0] // 2, data.patch[1] // 2, data.patch[2] // 2), noise * 1.5, rng)
        channels.append(normalised(value, INTENSITIES, brain))
    return torch.stack(channels)


def _waves(shape: tuple[int, int, int], knots: tuple[int, int, int], deviation: float, rng: np.random.Generator) -> torch.Tensor:
    """A smooth random field: normally distributed at so many knots, linear between them."""
    values = torch.from_numpy(rng.standard_normal((1, 1, *knots), dtype=np.float32)) * deviation
    return functional.interpolate(values, size=shape, mode="trilinear", align_corners=True)[0, 0]


def _thick(value: torch.Tensor, data: Gliomas, rng: np.random.Generator) -> torch.Tensor:
    axis = int(rng.choice(3, p=(0.7, 0.15, 0.15)))
    size = list(value.shape)
    size[axis] = max(4, round(size[axis] * data.spacing_mm[axis] / float(rng.uniform(2.5, 7.0))))
    coarse = functional.interpolate(value[None, None], size=size, mode="area")
    return functional.interpolate(coarse, size=value.shape, mode="trilinear", align_corners=False)[0, 0]
