"""What a segmentation bundle's network says, through the bundle's postprocessing, onto the volume's grid.

The postprocessing is the bundle's own, step by step, with three exceptions that its results don't show or that only lose by it:
labels are never interpolated linearly (between 0 and 2 lies no 1), channels that are inverted only to take the largest are inverted one
after another, so that a hundred of them never stand on the full grid, and a step that merges overlapping channels into one is left out,
because the manifest's outputs number the channels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Activations, AsDiscrete, AsDiscreted, Invertd
from numpy.typing import NDArray

from dicomnode.analysis.bundle_config import Step
from dicomnode.analysis.bundle_space import onto_volume, sampled
from dicomnode.analysis.heatmap import Activation, probabilities_of
from dicomnode.analysis.labels import Answer
from dicomnode.analysis.manifest import Manifest, OutputSection
from dicomnode.errors import AnalysisFailed
from dicomnode.findings import Volume

_SLAB = 8  # rows of the network's grid whose probabilities are worked out at a time: of 105 channels no second copy is made


@dataclass(frozen=True, kw_only=True)
class _Meaning:
    """How the raw numbers of a network become probabilities."""

    activation: str | None  # softmax, sigmoid, "none": they are probabilities already; None: they are labels without any
    largest: bool  # the largest channel is the answer: labels exclude each other


def answer_of(
    raw: torch.Tensor, data: Mapping[str, Any], steps: Sequence[Step], manifest: Manifest, volume: Volume
) -> tuple[Answer, tuple[str, ...]]:
    """Return the answer on the volume's grid and what the reader must be told.

    `raw` is (channels, x, y[, z]) on the grid of the preprocessed image in `data`.

    Raises:
        AnalysisFailed: the answer is of no shape that has a meaning.
    """
    section = manifest.bundle
    if section is None:
        raise AnalysisFailed(f"The manifest of the package {manifest.name} has no bundle.")
    image = data[section.image_key]
    if raw.shape[1:] != image.shape[1:]:
        raise AnalysisFailed(f"The network of the package {manifest.name} gives {tuple(raw.shape)} for an image of {tuple(image.shape)}.")
    meaning = _meaning(raw, steps, manifest)
    probabilities = _probabilities(raw, meaning)
    if probabilities is None:
        notes: tuple[str, ...] = ("The model gives labels without probabilities: a finding's probability is its threshold.",)
    else:
        notes = ()
    prediction = MetaTensor(raw, meta=copy.deepcopy(image.meta), applied_operations=copy.deepcopy(image.applied_operations))
    said, affine = _postprocessed({**data, section.prediction_key: prediction}, steps, section.prediction_key, meaning)
    labels = _labels(said, raw.shape[0], meaning, manifest)
    if labels.ndim == len(raw.shape):  # channels
        placed = np.stack([onto_volume(channel, affine, volume) for channel in labels])
    else:
        placed = onto_volume(labels, affine, volume)

    def scores(output: OutputSection, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        if probabilities is None:
            return np.full(len(indices), output.threshold, dtype=np.float32)
        channel = output.channel if len(probabilities) > 1 else 0
        return sampled(probabilities[channel], image.affine, volume, indices)

    return Answer(labels=placed, scores=scores), notes


def classes_of(raw: torch.Tensor, steps: Sequence[Step], manifest: Manifest) -> tuple[NDArray[np.float32], Activation]:
    """Return the probability of each class of a classification, from its raw numbers (classes, ...), and how they come from them.

    Raises:
        AnalysisFailed: the network gives fewer classes than the manifest names.
    """
    if raw.numel() <= max(output.channel for output in manifest.outputs):
        raise AnalysisFailed(f"The network of the package {manifest.name} gives {raw.numel()} classes, and its manifest names more.")
    found = [(step, getattr(step, "converter", step)) for step in steps]
    wanted: Activation = "softmax" if manifest.outputs[0].activation == "softmax" else "sigmoid"
    if any(isinstance(c, AsDiscrete) and _set(step, c, "argmax") for step, c in found):
        wanted = "softmax"
    for choice in ("softmax", "sigmoid"):
        if any(isinstance(c, Activations) and _set(step, c, choice) for step, c in found):
            return probabilities_of(raw[None], choice)[0].cpu().numpy(), choice
    within = bool(raw.min() >= 0) and bool(raw.max() <= 1)
    activation: Activation = "none" if within and (wanted == "sigmoid" or abs(float(raw.sum()) - 1) < 1e-2) else wanted
    return probabilities_of(raw[None], activation)[0].cpu().numpy(), activation


def detections_of(raw: Any, shape: tuple[int, ...], name: str) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Return (n, 2 x dimensions) boxes cut at the image's edges, (n,) classes and (n,) scores of what a detector says of one image.

    They are told apart by their shape and type: detectors name them as their configuration likes.

    Raises:
        AnalysisFailed: it says something else, or numbers that are not finite.
    """
    said = raw[0] if isinstance(raw, (list, tuple)) and raw else raw
    entries = said if isinstance(said, Mapping) else {}
    tensors = {key: value.detach().float().cpu().numpy() for key, value in entries.items() if isinstance(value, torch.Tensor)}
    boxes = next((v for v in tensors.values() if v.ndim == 2 and v.shape[1] == 2 * len(shape)), None)
    scores = next((v for key, v in tensors.items() if v.ndim == 1 and "score" in str(key)), None)
    labels = next((v for key, v in tensors.items() if v.ndim == 1 and "score" not in str(key)), None)
    if boxes is None or scores is None or labels is None or not len(boxes) == len(scores) == len(labels):
        raise AnalysisFailed(f"The detector of the package {name} gives no boxes with classes and scores.")
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise AnalysisFailed(f"The network of the package {name} gave numbers that are not finite.")
    edges = np.array(shape, dtype=np.float64)
    cut = np.clip(boxes.astype(np.float64), 0, np.concatenate([edges, edges]) - 1)
    return cut, labels.astype(np.int64), scores.astype(np.float64)


