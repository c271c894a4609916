"""A package's network on a volume: resample, slide, and hand the probabilities to `components`.

Must never load what differs from the digest it was given, or reach for the network.
"""

from __future__ import annotations

import importlib
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray

from dicomnode.analysis.components import ProbabilityMap, find
from dicomnode.analysis.grid import Grid, Triple, grid_over
from dicomnode.analysis.manifest import Manifest, parse_manifest
from dicomnode.analysis.networks import Between, build_network, first_line, go_on, load_weights
from dicomnode.analysis.package import NETWORK_CONFIG, digest_of, digest_of_contents, package_files
from dicomnode.errors import AnalysisFailed, PackageError
from dicomnode.findings import Findings, Volume, Voxels

REGIONS = {"lung": ("dicomnode.analysis.lung", "lung_region")}  # what `input.region` of a manifest names
CONTEXT_MM = 24.0  # the network sees this much around the region: what decides at its border lies outside it
SLAB = 8  # slices resampled at a time: a slab of 512 x 512 stays in the cache and out of the memory's peak


@dataclass(frozen=True, kw_only=True)
class Model:
    """A warm network with the manifest that says how to use it. Deterministic on one device and thread count."""

    manifest: Manifest
    digest: str
    network: torch.nn.Module
    device: torch.device

    def __call__(self, volumes: Mapping[str, Volume], between: Between = go_on) -> Findings:
        """Return what the network finds in the volumes, one for each input of the manifest by its name.

        `between` is called between windows.

        Raises:
            NotEligible: the manifest's region isn't in the volume.
            AnalysisFailed: the network fails on it or gives no usable numbers.
        """
        started = time.perf_counter()
        manifest = self.manifest
        accepts, settings = manifest.inputs[0], manifest.preprocessing
        volume = volumes[accepts.name]
        if settings is None or settings.spacing_mm is None or settings.window is None:
            raise PackageError(f"the package {manifest.name} is of a kind that isn't run yet")
        grid = grid_over(_shape(volume.voxels), volume.affine, settings.spacing_mm)
        image = _resample(volume.voxels, grid, self.device)
        region = side = None
        if accepts.region:
            region, side = _region(accepts.region)(image.cpu().numpy(), grid.spacing_mm)
        box = _box_around(region, grid)
        low, high = settings.window
        image = ((image[box] - low) / (high - low)).clamp_(0, 1)
        region = None if region is None else region[box]
        located = time.perf_counter()

        probabilities = self._probabilities(image, region, between)
        inferred = time.perf_counter()

        found = []
        omitted = 0
        for channel, output in enumerate(manifest.outputs):
            values = probabilities[channel].cpu().numpy()
            origin = (box[0].start, box[1].start, box[2].start)
            area = ProbabilityMap(grid=grid, origin=origin, values=values, region=region, side=None if side is None else side[box])
            kept, left_out = find(output, area, volume)
            found += kept
            omitted += left_out
        found.sort(key=lambda f: (-f.probability, -f.volume_ml, f.centre_lps_mm or ()))
        return Findings(
            package=manifest.name,
            version=manifest.version,
            digest=self.digest,
            algorithm_name=manifest.algorithm_name,
            manufacturer=manifest.manufacturer,
            series_instance_uid=volume.series_instance_uid,
            findings=tuple(replace(finding, number=number) for number, finding in enumerate(found, start=1)),
            device=f"{self.device.type} {_precision_name(self.device)} torch",
            omitted=omitted,
            seconds={
                "region": located - started,
                "inference": inferred - located,
                "findings": time.perf_counter() - inferred,
            },
        )

    def _probabilities(self, image: torch.Tensor, region: NDArray[np.bool_] | None, between: Between) -> torch.Tensor:
        """Return (outputs, k, r, c) float32 probabilities; zero in windows that hold no region, where no finding may lie."""
        outputs = self.manifest.outputs
        settings = self.manifest.inference
        if settings is None:
            raise PackageError(f"the package {self.manifest.name} is of a kind that isn't run yet")
        where = torch.ones_like(image) if region is None else torch.from_numpy(region).to(image)

        def predict(windows: torch.Tensor) -> torch.Tensor:
            result = windows.new_zeros((windows.shape[0], len(outputs), *windows.shape[2:]))
            between(0.0)
            wanted = windows[:, 1].flatten(1).any(dim=1)
            if wanted.any():
                logits = self._logits(windows[wanted, :1])
                soft = logits.softmax(dim=1) if any(o.activation == "softmax" for o in outputs) else logits
                chosen = [(soft if o.activation == "softmax" else logits.sigmoid())[:, o.channel] for o in outputs]
                result[wanted] = torch.stack(chosen, dim=1)
            return result

        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast(self.device.type, dtype=_precision(self.device), enabled=self.device.type == "cuda"),
        ):
            probabilities: torch.Tensor = sliding_window_inference(
                torch.stack([image, where])[None],
                roi_size=settings.window,
                sw_batch_size=settings.batch,
                predictor=predict,
                overlap=settings.overlap,
                mode="gaussian",
            )[0]
        if not bool(torch.isfinite(probabilities).all()):
            raise AnalysisFailed(f"The network of the package {self.manifest.name} gave numbers that are not finite.")
        return probabilities

    def _logits(self, windows: torch.Tensor) -> torch.Tensor:
        name = self.manifest.name
        try:
            logits = self.network(windows.contiguous(memory_format=torch.channels_last_3d))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:  # what layers raise on shapes and memory
            raise AnalysisFailed(f"The network of the package {name} failed: {first_line(error)}.") from error
        channels = 1 + max(output.channel for output in self.manifest.outputs)
        if not isinstance(logits, torch.Tensor) or logits.shape[2:] != windows.shape[2:] or logits.shape[1] < channels:
            raise AnalysisFailed(f"The network of the package {name} doesn't give {channels} channel(s) of the window's size.")
        return logits.float()


