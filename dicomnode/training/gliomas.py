"""Training volumes of brains with gliomas, from a few patients: an endless, numbered stream. Volume i of a seed is always the same.

A few tumours are made many: each is healed by tissue of the other side, set into other brains or into its own at another place,
turned, bent, scaled and given another contrast; the brain around it is bent, blurred, cut into thick slices and lit unevenly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional
from torch.utils.data import Dataset

from dicomnode.analysis.grid import grid_over, resample_to
from dicomnode.analysis.head import brain_in_head
from dicomnode.analysis.manifest import PreprocessingSection
from dicomnode.analysis.preparation import normalised, resample
from dicomnode.errors import UsageError
from dicomnode.phantoms.head import CONTRASTS, GLIOMA, head_scene, receive, render_head, signal
from dicomnode.phantoms.shapes import Grid
from dicomnode.training.dataset import LabelledCase, load_dataset, read_case
from dicomnode.training.recipe import Gliomas

CHANNELS = ("flair", "t1c")
LABELS = ("Glioma", "Enhancing core")
STEP_MM = 1.0  # patients are kept on this grid, smoothed to what the network's grid averages
MARGIN = 6  # voxels around the brain that are kept
HEALED_MM = 5.0  # around a tumour are replaced with it
OUTLINE_MM = 2.0  # how softly the share of the brain falls off at its border
PHANTOM_GRID = Grid(origin_lps_mm=(-100.0, -126.0, -126.0), spacing_mm=(2.0, 2.0, 2.0), shape=(114, 124, 101))
_INTENSITIES = PreprocessingSection(spacing_mm=(STEP_MM,) * 3, intensity="organ-z-score")

Patch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Patient:
    """A brain on a grid of its own, cut to it; float32. Intensities are z-scores of the brain, 0 outside of it."""

    name: str
    step_mm: float  # of the grid
    own: torch.Tensor  # (2 + 1 + 2, k, r, c) FLAIR and T1c, share of the brain, shares of whole tumour and enhancing core
    healed: torch.Tensor  # (2 + 1 + 1, k, r, c) the same with the other side's tissue for the tumour, the brain, tumour that is left
    tumour: torch.Tensor  # (2 + 2, k, r, c) the part of FLAIR, T1c and both shares that holds the tumour
    reach_mm: float  # from the middle of that part to its corners


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
        self._phantoms = [phantom_patient(seed, number) for number in range(data.phantom_heads)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Patch:
        rng = np.random.default_rng([self._seed, 91, index])
        phantom = bool(self._phantoms) and rng.random() < self._data.phantoms
        return rendered(self._phantoms if phantom else self._patients, self._patients, self._data, rng)


def read_patients(folder: Path, *, leave_out: Collection[str] = ()) -> list[Patient]:
    """Read the patients of a data set's split `train`, but those that are left out.

    Raises:
        UsageError: it lacks a channel or a label, or no patient is left.
    """
    dataset = load_dataset(folder)
    if set(CHANNELS) - set(dataset.channels) or set(LABELS) - set(dataset.labels):
        raise UsageError(f"{folder} needs the channels {' and '.join(CHANNELS)} and the labels {' and '.join(LABELS)}")
    if unknown := sorted(set(leave_out) - {row.case for row in dataset.cases}):
        raise UsageError(f"{folder} has no case {unknown[0]} that could be left out")
    rows = [row for row in dataset.of_split("train") if row.case not in leave_out and set(CHANNELS) <= set(row.pixels_sha256)]
    if not rows:
        raise UsageError(f"{folder} holds no patient to train on")
    return [patient_of(read_case(dataset, row), dataset.labels) for row in rows]


def patient_of(case: LabelledCase, labels: Sequence[str]) -> Patient:
    """Bring a patient to a grid of 1 mm, normalised as the package will do it, and heal the tumour.

    Raises:
        NotEligible: no brain is seen.
        UsageError: no tumour is labelled.
    """
    volume = case.volumes[CHANNELS[0]]
    grid = grid_over(volume.voxels.shape, volume.affine, (STEP_MM,) * 3)
    host = torch.device("cpu")
    flair = resample(volume.voxels, grid, host)
    _, _, brain = brain_in_head(flair.numpy(), grid.spacing_mm)
    organ = torch.from_numpy(brain)
    box = _box_around(brain)
    images = [flair, *(resample(resample_to(case.volumes[name], volume).voxels, grid, host) for name in CHANNELS[1:])]
    image = smoothed(torch.stack([normalised(each, _INTENSITIES, organ)[box] for each in images]))
    masks = [case.truth[labels.index(label)].astype(np.float32) for label in LABELS]
    truth = smoothed(torch.stack([resample(mask, grid, host)[box] for mask in masks]))
    inside = organ[box].float()[None]
    tumour = truth[0].numpy() > 0.5
    if not tumour.any():
        raise UsageError(f"case {case.case}: no voxel of {LABELS[0]} is labelled")
    healed, left_over = _healed(image, tumour, inside)
    return _patient(case.case, STEP_MM, (image, healed), inside, truth, left_over)


def _patient(
    name: str, step_mm: float, images: tuple[torch.Tensor, torch.Tensor], brain: torch.Tensor, truth: torch.Tensor, left_over: torch.Tensor
) -> Patient:
    image, healed = images
    outline = torch.from_numpy(ndimage.gaussian_filter(brain.numpy(), (0, *(OUTLINE_MM / step_mm,) * 3)))
    part = torch.cat([image, truth])[(slice(None), *_box_around(truth[0].numpy() > 0.5))].contiguous()
    return Patient(
        name=name, step_mm=step_mm, own=torch.cat([image, outline, truth]), healed=torch.cat([healed, outline, left_over]), tumour=part,
        reach_mm=step_mm * float(np.linalg.norm(part.shape[1:])) / 2,
    )  # fmt: skip


def phantom_patient(seed: int, number: int) -> Patient:
    """A synthetic head with a glioma, its skull on, on a grid of 2 mm; healed it never had one."""
    rng = np.random.default_rng([seed, 92, number])
    scene = head_scene(int(rng.integers(2**31)), glioma_mm=float(rng.uniform(25, 75)))
    shares, _ = render_head(scene, PHANTOM_GRID)
    sound, _ = render_head(replace(scene, glioma=None), PHANTOM_GRID)
    contrasts = [_varied(CONTRASTS[name], rng) for name in CHANNELS]
    seeds = [int(rng.integers(2**31)) for _ in CHANNELS]
    texture = np.exp(rng.uniform(0, 0.1) * scene.texture(PHANTOM_GRID.axes))
    pairs = []
    for tissues in (shares, sound):
        images = [
            receive(signal(tissues, contrast) * texture, np.random.default_rng(each), bias=0.1)
            for contrast, each in zip(contrasts, seeds, strict=True)
        ]
        pairs.append(torch.from_numpy(np.stack(images)))
    _, _, brain = brain_in_head(pairs[0][0].numpy(), PHANTOM_GRID.spacing_mm)
    box, organ = _box_around(brain), torch.from_numpy(brain)
    own, healed = (torch.stack([normalised(each, _INTENSITIES, organ)[box] for each in pair]) for pair in pairs)
    masks = np.stack([sum(shares[tissue] for tissue in GLIOMA), shares["rim"]])
    truth, inside = torch.from_numpy(np.asarray(masks, dtype=np.float32))[(slice(None), *box)], organ[box].float()[None]
    return _patient(f"phantom {number}", PHANTOM_GRID.spacing_mm[0], (own, healed), inside, truth * inside, torch.zeros_like(inside))


def _varied(contrast: Mapping[str, float], rng: np.random.Generator) -> dict[str, float]:
    return {tissue: value * float(np.exp(rng.normal(0, 0.1))) for tissue, value in contrast.items()}


def smoothed(image: torch.Tensor) -> torch.Tensor:
    """(channels, k, r, c) at 1 mm averaged along each axis as the network's grid of 2 mm averages it."""
    kernel = torch.tensor([0.25, 0.5, 0.25])
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = 3
        padding = tuple(int(axis == other) for other in range(3))
        image = functional.conv3d(image[:, None], kernel.view(shape), padding=padding)[:, 0]
    return image


