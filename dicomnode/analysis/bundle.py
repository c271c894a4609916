"""A MONAI Bundle as the Model Zoo ships it, run on our volumes with its own preprocessing, inferer and postprocessing.

The volume enters as a reader of NIfTI would give it, and the answer is brought back onto the volume's own grid. Must never load what
differs from the digest that was consented to: configuration and scripts run from a private copy of the very bytes that were digested.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray

from dicomnode.analysis.bundle_answers import answer_of, classes_of, detections_of
from dicomnode.analysis.bundle_config import BUNDLE_FAILS, Parts, checkpoint_of, missing_library, read_config, resolve
from dicomnode.analysis.bundle_modules import BundleModules
from dicomnode.analysis.bundle_space import affine_of_image, boxes_in_volume, image_of, onto_volume
from dicomnode.analysis.classes import Box, classified, detected
from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.grid import resample_to
from dicomnode.analysis.heatmap import heat_map
from dicomnode.analysis.labels import find_in
from dicomnode.analysis.manifest import BundleSection, Manifest
from dicomnode.analysis.networks import Between, at_rest, first_line, go_on, is_scripted, load_state, scripted_network
from dicomnode.analysis.package import BUNDLE
from dicomnode.errors import AnalysisFailed, NodeError, PackageError
from dicomnode.findings import Finding, Findings, Score, Volume

BESIDE_WEIGHTS_BYTES = 16 * 2**20  # other files of models/ that a bundle finds in its private copy

_NO_MEMORY = re.compile(r"(?:can't allocate memory|not enough memory|out of memory)(?:.*?allocate (\d+) bytes)?", re.DOTALL)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What one run says."""

    findings: tuple[Finding, ...]
    omitted: int
    scores: tuple[Score, ...] = ()
    notes: tuple[str, ...] = ()


