"""Training patches from a data set: an endless, numbered stream. Patch i of a seed is always the same patch.

Images are prepared by the very code that prepares a study for the trained package, so the network learns on what it will be given.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    Rand2DElasticd,
    Rand3DElasticd,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandShiftIntensityd,
)
from monai.utils import convert_to_tensor
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.data import Dataset

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.manifest import Manifest
from dicomnode.analysis.preparation import FROM_0_TO_1, prepare, resample
from dicomnode.errors import UsageError
from dicomnode.training.dataset import CaseRow, Split, load_dataset, read_case
from dicomnode.training.recipe import DatasetPatches

CASES_AT_A_TIME = 4  # a batch of four shows four cases, and batches in a row share them
PATCHES_PER_CASE = 8
HELD_BYTES = 2**30  # of prepared cases, in each process
MARGIN = 0.2  # of a patch, on each side
ELASTIC_VOXELS = 8  # between the points that are moved at random
CPU = torch.device("cpu")

Patch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PreparedCase:
    """A case on the network's grid: image float32 (channels, k, r, c), truth and region uint8 (outputs, k, r, c)."""

    image: torch.Tensor
    truth: torch.Tensor
    region: torch.Tensor  # where the loss counts
    places: tuple[NDArray[np.int64], ...]  # for each output that is there, the flat indices of its voxels
    inside: NDArray[np.int64]  # flat indices of the region

    @property
    def held_bytes(self) -> int:
        """What it holds."""
        tensors, arrays = (self.image, self.truth, self.region), (self.inside, *self.places)
        return sum(part.nbytes for part in tensors) + sum(part.nbytes for part in arrays)


class LabelledPatches(Dataset[Patch]):
    """Number -> (image (channels, k, r, c), truth (outputs, k, r, c) 0/1, region (outputs, k, r, c) 0/1), float32; projections lack k.

    The region is 0 outside of the image, outside of the package's region, and throughout for an output that isn't labelled in the case.
    Patches of the split validation are not augmented.
    """

    def __init__(self, data: DatasetPatches, *, seed: int, count: int, split: Split, folder: Path) -> None:
        """Open the data set; no case is read yet.

        Raises:
            UsageError: it lacks a channel, a label or a case of this split.
        """
        self._data, self._seed, self._count, self._dataset = data, seed, count, load_dataset(folder)
        for what, wanted, there in (("channel", data.channels, self._dataset.channels), ("label", data.labels, self._dataset.labels)):
            if absent := [name for name in wanted if name not in there]:
                raise UsageError(f"the data set {folder} has no {what} {absent[0]}; it has {', '.join(there)}")
        self._rows = [row for row in self._dataset.of_split(split) if any(row.labels[label] != "unlabelled" for label in data.labels)]
        if not self._rows:
            raise UsageError(f"the data set {folder} has no case for {split}")
        self._flat = data.inputs[0].dimensions == 2
        self._augments = split == "train"
        self._change = changes_of(data)
        self._cases: OrderedDict[str, PreparedCase] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Patch:
        rng = np.random.default_rng([self._seed, 101, index])
        block, place = divmod(index, CASES_AT_A_TIME * PATCHES_PER_CASE)
        case = self._case(block * CASES_AT_A_TIME + place % CASES_AT_A_TIME)
        margin = margin_of(self._data) if self._augments else (0, 0, 0)
        parts = dict(zip(("image", "truth", "region"), cut(case, self._centre(case, rng), self._data.patch, margin), strict=True))
        if self._flat:
            parts = {name: part.squeeze(1) for name, part in parts.items()}
        if self._augments:
            self._change.set_random_state(seed=int(rng.integers(2**31)))
            parts = {name: convert_to_tensor(part, track_meta=False) for name, part in self._change(parts).items()}
            self._drop(parts["image"], rng)
        image = parts["image"].float()
        if self._data.preprocessing.intensity in FROM_0_TO_1:
            image = image.clamp(0, 1)  # as the package's own images are
        return image, (parts["truth"] > 0.5).float(), (parts["region"] > 0.5).float()

    def _case(self, slot: int) -> PreparedCase:
        """The case of a slot: all cases once in an order of their own, then all in another one."""
        epoch, place = divmod(slot, len(self._rows))
        row = self._rows[int(np.random.default_rng([self._seed, 102, epoch]).permutation(len(self._rows))[place])]
        if row.case in self._cases:
            self._cases.move_to_end(row.case)
        else:
            self._cases[row.case] = self._prepared(row)
            while len(self._cases) > 1 and sum(case.held_bytes for case in self._cases.values()) > HELD_BYTES:
                self._cases.popitem(last=False)
        return self._cases[row.case]

    def _prepared(self, row: CaseRow) -> PreparedCase:
        data = self._data
        read = read_case(self._dataset, row)
        names = {accepts.name: channel for accepts, channel in zip(data.inputs, data.channels, strict=True) if channel in read.volumes}
        known_of_it: dict[str, Any] = {
            "name": self._dataset.name,
            "inputs": data.inputs,
            "preprocessing": data.preprocessing,
            "outputs": (),
        }
        package = Manifest.model_construct(**known_of_it)  # as far as preparing goes: what the recipe's section holds of it
        try:
            prepared = prepare(package, {name: read.volumes[channel] for name, channel in names.items()}, CPU)
        except NotEligible as refusal:
            raise UsageError(f"{self._dataset.folder / row.file}: no model would be given this case: {refusal}") from refusal
        box = tuple(slice(o, o + n) for o, n in zip(prepared.origin, prepared.image.shape[1:], strict=True))
        numbers = [self._dataset.labels.index(label) for label in data.labels]
        truth = torch.stack([resample(read.truth[number].astype(np.int16), prepared.grid, CPU)[box] > 0.5 for number in numbers])
        known = torch.tensor([read.labels[label] != "unlabelled" for label in data.labels])
        anywhere = torch.ones(truth.shape[1:], dtype=torch.bool) if prepared.region is None else torch.from_numpy(prepared.region)
        region = (anywhere | truth.any(0))[None] & known[:, None, None, None]
        return PreparedCase(
            image=prepared.image, truth=truth.to(torch.uint8), region=region.to(torch.uint8),
            places=tuple(np.flatnonzero(mask) for mask in truth.numpy() if mask.any()), inside=np.flatnonzero(region.any(0).numpy()),
        )  # fmt: skip

    def _centre(self, case: PreparedCase, rng: np.random.Generator) -> NDArray[np.int64]:
        """A voxel of a label, each label as often, somewhere in the patch and not always in its middle; or any voxel of the region."""
        shape = case.truth.shape[1:]
        if case.places and rng.random() < self._data.foreground:
            centre = np.array(np.unravel_index(rng.choice(case.places[int(rng.integers(len(case.places)))]), shape))
            return np.asarray(centre + np.round(rng.uniform(-0.3, 0.3, 3) * self._data.patch), dtype=np.int64)
        return np.array(np.unravel_index(rng.choice(case.inside), shape), dtype=np.int64)

    def _drop(self, image: torch.Tensor, rng: np.random.Generator) -> None:
        for channel, accepts in enumerate(self._data.inputs):
            if accepts.optional and rng.random() < self._data.drop_optional:
                image[channel] = 0