def _box_around(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    edges = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    k, r, c = (slice(max(0, int(e[0]) - MARGIN), min(n, int(e[-1]) + 1 + MARGIN)) for e, n in zip(edges, mask.shape, strict=True))
    return k, r, c


def _healed(image: torch.Tensor, tumour: NDArray[np.bool_], brain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The image with the other side's tissue in place of the tumour, and where that is tumour too."""
    columns = brain[0].sum(dim=(0, 1))
    middle = float((columns * torch.arange(len(columns))).sum() / columns.sum())
    shift = round(2 * middle) - (len(columns) - 1)
    other = torch.roll(image.flip(-1), shift, dims=-1)
    other_tumour = np.roll(tumour[:, :, ::-1], shift, axis=-1)
    near = ndimage.distance_transform_edt(~tumour) <= HEALED_MM
    share = torch.from_numpy(ndimage.gaussian_filter(near.astype(np.float32), 2.0))[None]
    left = ndimage.gaussian_filter((other_tumour & near).astype(np.float32), 1.0)
    return torch.lerp(image, other, share) * (brain > 0), torch.from_numpy(left)[None]


def rendered(hosts: Sequence[Patient], donors: Sequence[Patient], data: Gliomas, rng: np.random.Generator) -> Patch:
    """One training volume: the brain of one of the hosts, with its own tumour or healed and with those of donors."""
    host = hosts[int(rng.integers(len(hosts)))]
    places = _places(host, data, rng)
    if rng.random() < data.own:
        drawn = _sampled(host.own, places)
        image, outline, truth = drawn[:2], drawn[2:3], drawn[3:]
        known = torch.ones_like(outline)
    else:
        drawn = _sampled(host.healed, places)
        image, outline, left = drawn[:2], drawn[2:3], drawn[3:]
        truth, known = torch.zeros_like(image), (left < 0.2).float()
        for _ in range(int(rng.choice((0, 1, 2), p=data.transplants))):
            _transplant(image, truth, outline > 0.5, donors[int(rng.integers(len(donors)))], data, rng)
    truth = (truth > 0.5).float() * (outline > 0.5)
    _contrast(image, truth, rng)
    image = _acquired(image, outline, data, rng)
    region = known.repeat(2, 1, 1, 1)
    if rng.random() < data.without_t1c:
        image[1], region[1] = 0.0, 0.0
    return image, truth, region


def _places(host: Patient, data: Gliomas, rng: np.random.Generator) -> torch.Tensor:
    """Where in the host's voxels the patch's voxels come from, (k, r, c, 3)."""
    size = np.array(host.own.shape[1:], dtype=np.float64)
    reach = np.maximum(0, size - np.array(data.patch) * data.spacing_mm / host.step_mm) / 2
    middle = (size - 1) / 2 + rng.uniform(-1, 1, 3) * reach + rng.normal(0, 4, 3) / host.step_mm
    flip = -1.0 if rng.random() < 0.5 else 1.0
    matrix = _turn(rng, 0.17) @ np.diag(np.exp(rng.normal(0, 0.09, 3)) * (1, 1, flip)) * (np.array(data.spacing_mm) / host.step_mm)
    return _grid(data.patch, matrix, middle, rng, bend=float(rng.uniform(0, 4.0)) / host.step_mm)


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
    matrix = _turn(rng, 0.5) @ np.diag(np.exp(rng.normal(0, 0.15, 3)) * flips) * scale * (np.array(data.spacing_mm) / donor.step_mm)
    reach = np.ceil(1.2 * donor.reach_mm / scale / np.array(data.spacing_mm)).astype(int)
    low, high = np.maximum(target - reach, 0), np.minimum(target + reach + 1, data.patch)
    box = tuple(slice(int(first), int(last)) for first, last in zip(low, high, strict=True))
    middle = (np.array(donor.tumour.shape[1:]) - 1) / 2 + matrix @ ((low + high - 1) / 2 - target)
    shape = (int(high[0] - low[0]), int(high[1] - low[1]), int(high[2] - low[2]))
    drawn = _sampled(donor.tumour, _grid(shape, matrix, middle, rng, bend=float(rng.uniform(0, 3.0)) / donor.step_mm))
    theirs, masks = drawn[:2], drawn[2:]
    share = functional.avg_pool3d(masks[:1], 3, stride=1, padding=1).mul_(1.4).clamp_(0, 1) * brain[(slice(None), *box)]
    here = (slice(None), *box)
    image[here] = torch.lerp(image[here], theirs, share)
    truth[here] = torch.maximum(truth[here] * (1 - share), masks)


def _contrast(image: torch.Tensor, truth: torch.Tensor, rng: np.random.Generator) -> None:
    """Give the image's tumours another brightness: the whole on FLAIR, the enhancing core on T1c."""
    for channel, (low, high) in enumerate(((1.3, 5.0), (1.2, 5.0))):
        found = torch.nonzero(truth[channel] > 0.5)
        if rng.random() < 0.5 or len(found) < 20:
            continue
        box = tuple(slice(max(0, int(first) - 1), int(last) + 2) for first, last in zip(found.amin(0), found.amax(0), strict=True))
        part, mask = image[channel][box], truth[channel][box]
        factor = float(np.clip(rng.uniform(low, high) / max(float(part[mask > 0.5].median()), 0.5), 0.3, 2.0))
        part *= 1 + (factor - 1) * functional.avg_pool3d(mask[None, None], 3, stride=1, padding=1)[0, 0]


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
        value *= _waves(data.patch, (3, 3, 3), float(rng.uniform(0, 0.06)), rng).exp_()
        if rng.random() < 0.45:
            value = _thick(value, data, rng)
        noise = float(rng.uniform(0, 0.04))
        if rng.random() < 0.5:
            value += torch.from_numpy(rng.standard_normal(data.patch, dtype=np.float32)) * noise
        else:
            value += _waves(data.patch, (data.patch[0] // 2, data.patch[1] // 2, data.patch[2] // 2), noise * 1.5, rng)
        channels.append(normalised(value, _INTENSITIES, brain))
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
