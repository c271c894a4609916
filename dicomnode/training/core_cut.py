"""How bright an enhancing core is, fitted on the patients that a network is trained on: the share in a manifest's `bright`.

Within the true outlines, of the patients' own images and of nobody else's: leaving one out leaves him out here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.analysis.bright import cut_of
from dicomnode.analysis.manifest import BrightSection
from dicomnode.analysis.preparation import FURTHEST, prepare, resample
from dicomnode.training.dataset import load_dataset, read_case
from dicomnode.training.recipe import Gliomas, Recipe

SHARES = tuple(step / 100 for step in range(20, 55, 5))

Seen = tuple[torch.Tensor, NDArray[np.bool_]]  # intensities and core (n,) of a patient within the true outline


def with_fitted_cut(recipe: Recipe, folder: Path | None) -> Recipe:
    """The recipe with the share that fits its patients best, in each output of its package that names one.

    The best has the largest mean Dice of what is above the cut with the labelled core.
    """
    if folder is None:
        return recipe
    outputs = tuple(
        output if output.bright is None or output.bright.share is None
        else output.model_copy(update={"bright": _fitted(output.bright, _patients(recipe, folder, output.bright, output.label))})
        for output in recipe.package.outputs
    )  # fmt: skip
    return recipe.model_copy(update={"package": recipe.package.model_copy(update={"outputs": outputs})})


def _fitted(bright: BrightSection, patients: Sequence[Seen]) -> BrightSection:
    # `above` is for tumours that take nothing up, of which there may be none here, so it isn't in the way of what is fitted
    share = max(SHARES, key=lambda share: _mean_dice(bright.model_copy(update={"share": share, "above": -FURTHEST}), patients))
    return bright.model_copy(update={"share": share})


def _patients(recipe: Recipe, folder: Path, bright: BrightSection, label: str) -> list[Seen]:
    """What is seen of each patient, on the network's grid."""
    dataset, manifest = load_dataset(folder), recipe.package
    left_out = recipe.data.leave_out if isinstance(recipe.data, Gliomas) else ()
    number = [accepts.name for accepts in manifest.inputs].index(bright.input)
    patients = []
    for row in dataset.of_split("train"):
        case = read_case(dataset, row)
        if row.case in left_out or bright.input not in case.volumes:
            continue
        prepared = prepare(manifest, case.volumes, torch.device("cpu"))
        box = tuple(slice(first, first + n) for first, n in zip(prepared.origin, prepared.image.shape[1:], strict=True))
        masks = (case.truth[dataset.labels.index(name)].astype(np.float32) for name in (bright.within, label))
        whole, core = (resample(mask, prepared.grid, torch.device("cpu"))[box] > 0.5 for mask in masks)
        patients.append((prepared.image[number][whole], core[whole].numpy()))
    return patients


def _mean_dice(bright: BrightSection, patients: Sequence[Seen]) -> float:
    found = [(values.numpy() > cut_of(bright, values), core) for values, core in patients]
    return float(np.mean([2 * (mask & core).sum() / max(1, mask.sum() + core.sum()) for mask, core in found]))
