"""What training minimises: Dice, cross entropy, its worst voxels and the focal loss, over outputs that overlap or exclude one another.

Where outputs overlap (sigmoid), each has its own binary cross entropy; where they exclude one another (softmax), they share one, and
what belongs to none is background. A classification has the same terms, but Dice, on whole images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from monai.losses import DiceLoss, FocalLoss
from torch.nn import functional

from dicomnode.errors import ConfigError
from dicomnode.training.recipe import Recipe, TrainingSection


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """How a network's channels stand for the outputs of a package."""

    channels: tuple[int, ...] | None = None  # of the outputs, in the order of the truth's; None: the truth's own order
    exclusive: bool = False  # a softmax over the channels; those of no output are background
    whole: bool = False  # a classification: one number an image


def meaning_of(recipe: Recipe) -> Meaning:
    """What the manifest in a recipe says of its network's channels."""
    outputs = recipe.package.outputs
    return Meaning(
        channels=tuple(output.channel for output in outputs),
        exclusive=outputs[0].activation == "softmax",
        whole=recipe.package.kind == "classification",
    )


def probabilities(logits: torch.Tensor, meaning: Meaning) -> torch.Tensor:
    """Probabilities of every channel."""
    return logits.softmax(dim=1) if meaning.exclusive else logits.sigmoid()


def in_channels(
    logits: torch.Tensor, truth: torch.Tensor, region: torch.Tensor, meaning: Meaning
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Truth (n, outputs, …) and region (n, 1 or outputs, …) in the shape of the logits (n, channels, …), and the outputs' channels.

    Of a classification they may be masks: an image shows what any voxel shows. Where exclusive outputs overlap, the last one holds.

    Raises:
        ConfigError: the network's answer doesn't have the truth's shape, or lacks a channel.
    """
    if meaning.whole:
        truth, region = (part.flatten(2).amax(2) if part.ndim > 2 else part for part in (truth, region))
    channels = list(meaning.channels if meaning.channels is not None else range(truth.shape[1]))
    if len(channels) != truth.shape[1]:
        raise ConfigError(f"the package has {len(channels)} output(s) and the training data {truth.shape[1]}")
    if logits.shape[0] != truth.shape[0] or logits.shape[2:] != truth.shape[2:] or logits.shape[1] <= max(channels):
        raise ConfigError(
            f"the network answers {tuple(logits.shape)} where the truth is {tuple(truth.shape)} in channels up to {max(channels)}"
        )
    if not meaning.exclusive and channels == list(range(logits.shape[1])):
        return truth, region.expand_as(logits), channels
    placed = torch.zeros_like(logits, dtype=truth.dtype)
    if not meaning.exclusive:
        counted = torch.zeros_like(placed)
        placed[:, channels], counted[:, channels] = truth, region.expand_as(truth)
        return placed, counted, channels
    index = torch.zeros_like(truth[:, :1], dtype=torch.int64) + next((c for c in range(logits.shape[1]) if c not in channels), 0)
    for output, channel in enumerate(channels):
        index = torch.where(truth[:, output : output + 1] > 0.5, channel, index)
    return placed.scatter_(1, index, 1.0), region.amax(1, keepdim=True), channels


def loss_parts(
    logits: torch.Tensor, truth: torch.Tensor, region: torch.Tensor, section: TrainingSection, meaning: Meaning | None = None
) -> dict[str, torch.Tensor]:
    """The weighted terms of a batch: scalars by name, for what is counted in the region alone; those without weight are left out."""
    meaning = meaning or Meaning()
    truth, region, channels = in_channels(logits, truth, region, meaning)
    count = region.sum().clamp(min=1)
    parts: dict[str, torch.Tensor] = {}
    if section.bce_weight or section.worst_weight:
        if meaning.exclusive:
            entropy = functional.cross_entropy(logits, truth, reduction="none")[:, None] * region
        else:
            weights = 1 + (section.positive_weight - 1) * truth
            entropy = functional.binary_cross_entropy_with_logits(logits, truth, weights, reduction="none") * region
        if section.bce_weight:
            parts["cross_entropy"] = section.bce_weight * entropy.sum() / count
        if section.worst_weight:
            # as many as could be in the region at most, of which as many as are: without waiting for the device to count them
            worst = entropy.flatten().topk(max(1, int(entropy.numel() * section.worst_share))).values
            share = (count * section.worst_share).floor().clamp(min=1)
            counted = torch.arange(len(worst), device=worst.device) < share
            parts["worst"] = section.worst_weight * (worst * counted).sum() / share
    if section.focal_weight:
        focal = FocalLoss(gamma=section.focal_gamma, use_softmax=meaning.exclusive, reduction="none")(logits, truth) * region
        parts["focal"] = section.focal_weight * focal.sum() / count
    if section.dice_weight and not meaning.whole:
        chance, counted_truth = probabilities(logits, meaning) * region, truth * region
        # a mean over outputs, and over patches where each has its own
        dice = DiceLoss(batch=section.dice_of == "batch", smooth_nr=section.dice_smooth, smooth_dr=section.dice_smooth)
        parts["dice"] = section.dice_weight * dice(chance[:, channels], counted_truth[:, channels])
    return parts


def segmentation_loss(
    logits: torch.Tensor, truth: torch.Tensor, region: torch.Tensor, section: TrainingSection, meaning: Meaning | None = None
) -> torch.Tensor:
    """The sum of the terms. A scalar."""
    return torch.stack(list(loss_parts(logits, truth, region, section, meaning).values())).sum()