def cut(
    case: PreparedCase, centre: NDArray[np.int64], shape: tuple[int, int, int], margin: tuple[int, int, int] = (0, 0, 0)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut (…, *shape) around a voxel, as far inside of the image as it goes, with a margin around; outside of the image all is 0."""
    inner: list[slice] = []
    pads: list[int] = []
    for c, n, more, size in zip(centre.tolist(), shape, margin, case.truth.shape[1:], strict=True):
        start = (min(max(c - n // 2, 0), size - n) if size > n else (size - n) // 2) - more
        end = start + n + 2 * more
        inner.append(slice(max(start, 0), end))
        pads = [max(-start, 0), max(end - size, 0), *pads]  # torch wants the last axis first
    image, truth, region = (functional.pad(part[(slice(None), *inner)].float(), pads) for part in (case.image, case.truth, case.region))
    return image, truth, region


def margin_of(data: DatasetPatches) -> tuple[int, int, int]:
    """How much wider on each side a patch is cut, so that where it is turned or bent it finds image; one slice stays one."""
    first, second, third = (
        0 if n == 1 or not (data.augmentation.affine or data.augmentation.elastic) else round(n * MARGIN) for n in data.patch
    )
    return first, second, third


def changes_of(data: DatasetPatches) -> Compose:
    """The random changes of a recipe, which also cut a patch with a margin to its size. Flips come last: they cost no image."""
    wanted, flat = data.augmentation, data.inputs[0].dimensions == 2
    keys, modes = ("image", "truth", "region"), ("bilinear", "nearest", "nearest")
    shape = data.patch[1:] if flat else data.patch
    spacing = data.preprocessing.spacing_mm
    cubes = spacing is not None and max(spacing) < 1.1 * min(spacing)
    angle = np.deg2rad(wanted.rotate_degrees)
    changes: list[Any] = []
    if wanted.elastic and flat:
        bend = {"spacing": (ELASTIC_VOXELS,) * 2, "magnitude_range": (0.5, 1.5)}
        changes.append(Rand2DElasticd(keys, **bend, prob=wanted.elastic, mode=modes, padding_mode="zeros"))
    elif wanted.elastic:
        bend = {"sigma_range": (3.0, 5.0), "magnitude_range": (20.0, 60.0)}
        changes.append(Rand3DElasticd(keys, **bend, prob=wanted.elastic, mode=modes, padding_mode="zeros"))
    if wanted.affine:
        turns = angle if flat else (angle, angle if cubes else 0.0, angle if cubes else 0.0)
        changes.append(
            RandAffined(
                keys, prob=wanted.affine, rotate_range=turns, scale_range=(wanted.scale,) * len(shape), mode=modes, padding_mode="zeros",
                spatial_size=shape,
            )
        )  # fmt: skip
    elif wanted.elastic:
        changes.append(CenterSpatialCropd(keys, shape))
    changes += [
        RandAdjustContrastd("image", prob=wanted.gamma, gamma=(0.7, 1.5)),
        RandGaussianNoised("image", prob=wanted.noise, std=wanted.noise_deviation),
        RandShiftIntensityd("image", prob=wanted.shift, offsets=wanted.shift_by),
    ]
    axes = [("slice", "row", "column").index(axis) for axis in wanted.flip_axes]
    changes += [RandFlipd(keys, prob=0.5, spatial_axis=axis - flat) for axis in axes if axis >= flat]
    return Compose(changes)
