"""What is measured while training goes on: averaged weights on patches that training never sees, and when to stop.

The metric is larger when better: Dice over all patches together, a mean over outputs, or the area under the ROC curve of a classification.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_roc_auc

from dicomnode.training.losses import Meaning, in_channels, probabilities
from dicomnode.training.streams import Patch as Batch
from dicomnode.training.trainer import Computing, History

THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one validation gave."""

    metric: float
    name: str  # dice, auc, average_precision
    of_outputs: tuple[float, ...]  # not a number where the patches don't show an output
    picture: torch.Tensor | None  # (3, rows, columns) 0..1: a patch, the truth in green, the prediction in red


@torch.no_grad()
def validate(network: torch.nn.Module, batches: Iterable[Batch], meaning: Meaning, computing: Computing) -> Measured:
    """Measure a network in evaluation mode. The same patches always give the same result.

    Raises:
        ConfigError: the network's answer doesn't fit the data.
    """
    chances, truths, sums, picture, most = [], [], [], None, -1.0
    for batch in batches:
        image, truth, region = map(computing.moved, batch)
        with computing.autocast():
            logits = network(image).float()
        placed, counted, channels = in_channels(logits, truth, region, meaning)
        chance, placed, counted = probabilities(logits, meaning)[:, channels], placed[:, channels], counted.expand_as(logits)[:, channels]
        if meaning.whole:
            chances.append(torch.where(counted > 0, chance, torch.nan).cpu())
            truths.append(placed.cpu())
            continue
        said = chance > THRESHOLD if not meaning.exclusive else _largest(logits)[:, channels]
        said = said * (counted > 0)
        placed = placed * counted
        around = [0, *range(2, placed.ndim)]
        sums.append(torch.stack([(said * placed).sum(around), said.sum(around), placed.sum(around)]).double().cpu())
        shown = float(placed.flatten(1).sum(1).max())
        if shown > most:
            most, best = shown, int(placed.flatten(1).sum(1).argmax())
            picture = _picture(image[best], placed[best], said[best].float())
    if meaning.whole:
        return _areas(torch.cat(chances), torch.cat(truths))
    overlap, found, known = torch.stack(sums).sum(0)
    dice = torch.where(known > 0, 2 * overlap / (found + known), torch.nan)
    return Measured(metric=_mean(dice.tolist()), name="dice", of_outputs=tuple(dice.tolist()), picture=picture)


def best_of(history: History) -> tuple[int, float] | None:
    """Step and metric of the best validation, the first of equals."""
    return max(history, key=lambda entry: (entry[1], -entry[0]), default=None)


def is_exhausted(history: History, patience: int) -> bool:
    """Whether the last `patience` validations were no better than one before."""
    steps = [step for step, _ in history]
    best = best_of(history)
    return best is not None and patience > 0 and len(steps) - 1 - steps.index(best[0]) >= patience


def _areas(chances: torch.Tensor, truths: torch.Tensor) -> Measured:
    areas = []
    for chance, truth in zip(chances.unbind(1), truths.unbind(1), strict=True):
        known = ~chance.isnan()
        both = 0 < float(truth[known].sum()) < int(known.sum())
        areas.append(float(compute_roc_auc(chance[known, None], truth[known, None])) if both else float("nan"))
    return of_classes(areas, "auc")


def of_classes(values: Sequence[float], name: str) -> Measured:
    """A metric of each class; the whole is the mean of those that the patches show."""
    return Measured(metric=_mean(values), name=name, of_outputs=tuple(values), picture=None)


def _mean(values: Sequence[float]) -> float:
    """The mean of what is a number; 0 if nothing is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else 0.0


def _largest(logits: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.argmax(1, keepdim=True), value=True)


def _picture(image: torch.Tensor, truth: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """The slice (of a projection the whole) with the most truth; what both mark is yellow."""
    truth, said = truth.amax(0), said.amax(0)
    grey = image[0]
    if grey.ndim == 3:
        number = int(truth.sum((1, 2)).argmax())
        grey, truth, said = grey[number], truth[number], said[number]
    grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp(min=1e-6)
    return torch.stack([torch.maximum(grey, said), torch.maximum(grey, truth), grey]).cpu()
