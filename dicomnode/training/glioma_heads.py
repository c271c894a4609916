"""Synthetic heads among the patients with gliomas: with their skull on, and most of what is bright on FLAIR or T1c without a tumour.

A head is rendered once as shares of tissues; each time it is drawn it gets another contrast. Must never look at real images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.analysis.head import brain_in_head
from dicomnode.analysis.preparation import DEVIATIONS, FURTHEST
from dicomnode.phantoms.head import CONTRASTS, GLIOMA, head_scene, receive, render_head, signal
from dicomnode.phantoms.shapes import Floats, Grid
from dicomnode.training.glioma_patients import CHANNELS, OUTLINE_MM, Brain, box_around

GRID = Grid(origin_lps_mm=(-100.0, -126.0, -100.0), spacing_mm=(2.0, 2.0, 2.0), shape=(92, 124, 101))
GATE_SEES = 0.03  # noise of the image in which the brain is outlined

_Bytes = NDArray[np.uint8]  # shares of a voxel, 0 to 255


@dataclass(frozen=True, kw_only=True)
class SyntheticHead:
    """A head, cut to its brain; all (k, r, c) on a grid of 2 mm."""

    name: str
    tissues: Mapping[str, _Bytes]  # of the head without its glioma
    glioma: Mapping[str, _Bytes]
    texture: Floats  # deviation 1
    brain: NDArray[np.bool_]  # as the node outlines it
    outline: torch.Tensor  # (1, k, r, c) the same, falling off softly

    def imaged(self, rng: np.random.Generator, *, with_glioma: bool) -> Brain:
        """The head on FLAIR and T1c, each time in another contrast."""
        share = {name: np.float32(1 / 255) * part for name, part in self.tissues.items()}
        glioma = {name: np.float32(1 / 255) * part for name, part in self.glioma.items()}
        whole = sum(glioma.values(), np.zeros_like(self.texture))
        if with_glioma:
            share = {name: part * (1 - whole) for name, part in share.items()} | glioma
        else:
            whole = np.zeros_like(whole)
        images = []
        for channel in CHANNELS:
            image = signal(share, varied(channel, rng)) * np.exp(np.float32(rng.uniform(0, 0.12)) * self.texture)
            image = receive(image, rng, noise=0.0, bias=float(rng.uniform(0, 0.3)))
            images.append(_scores(image, self.brain))
        core = glioma["rim"] if with_glioma else whole
        truth = np.stack([whole, core]) * self.brain
        return Brain(
            step_mm=GRID.spacing_mm[0], image=torch.from_numpy(np.stack(images)), outline=self.outline,
            truth=torch.from_numpy(truth.astype(np.float32)), unknown=torch.zeros_like(self.outline), skull=True,
        )  # fmt: skip


class SyntheticHeads:
    """So many heads by number, each rendered when it is first needed; head i of a seed is always the same."""

    def __init__(self, *, seed: int, count: int) -> None:
        self._seed, self._count = seed, count
        self._heads: dict[int, SyntheticHead] = {}

    def __getitem__(self, number: int) -> SyntheticHead:
        if number not in self._heads:
            self._heads[number] = synthetic_head(self._seed, number)
        return self._heads[number]

    def any(self, rng: np.random.Generator) -> SyntheticHead:
        """One of them."""
        return self[int(rng.integers(self._count))]


def synthetic_head(seed: int, number: int) -> SyntheticHead:
    """Render a head with a glioma that can be left out."""
    rng = np.random.default_rng([seed, 92, number])
    scene = head_scene(int(rng.integers(2**31)), glioma_mm=float(rng.uniform(20, 80)), lookalikes=True)
    shares, _ = render_head(scene, GRID)
    flair = receive(signal(shares, CONTRASTS[CHANNELS[0]]), rng, noise=GATE_SEES, bias=0.1)
    _, _, brain = brain_in_head(flair, GRID.spacing_mm)
    box = box_around(brain)
    sound, _ = render_head(replace(scene, glioma=None), GRID)
    outline = ndimage.gaussian_filter(brain[box].astype(np.float32), OUTLINE_MM / GRID.spacing_mm[0])
    return SyntheticHead(
        name=f"head {number}", tissues={name: _bytes(part[box]) for name, part in sound.items()},
        glioma={name: _bytes(shares[name][box]) for name in GLIOMA}, texture=scene.texture(GRID.axes)[box], brain=brain[box],
        outline=torch.from_numpy(outline)[None],
    )  # fmt: skip


def varied(channel: str, rng: np.random.Generator) -> dict[str, float]:
    """The signal of each tissue in one series, about as usual; those of the glioma vary more, each by itself."""
    usual = CONTRASTS[channel]
    signals = {tissue: value * float(np.exp(rng.normal(0, 0.12))) for tissue, value in usual.items()}
    if channel == "flair":  # bright at the border, and within it anything
        signals["oedema"] = float(rng.uniform(0.75, 1.25))
        signals["rim"] = float(rng.uniform(0.4, 1.2))
        signals["necrosis"] = float(rng.uniform(0.1, 1.1))
        signals["hyperintensity"] = float(rng.uniform(0.6, 1.1))
        signals["fluid"] = float(rng.uniform(0.03, 0.3))
    else:
        signals["rim"] = float(rng.uniform(0.9, 1.8))
        signals["necrosis"] = float(rng.uniform(0.2, 0.5))
        signals["vessel"] = float(rng.uniform(0.6, 1.5))
        signals["plexus"] = float(rng.uniform(0.7, 1.4))
        signals["dura"] = float(rng.uniform(0.4, 1.1))
    return signals


def _scores(image: Floats, brain: NDArray[np.bool_]) -> Floats:
    """About z-scores of the brain, and what is around it in the same units; the network's own are made of the whole patch later."""
    first, median, third = np.percentile(image[brain], (25, 50, 75))
    return np.asarray(np.clip((image - median) * DEVIATIONS / max(float(third - first), 1e-6), -FURTHEST, FURTHEST), dtype=np.float32)


def _bytes(share: Floats) -> _Bytes:
    return np.asarray(np.round(255 * np.clip(share, 0, 1)), dtype=np.uint8)
