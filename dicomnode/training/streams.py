"""What each kind of training data is: its numbered stream of patches, and what an exported package says of it.

A new kind is a section in recipe.py and a row in KINDS here; the trainer and the export know no kind by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch.utils.data import Dataset

from dicomnode.errors import UsageError
from dicomnode.training.core_cut import with_fitted_cut
from dicomnode.training.dataset_patches import LabelledPatches
from dicomnode.training.films import PhantomFilms
from dicomnode.training.gliomas import GliomaPatches
from dicomnode.training.heads import PhantomHeads
from dicomnode.training.nodules import PhantomPatches
from dicomnode.training.opacities import OpacityFilms
from dicomnode.training.recipe import DataSection, Recipe

Patch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Split = Literal["train", "validation"]


class OpenStream(Protocol):
    """Opens the stream of one split."""

    def __call__(self, data: Any, *, seed: int, count: int, split: Split, dataset: Path | None) -> Dataset[Patch]:
        """`count` patches, the same for the same seed; `dataset` is a data set's folder, for kinds that read one."""


@dataclass(frozen=True, kw_only=True)
class DataKind:
    """A kind of training data."""

    open: OpenStream
    change: str  # the changelog line of an exported bundle
    image_format: str  # `format` of the image in a MONAI Bundle's metadata
    scaling: Callable[[Any], str]  # of a recipe's section: what became 0..1
    reads_dataset: bool = False  # `dicomnode train --data`
    fitted: Callable[[Recipe, Path | None], Recipe] = lambda recipe, _dataset: recipe  # what of the package follows from the data set


def stream_of(data: DataSection, *, seed: int, count: int, split: Split = "train", dataset: Path | None = None) -> Dataset[Patch]:
    """The numbered stream that a recipe's data are: image (channels, …), truth (outputs, …) 0/1 and region (1 or outputs, …) 0/1, float32.

    Patch i of a seed is always the same. The caller gives each split another seed; phantoms need no more, a data set keeps its
    patients apart by `split` too.
    """
    return KINDS[data.kind].open(data, seed=seed, count=count, split=split, dataset=dataset)


def _phantoms(stream: Callable[..., Dataset[Patch]]) -> OpenStream:
    """Opens phantoms, which are new for every seed and read nothing from disk."""

    def open_stream(data: Any, *, seed: int, count: int, split: Split, dataset: Path | None) -> Dataset[Patch]:  # noqa: ARG001  # see above
        return stream(data, seed=seed, count=count)

    return open_stream


def _labelled(data: Any, *, seed: int, count: int, split: Split, dataset: Path | None) -> Dataset[Patch]:
    """Opens patches of a data set, which the trainer has checked."""
    if dataset is None:
        raise UsageError("data of kind dataset need a data set: --data")
    return LabelledPatches(data, seed=seed, count=count, split=split, folder=dataset)


def _preprocessed(data: Any) -> str:
    if data.preprocessing.window is not None:
        return f"values {data.preprocessing.window[0]:g} to {data.preprocessing.window[1]:g}"
    names = {"percentiles": "percentiles of each image", "local-contrast": "local contrast"}
    return names.get(data.preprocessing.intensity, "z-score of each image")


def _gliomas(data: Any, *, seed: int, count: int, split: Split, dataset: Path | None) -> Dataset[Patch]:  # noqa: ARG001  # few patients: no split
    return GliomaPatches(data, seed=seed, count=count, dataset=dataset)


def _percentiles(_data: Any) -> str:
    return "1st to 99th percentile"


KINDS: Mapping[str, DataKind] = {
    "chest-ct-nodules": DataKind(
        open=_phantoms(PhantomPatches), change="trained on synthetic chests", image_format="hounsfield",
        scaling=lambda data: f"HU {data.window_hu[0]:g} to {data.window_hu[1]:g}",
    ),
    "chest-radiographs": DataKind(
        open=_phantoms(PhantomFilms), change="trained on projected synthetic chests", image_format="magnitude", scaling=_percentiles
    ),
    "chest-opacities": DataKind(
        open=_phantoms(OpacityFilms), change="trained on projected synthetic chests with opacities", image_format="magnitude",
        scaling=lambda _data: "local contrast",
    ),
    "dataset": DataKind(
        open=_labelled, change="trained on labelled images", image_format="magnitude", scaling=_preprocessed, reads_dataset=True
    ),
    "mr-heads": DataKind(open=_phantoms(PhantomHeads), change="trained on synthetic heads", image_format="magnitude", scaling=_percentiles),
    "mr-gliomas": DataKind(
        open=_gliomas, change="trained on three patients of BraTS 2013 and synthetic heads", image_format="magnitude",
        scaling=lambda _data: "quartiles of the brain", reads_dataset=True, fitted=with_fitted_cut,
    ),
}  # fmt: skip