def _meaning(raw: torch.Tensor, steps: Sequence[Step], manifest: Manifest) -> _Meaning:
    converters = [getattr(step, "converter", step) for step in steps]
    activations = [(step, c) for step, c in zip(steps, converters, strict=True) if isinstance(c, Activations)]
    discrete = [(step, c) for step, c in zip(steps, converters, strict=True) if isinstance(c, AsDiscrete)]
    largest = any(_set(step, c, "argmax") for step, c in discrete)
    if any(_set(step, c, "softmax") for step, c in activations):
        return _Meaning(activation="softmax", largest=True)
    if any(_set(step, c, "sigmoid") for step, c in activations):
        return _Meaning(activation="sigmoid", largest=largest)
    corner = raw[(slice(None), *(slice(0, 32),) * (raw.ndim - 1))]
    within = bool(raw.min() >= 0) and bool(raw.max() <= 1)
    if raw.shape[0] == 1 and bool((corner == corner.round()).all()) and bool((raw == raw.round()).all()):
        return _Meaning(activation=None, largest=False)
    wanted = "softmax" if largest or all(output.activation == "softmax" for output in manifest.outputs) else "sigmoid"
    already = within and (wanted == "sigmoid" or torch.allclose(corner.sum(dim=0), torch.ones(()).to(corner), atol=1e-2))
    return _Meaning(activation="none" if already else wanted, largest=wanted == "softmax")


def _set(step: Any, converter: Any, what: str) -> bool:
    """Whether an activation or a discretisation is asked to do this, for any key."""
    of_step = getattr(step, what, None)  # a dictionary transform has one value a key
    of_converter = getattr(converter, what, None)
    return any(v is True for v in (of_step if isinstance(of_step, (list, tuple)) else (of_step, of_converter)))


