"""Patients with gliomas, read from a data set for training: their brains as they are, the same healed, and their tumours alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

from dicomnode.analysis.grid import grid_over, resample_to
from dicomnode.analysis.head import brain_in_head
from dicomnode.analysis.manifest import PreprocessingSection
from dicomnode.analysis.preparation import normalised, resample
from dicomnode.errors import UsageError
from dicomnode.training.dataset import LabelledCase, load_dataset, read_case

CHANNELS = ("flair", "t1c")
LABELS = ("Glioma", "Enhancing core")
STEP_MM = 1.0  # patients are kept on this grid, smoothed to what the network's grid averages
MARGIN = 6  # voxels around the brain that are kept
HEALED_MM = 5.0  # around a tumour are replaced with it
OUTLINE_MM = 2.0  # how softly the share of the brain falls off at its border
INTENSITIES = PreprocessingSection(spacing_mm=(STEP_MM,) * 3, intensity="organ-z-score")


@dataclass(frozen=True, kw_only=True)
class Brain:
    """A brain on a grid of its own, cut to it; float32."""

    step_mm: float  # of the grid
    image: torch.Tensor  # (2, k, r, c) FLAIR and T1c, about z-scores of the brain
    outline: torch.Tensor  # (1, k, r, c) share of the brain, falling off softly
    truth: torch.Tensor  # (2, k, r, c) shares of whole tumour and enhancing core
    unknown: torch.Tensor  # (1, k, r, c) tumour that is shown and not in `truth`
    skull: bool  # around it; where it was taken away the image is 0 there


@dataclass(frozen=True, kw_only=True)
class Patient:
    """A brain with its tumour, the same without it, and the tumour alone."""

    name: str
    own: Brain
    healed: Brain  # the other side's tissue in the place of the tumour
    tumour: torch.Tensor  # (2 + 2, k, r, c) the part of FLAIR, T1c and both shares that holds the tumour
    reach_mm: float  # from the middle of that part to its corners


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
    box = box_around(brain)
    images = [flair, *(resample(resample_to(case.volumes[name], volume).voxels, grid, host) for name in CHANNELS[1:])]
    image = smoothed(torch.stack([normalised(each, INTENSITIES, organ)[box] for each in images]))
    masks = [case.truth[labels.index(label)].astype(np.float32) for label in LABELS]
    truth = smoothed(torch.stack([resample(mask, grid, host)[box] for mask in masks]))
    inside = organ[box].float()[None]
    tumour = truth[0].numpy() > 0.5
    if not tumour.any():
        raise UsageError(f"case {case.case}: no voxel of {LABELS[0]} is labelled")
    healed, left_over = _healed(image, tumour, inside)
    outline = torch.from_numpy(ndimage.gaussian_filter(inside.numpy(), (0, *(OUTLINE_MM / STEP_MM,) * 3)))
    part = torch.cat([image, truth])[(slice(None), *box_around(tumour))].contiguous()
    nothing = torch.zeros_like(left_over)
    return Patient(
        name=case.case, own=Brain(step_mm=STEP_MM, image=image, outline=outline, truth=truth, unknown=nothing, skull=False),
        healed=Brain(step_mm=STEP_MM, image=healed, outline=outline, truth=torch.zeros_like(truth), unknown=left_over, skull=False),
        tumour=part, reach_mm=STEP_MM * float(np.linalg.norm(part.shape[1:])) / 2,
    )  # fmt: skip


def smoothed(image: torch.Tensor) -> torch.Tensor:
    """(channels, k, r, c) at 1 mm averaged along each axis as the network's grid of 2 mm averages it."""
    for axis in range(1, 4):
        padding = [0, 0] * (3 - axis) + [1, 1] + [0, 0] * axis
        wide = functional.pad(image, padding)
        both = wide.narrow(axis, 0, image.shape[axis]) + wide.narrow(axis, 2, image.shape[axis])
        image = both.mul_(0.25).add_(image, alpha=0.5)
    return image


def box_around(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The box around a mask, wider by `MARGIN`."""
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