def load_bundle(contents: Mapping[str, bytes], manifest: Manifest, digest: str, device: torch.device) -> BundleModel:
    """Load a MONAI Bundle from the files of its package (name -> bytes, as they were digested).

    Raises:
        PackageError: its configuration, its weights, or a library that it needs and that isn't installed.
    """
    section, name = manifest.bundle, manifest.name
    if section is None:
        raise PackageError(f"The manifest of the package {name} has no bundle.")
    root = Path(tempfile.mkdtemp(prefix="dicomnode-bundle-"))
    modules = BundleModules(root)  # the private copy goes when it does
    weakref.finalize(modules, shutil.rmtree, root, ignore_errors=True)
    for file, data in contents.items():
        inner = file.removeprefix(f"{BUNDLE}/")
        if inner != file and not inner.startswith(("models/", "docs/")):  # weights are loaded from the bytes at hand
            _put(root / inner, data)
    content = read_config(root, section, name)
    file, key = checkpoint_of(content)
    weights = _weights(contents, file, name)
    for file, data in contents.items():  # what lies beside the weights and is read by name: an architecture that was searched for
        if file.startswith(f"{BUNDLE}/models/") and file != weights and len(data) <= BESIDE_WEIGHTS_BYTES:
            _put(root / file.removeprefix(f"{BUNDLE}/"), data)
    with modules.present():
        scripted = scripted_network(contents[weights], name, device) if is_scripted(contents[weights]) else None
        parts = resolve(content, section, root, device, scripted, name)
        if scripted is None:
            load_state(parts.network, weights, contents[weights], name, key)
    at_rest(parts.network).to(device)
    if device.type == "cpu" and isinstance(getattr(parts.inferer, "sw_batch_size", None), int):
        parts.inferer.sw_batch_size = 1  # type: ignore[attr-defined]  # windows at a time gain nothing on a CPU and cost memory each
    return BundleModel(
        manifest=manifest, section=section, digest=digest, device=device, parts=parts, modules=modules,
        channels=_image_channels(root),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BundleModel:
    """A warm bundle with the manifest that says what its answers mean."""

    manifest: Manifest
    section: BundleSection
    digest: str
    device: torch.device
    parts: Parts
    modules: BundleModules
    channels: int  # of the images that its metadata names

    @property
    def network(self) -> torch.nn.Module:
        """The bundle's network."""
        return self.parts.network

    def __call__(self, volumes: Mapping[str, Volume], between: Between = go_on) -> Findings:
        """Return what the bundle finds in the volumes, one for each input of the manifest by its name.

        `between` is called each time the network is.

        Raises:
            AnalysisFailed: a part of the bundle fails on them, or gives no usable answer.
        """
        started = time.perf_counter()
        manifest = self.manifest
        volume = volumes[manifest.inputs[0].name]
        with self.modules.present(), torch.no_grad():
            data = self._part("preprocessing", lambda: self._prepared(volumes))
            image = data.get(self.section.image_key)
            if not isinstance(image, MetaTensor):
                raise AnalysisFailed(f"The preprocessing of the package {manifest.name} gives no {self.section.image_key} with a place.")
            prepared = time.perf_counter()
            with self._paced(between, image), self._precise():
                raw = self._part("inferer", lambda: self._inferred(image))
            inferred = time.perf_counter()
            said = self._part("postprocessing", lambda: self._said(raw, data, volume))
        return Findings(
            package=manifest.name,
            version=manifest.version,
            digest=self.digest,
            algorithm_name=manifest.algorithm_name,
            manufacturer=manifest.manufacturer,
            series_instance_uid=volume.series_instance_uid,
            findings=said.findings,
            device=f"{self.device.type} {_precision(self.device)} torch",
            scores=said.scores,
            omitted=said.omitted,
            other_series=tuple(v.series_instance_uid for n, v in volumes.items() if n != manifest.inputs[0].name),
            notes=(*self._absent(volumes), *said.notes),
            seconds={
                "preprocessing": prepared - started,
                "inference": inferred - prepared,
                "findings": time.perf_counter() - inferred,
            },
        )

    def _prepared(self, volumes: Mapping[str, Volume]) -> dict[str, Any]:
        """Return the volumes as the bundle's preprocessing leaves them."""
        first = volumes[self.manifest.inputs[0].name]
        names = [accepts.name for accepts in self.manifest.inputs]
        images = [image_of(resample_to(volumes[n], first)) if n in volumes else np.zeros_like(image_of(first)) for n in names]
        keys = self.parts.image_keys
        if len(keys) == len(names) > 1:
            data = {key: self._entered([image], first) for key, image in zip(keys, images, strict=True)}
        else:
            data = {self.section.image_key: self._entered(images, first)}
        for step in self.parts.preprocessing:
            data = step(data)
        return data

    def _entered(self, images: list[NDArray[np.float32]], volume: Volume) -> MetaTensor:
        """Return channels as a reader of NIfTI gives one image, or several that are stacked."""
        if len(images) == 1 and self.channels == 3 and volume.is_projection:
            images = images * 3  # a network of colour images: grey is three equal channels; in a volume a bundle adds what it wants
        dimension: float | str
        if len(images) == 1 and not self.parts.channel_first:
            array, dimension = images[0], "no_channel"
        elif self.parts.channel_first:
            array, dimension = np.stack(images), 0
        else:
            array, dimension = np.stack(images, axis=-1), -1
        affine = affine_of_image(volume)
        meta = {
            "original_channel_dim": float("nan") if dimension == "no_channel" else dimension,
            "original_affine": affine.copy(),
            "spatial_shape": np.array(images[0].shape),
            "space": "RAS",
            "filename_or_obj": "image",
        }
        return MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine), meta=meta)

    def _inferred(self, image: MetaTensor) -> Any:
        plain = image.as_tensor().to(self.device, torch.float32)
        if self.manifest.kind == "detection":
            return self.parts.inferer([plain], self.network)
        raw = self.parts.inferer(plain[None], self.network)
        if isinstance(raw, (list, tuple)) and raw:
            raw = raw[0]  # of deep supervision the first is the answer
        if not isinstance(raw, torch.Tensor) or raw.ndim < 2 or raw.shape[0] != 1:
            raise AnalysisFailed(f"The network of the package {self.manifest.name} gives no tensor for one image.")
        if not bool(torch.isfinite(raw).all()):
            raise AnalysisFailed(f"The network of the package {self.manifest.name} gave numbers that are not finite.")
        return raw[0].float()

    def _said(self, raw: Any, data: dict[str, Any], volume: Volume) -> _Said:
        if self.manifest.kind == "detection":
            return self._boxes(raw, data[self.section.image_key], volume)
        if self.manifest.kind == "classification":
            return self._classes(raw, data[self.section.image_key], volume)
        answer, notes = answer_of(raw, data, self.parts.postprocessing, self.manifest, volume)
        found, omitted = find_in(answer, self.manifest, volume)
        return _Said(findings=found, omitted=omitted, notes=notes)

    def _boxes(self, raw: Any, image: MetaTensor, volume: Volume) -> _Said:
        """Take the detector's boxes as it gives them, on the network's grid: the bundle's postprocessing only writes them otherwise."""
        boxes, labels, scores = detections_of(raw, tuple(image.shape[1:]), self.manifest.name)
        low, high = boxes_in_volume(boxes, image.affine, volume)
        found, omitted = detected(
            self.manifest,
            [
                Box(label=int(label), score=float(score), low=(a[0], a[1], a[2]), high=(b[0], b[1], b[2]))
                for label, score, a, b in zip(labels, scores, low.tolist(), high.tolist(), strict=True)
            ],
            volume,
        )
        return _Said(findings=found, omitted=omitted)

    def _classes(self, raw: torch.Tensor, image: MetaTensor, volume: Volume) -> _Said:
        probabilities, activation = classes_of(raw, self.parts.postprocessing, self.manifest)

        def map_of(channel: int) -> NDArray[np.float32]:
            heat = heat_map(self.network, image.as_tensor().to(self.device, torch.float32)[None], channel, activation)
            return onto_volume(heat, image.affine, volume, order=1)

        scores, found, omitted = classified(self.manifest, probabilities, map_of, volume)
        return _Said(findings=found, omitted=omitted, scores=scores)

    def _absent(self, volumes: Mapping[str, Volume]) -> tuple[str, ...]:
        absent = [accepts.name for accepts in self.manifest.inputs if accepts.name not in volumes]
        return tuple(f"The input {name} is absent: the model was given zeros in its place." for name in absent)

    @contextlib.contextmanager
    def _paced(self, between: Between, image: torch.Tensor) -> Iterator[None]:
        """Call `between` before each run of the network, with the share that is done where the windows can be counted."""
        total, runs = _runs(self.parts.inferer, tuple(image.shape[1:])), 0

        def before(*_: Any) -> None:
            nonlocal runs
            between(min(1.0, runs / total) if total else 0.0)
            runs += 1

        handle = self.network.register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _precise(self) -> Iterator[None]:
        on_gpu = self.device.type == "cuda"
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast(self.device.type, dtype=_autocast(self.device), enabled=on_gpu),
        ):
            yield

    def _part(self, what: str, run: Callable[[], _T]) -> _T:
        """Run a part of the bundle; whatever its code raises is a failure of the package, said in one sentence."""
        try:
            return run()
        except (NodeError, NotEligible):
            raise
        except BUNDLE_FAILS as error:
            library = missing_library(error, {})
            if library:
                raise PackageError(f"The package {self.manifest.name} needs {library}, which isn't installed.") from error
            wanted = _NO_MEMORY.search(str(error))
            if wanted or isinstance(error, MemoryError):
                more = f" when it asked for {int(wanted[1]) // 2**20} MiB more" if wanted and wanted[1] else ""
                raise AnalysisFailed(f"The {what} of the package {self.manifest.name} ran out of memory{more}.") from error
            raise AnalysisFailed(f"The {what} of the package {self.manifest.name} failed: {first_line(error)}.") from error