def _probabilities(raw: torch.Tensor, meaning: _Meaning) -> NDArray[np.float32] | None:
    """Return (1, x, y[, z]): the probability of whatever is the largest; or all channels where they may overlap; on the network's grid."""
    if meaning.activation is None:
        return None
    if not meaning.largest:
        return (raw if meaning.activation == "none" else raw.sigmoid()).cpu().numpy().astype(np.float32, copy=False)
    result = np.empty((1, *raw.shape[1:]), dtype=np.float32)
    for start in range(0, raw.shape[1], _SLAB):
        part = raw[:, start : start + _SLAB].float()
        if meaning.activation == "softmax":
            best = (part.amax(dim=0) - part.logsumexp(dim=0)).exp()
        else:
            best = (part if meaning.activation == "none" else part.sigmoid()).amax(dim=0)
        result[0, start : start + _SLAB] = best.cpu().numpy()
    return result


def _postprocessed(data: dict[str, Any], steps: Sequence[Step], key: str, meaning: _Meaning) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """Run the steps and return the prediction with the affine of its grid."""
    affine = np.asarray(data[key].affine)
    waiting = list(steps)
    while waiting:
        step = waiting.pop(0)
        before = data[key]
        if isinstance(step, Invertd) and key in step.keys:
            if before.shape[0] > 2 and waiting and _takes_largest(waiting[0]):
                waiting.pop(0)
                data = {**data, key: _largest_inverted(data, step, key)}
            else:
                data = _nearest(step)(data) if _holds_labels(before) else step(data)
        else:
            data = step(data)
        after = data.get(key)
        if not isinstance(after, torch.Tensor):
            raise AnalysisFailed("The postprocessing gives no prediction.")
        merged = not meaning.largest and before.shape[0] > 1 and after.shape[0] == 1
        if merged:
            data = {**data, key: before}
        elif isinstance(after, MetaTensor):
            affine = np.asarray(after.affine)
    said = data[key]
    return (said.as_tensor() if isinstance(said, MetaTensor) else said), affine


def _takes_largest(step: Step) -> bool:
    return isinstance(step, AsDiscreted) and _set(step, step.converter, "argmax") and not any(step.to_onehot) and not any(step.threshold)


def _largest_inverted(data: dict[str, Any], step: Step, key: str) -> torch.Tensor:
    """Invert one channel after another and return the label of the largest, as inverting all and taking the largest would."""
    whole = data[key]
    best = label = None
    for channel in range(whole.shape[0]):
        inverted = step({**data, key: whole[channel : channel + 1]})[key]
        if best is None or label is None:
            best, label = inverted, torch.zeros_like(inverted)
        else:
            larger = inverted > best
            label = torch.where(larger, torch.full_like(label, channel), label)
            best = torch.where(larger, inverted, best)
    if label is None:
        raise AnalysisFailed("The network gives no channels.")
    return label


def _holds_labels(prediction: torch.Tensor) -> bool:
    return prediction.shape[0] == 1 and bool(prediction.max() > 1) and bool((prediction == prediction.round()).all())


def _nearest(step: Any) -> Step:
    changed = copy.copy(step)
    changed.nearest_interp = tuple(True for _ in step.nearest_interp)
    return changed  # type: ignore[no-any-return]  # monai ships partial types


def _labels(said: torch.Tensor, channels: int, meaning: _Meaning, manifest: Manifest) -> NDArray[Any]:
    """Return (x, y[, z]) of whole numbers, or (channels, x, y[, z]) of bool."""
    if said.shape[0] > 1:
        if meaning.largest:
            return _whole(said.argmax(dim=0))
        logits = bool(said.min() < 0) or bool(said.max() > 1)
        thresholds = {output.channel: output.threshold for output in manifest.outputs}
        values = said.sigmoid() if logits else said
        return np.stack([(values[c] > thresholds.get(c, 0.5)).cpu().numpy() for c in range(said.shape[0])])
    single = said[0]
    if channels == 1 and any(output.channel == 0 for output in manifest.outputs):
        values = single.sigmoid() if bool(single.min() < 0) else single
        return (values > manifest.outputs[0].threshold).cpu().numpy()[None]
    return _whole(single.round())


def _whole(values: torch.Tensor) -> NDArray[Any]:
    return values.cpu().numpy().astype(np.uint8 if int(values.max()) < 256 else np.int32)