def load_model(folder: Path, *, digest: str, device: str = "auto", threads: int = 0) -> Model:
    """Load the network of a package whose content has `digest`; `threads` above 0 limits torch's CPU threads in this process.

    Each file is read once: what was digested is what is loaded.

    Raises:
        PackageError: the digest differs, or the network or its weights are not acceptable.
        AnalysisFailed: `device` is cuda and there is no GPU.
    """
    contents = {name: path.read_bytes() for name, path in package_files(folder).items()}
    actual = digest_of_contents(contents.items())
    if actual != digest:
        raise PackageError(f"The package {folder.name} has the digest {actual}, not {digest} as it was consented to: it is not loaded.")
    manifest = parse_manifest(contents["manifest.toml"], folder)
    if threads > 0:
        torch.set_num_threads(threads)
    place = _device(device)
    network = build_network(contents[NETWORK_CONFIG], manifest.name)
    load_weights(network, contents, manifest.name)
    network.eval().requires_grad_(requires_grad=False)
    network.to(place)
    for parameter in network.parameters():
        if parameter.dim() == 5:  # weights of 3D convolutions: a fifth faster so on the CPU too, measured with a U-Net of 8 to 96 channels
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return Model(manifest=manifest, digest=digest, network=network, device=place)


def check_package(folder: Path, volumes: Mapping[str, Volume], *, digest: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Run the package once on `volumes` in this process and report digest, device, findings, seconds and peak memory.

    For people and for the registry; `check.check_in_child` wraps it in a process without network, under limits.

    Raises:
        PackageError, AnalysisFailed, NotEligible: as `load_model` and `Model` do.
    """
    started = time.perf_counter()
    model = load_model(folder, digest=digest or digest_of(folder), device=device)
    loaded = time.perf_counter()
    result = model(volumes)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    return {
        "package": result.package,
        "version": result.version,
        "digest": result.digest,
        "device": result.device,
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
        "findings": [
            {"label": f.label, "probability": f.probability, "volume_ml": f.volume_ml, "centre_lps_mm": f.centre_lps_mm}
            for f in result.findings
        ],
        "omitted": result.omitted,
        "seconds": {"load": loaded - started, **result.seconds},
        "peak_memory_bytes": memory,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else 0,
        "torch": torch.__version__,
    }


def _resample(voxels: Voxels, grid: Grid, device: torch.device) -> torch.Tensor:
    """Return the volume on the grid, float32 on `device`, a slab of slices at a time."""
    slices, rows, columns = (torch.from_numpy(grid.from_volume(axis)).to(device) for axis in range(3))
    turned = torch.from_numpy(np.require(voxels, requirements=["C", "W"])).permute(grid.source_axis)  # as torch wants it; seldom a copy
    planes = [
        rows @ (turned[k : k + SLAB].to(device).float() @ columns.T)  # the slab is copied, never the volume
        for k in range(0, turned.shape[0], SLAB)
    ]
    stacked = torch.cat(planes)
    return (slices @ stacked.flatten(1)).reshape(grid.shape)


def _region(name: str) -> Any:  # (hu, spacing_mm) -> (mask, side)
    module, function = REGIONS[name]
    return getattr(importlib.import_module(module), function)


def _box_around(region: NDArray[np.bool_] | None, grid: Grid) -> tuple[slice, slice, slice]:
    if region is None:
        return slice(0, grid.shape[0]), slice(0, grid.shape[1]), slice(0, grid.shape[2])
    boxes = []
    for axis in range(3):
        filled = np.flatnonzero(region.any(axis=tuple({0, 1, 2} - {axis})))
        margin = round(CONTEXT_MM / grid.spacing_mm[axis])
        boxes.append(slice(max(0, int(filled[0]) - margin), min(grid.shape[axis], int(filled[-1]) + 1 + margin)))
    return boxes[0], boxes[1], boxes[2]


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise AnalysisFailed("The device is set to cuda, but torch finds no GPU.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def _precision(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.bfloat16  # what torch wants named; autocast is off on the CPU
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _precision_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "fp32"
    return "bf16" if _precision(device) == torch.bfloat16 else "fp16"


def _shape(voxels: Voxels) -> Triple:
    slices, rows, columns = voxels.shape
    return slices, rows, columns
