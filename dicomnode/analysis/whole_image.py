"""A classification that runs by its manifest's own preprocessing: the whole image in one window, a score a class, and heat maps.

An image larger than the window is made coarser until it fits, its proportions kept; a smaller one lies in the middle, with zeros
around. Computed by torch: a heat map needs gradients. Must never load anything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.analysis.backends import TorchBackend, is_out_of_memory
from dicomnode.analysis.classes import classified
from dicomnode.analysis.grid import Grid
from dicomnode.analysis.heatmap import heat_map, probabilities_of
from dicomnode.analysis.manifest import InferenceSection, Manifest
from dicomnode.analysis.networks import Between, first_line, go_on
from dicomnode.analysis.preparation import Prepared, others, prepare
from dicomnode.errors import AnalysisFailed, PackageError
from dicomnode.findings import Findings, Volume


@dataclass(frozen=True, kw_only=True)
class WholeImageModel:
    """A network that says what an image shows."""

    manifest: Manifest
    digest: str
    network: torch.nn.Module
    backend: TorchBackend

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.backend.device

    @property
    def memory_bytes(self) -> int:
        """What it holds while it waits."""
        return self.backend.memory_bytes

    def __call__(self, volumes: Mapping[str, Volume], between: Between = go_on) -> Findings:
        """Return the score of every class, and the positive ones as findings where the network looked.

        Raises:
            NotEligible: the manifest's region isn't in the volume.
            AnalysisFailed: the network fails on it or gives no usable numbers.
        """
        started = time.perf_counter()
        manifest = self.manifest
        settings = _inference(manifest)
        prepared = self._fitted(volumes, settings.window)
        image, box = _centred(prepared.image, settings.window)
        flat = manifest.inputs[0].dimensions == 2
        batch = image[None, :, 0] if flat else image[None]
        activation = manifest.outputs[0].activation
        ready = time.perf_counter()
        between(0.0)
        probabilities = self._probabilities(batch)
        inferred = time.perf_counter()
        volume = volumes[manifest.inputs[0].name]

        def map_of(index: int) -> NDArray[np.float32]:
            between(0.5)
            heat = heat_map(self.network, batch, index, activation)
            return on_the_volume((heat[None] if flat else heat)[box], prepared.grid)

        scores, found, omitted = classified(manifest, probabilities, map_of, volume)
        return Findings(
            package=manifest.name,
            version=manifest.version,
            digest=self.digest,
            algorithm_name=manifest.algorithm_name,
            manufacturer=manifest.manufacturer,
            series_instance_uid=volume.series_instance_uid,
            findings=found,
            device=self.backend.name,
            scores=scores,
            omitted=omitted,
            other_series=others(manifest, volumes),
            notes=prepared.notes,
            seconds={"region": ready - started, "inference": inferred - ready, "findings": time.perf_counter() - inferred},
        )

    def _fitted(self, volumes: Mapping[str, Volume], window: Sequence[int]) -> Prepared:
        coarser = 1.0
        while True:
            prepared = prepare(self.manifest, volumes, self.device, coarser=coarser, whole=True)
            too_large = max(n / w for n, w in zip(prepared.grid.shape, window, strict=True))
            if too_large <= 1:
                return prepared
            coarser *= too_large * 1.001  # sizes are rounded

    def _probabilities(self, batch: torch.Tensor) -> NDArray[np.float32]:
        name = self.manifest.name
        try:
            answer = self.backend(batch)
        except (MemoryError, RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:  # what layers raise
            if is_out_of_memory(error):
                raise AnalysisFailed(f"The package {name} needs more memory than there is.") from error
            raise AnalysisFailed(f"The network of the package {name} failed: {first_line(error)}.") from error
        classes = 1 + max(output.channel for output in self.manifest.outputs)
        if not isinstance(answer, torch.Tensor) or answer.ndim < 2 or answer.shape[0] != 1 or answer[0].numel() != answer.shape[1]:
            raise AnalysisFailed(f"The network of the package {name} gives no number for each class.")
        if answer.shape[1] < classes or not bool(torch.isfinite(answer).all()):
            raise AnalysisFailed(f"The network of the package {name} doesn't give {classes} finite number(s).")
        return np.asarray(probabilities_of(answer, self.manifest.outputs[0].activation)[0].cpu().numpy(), dtype=np.float32)


def on_the_volume(values: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """Return values on a whole grid, interpolated onto the volume that the grid lies over, in the volume's own order of axes."""
    result = values
    for axis in range(3):  # each moves the axis it has done to the end: after three the order is back
        matrix = grid.to_volume(axis, grid=slice(0, grid.shape[axis]), turned=slice(0, grid.source_shape[axis]))
        result = np.tensordot(result, matrix, axes=(0, 1))
    flips = tuple(slice(None, None, -1) if flipped else slice(None) for flipped in grid.reversed_)
    return np.ascontiguousarray(result[flips].transpose(np.argsort(grid.source_axis)), dtype=np.float32)


def _centred(image: torch.Tensor, window: Sequence[int]) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """Return an image (channels, k, r, c) in the middle of the window, and where in it it lies."""
    before = [(w - n) // 2 for w, n in zip(window, image.shape[1:], strict=True)]
    box = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    result = image.new_zeros((image.shape[0], *window))
    result[(slice(None), *box)] = image
    return result, box


def _inference(manifest: Manifest) -> InferenceSection:
    if manifest.inference is None:
        raise PackageError(f"the package {manifest.name} has no window of its own")
    return manifest.inference