def _put(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def _weights(contents: Mapping[str, bytes], file: str, name: str) -> str:
    """Return the name of the file of weights: as the configuration says, else the usual ones, else the only one."""
    models = sorted(n for n in contents if n.startswith(f"{BUNDLE}/models/") and n.endswith((".pt", ".pth", ".ts", ".safetensors")))
    wanted = [f"{BUNDLE}/models/{file}"] if file else []
    wanted += [f"{BUNDLE}/models/model.{ending}" for ending in ("safetensors", "pt", "ts")]
    found = next((n for n in wanted if n in models), models[0] if len(models) == 1 else None)
    if found is None:
        raise PackageError(f"The package {name} has no weights in models/ that its configuration names.")
    return found


def _image_channels(root: Path) -> int:
    """How many channels the images have that the metadata names; 1 where it doesn't say."""
    try:
        metadata = json.loads((root / "configs/metadata.json").read_bytes())
        return int(metadata["network_data_format"]["inputs"]["image"]["num_channels"])
    except (OSError, ValueError, LookupError, TypeError):
        return 1


def _runs(inferer: Any, shape: tuple[int, ...]) -> int:
    """How often a sliding window will run the network on an image of this shape; 0 where that can't be told."""
    size, batch, overlap = (getattr(inferer, key, None) for key in ("roi_size", "sw_batch_size", "overlap"))
    if size is None or not isinstance(batch, int) or not isinstance(overlap, float):
        return 0
    window = [int(edge) for edge in np.ravel(size)]
    if len(window) == len(shape) - 1:  # an inferer that takes a network of slices through a volume
        window.insert(int(getattr(inferer, "spatial_dim", len(window))), 1)
    if len(window) not in (1, len(shape)):
        return 0
    edges = [min(e, n) if e > 0 else n for e, n in zip(np.broadcast_to(window, (len(shape),)).tolist(), shape, strict=True)]
    steps = [max(1, int(e * (1 - overlap))) for e in edges]
    windows = math.prod(math.ceil(max(0, n - e) / s) + 1 for n, e, s in zip(shape, edges, steps, strict=True))
    return math.ceil(windows / batch)


def _autocast(device: torch.device) -> torch.dtype:
    if device.type == "cpu" or torch.cuda.is_bf16_supported():
        return torch.bfloat16  # on the CPU only what torch wants named: autocast is off there
    return torch.float16


def _precision(device: torch.device) -> str:
    return {"cpu": "fp32"}.get(device.type) or ("bf16" if _autocast(device) == torch.bfloat16 else "fp16")
