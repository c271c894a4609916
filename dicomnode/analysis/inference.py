"""A package's network on the volumes of a study: prepare, slide, and hand the probabilities to those who make findings of them.

Must never load what differs from the digest it was given, or reach for the network.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from dicomnode.analysis.backends import TORCH, Backend, Choice, TorchBackend, available, backend_for, choose, device_named, is_out_of_memory
from dicomnode.analysis.bright import brighten, without_orphans
from dicomnode.analysis.bundle import load_bundle
from dicomnode.analysis.components import ProbabilityMap, find
from dicomnode.analysis.image_score import image_score, marked_share
from dicomnode.analysis.manifest import InferenceSection, Manifest, OutputSection, parse_manifest
from dicomnode.analysis.networks import Between, first_line, go_on, load_network
from dicomnode.analysis.package import digest_of, digest_of_contents, package_files
from dicomnode.analysis.preparation import Prepared, others, prepare
from dicomnode.analysis.sliding import Predict, Sliding, slide
from dicomnode.analysis.whole_image import WholeImageModel
from dicomnode.errors import AnalysisFailed, PackageError
from dicomnode.findings import Finding, Findings, Score, Volume
from dicomnode.logs import get_logger

AGREEMENT = 0.002  # a backend's Dice with torch in fp32 may be this much below 1, finding by finding

_ANY = {"minimum_score": 0.0, "minimum_mm2": 0.0, "maximum_findings": 1}  # the best place there is

log = get_logger(__name__)


class Model(Protocol):
    """A warm network with what says how to use it. Deterministic on one device, backend and thread count."""

    @property
    def manifest(self) -> Manifest:
        """The manifest it was loaded with."""

    @property
    def network(self) -> torch.nn.Module:
        """The network."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def __call__(self, volumes: Mapping[str, Volume], between: Between = go_on) -> Findings:
        """Return what the network finds in the volumes, one for each input of the manifest by its name.

        `between` is called between windows.

        Raises:
            NotEligible: the manifest's region isn't in the volume.
            AnalysisFailed: the network fails on it or gives no usable numbers.
        """


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to fit into memory: how many windows at a time, where results are put together, and at how coarse a grid."""

    batch: int
    stitch_on: torch.device
    coarser: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OwnModel:
    """A network that runs by its manifest's own preprocessing and sliding window."""

    manifest: Manifest
    digest: str
    network: torch.nn.Module
    backend: Backend

    @property
    def device(self) -> torch.device:
        """See Model."""
        return self.backend.device

    @property
    def memory_bytes(self) -> int:
        """What it holds while it waits."""
        return self.backend.memory_bytes

    def __call__(self, volumes: Mapping[str, Volume], between: Between = go_on) -> Findings:
        """See Model. Where memory runs short, smaller steps are tried: their findings are the same within rounding."""
        for rung in ladder(self.manifest, self.backend):
            try:
                return self._analysed(volumes, between, rung)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("memory was short", package=self.manifest.name, reason=f"{rung.batch} window(s), x{rung.coarser:g}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        raise AnalysisFailed(f"The package {self.manifest.name} needs more memory than there is, even for one window at a time.")

    def _analysed(self, volumes: Mapping[str, Volume], between: Between, rung: Rung) -> Findings:
        started = time.perf_counter()
        manifest = self.manifest
        prepared = prepare(manifest, volumes, self.device, coarser=rung.coarser)
        located = time.perf_counter()
        probabilities = self._probabilities(prepared, between, rung)
        inferred = time.perf_counter()
        volume = volumes[manifest.inputs[0].name]
        scores = scores_of(manifest, probabilities, prepared)
        found, omitted = findings_of(manifest, probabilities, prepared, volume, scores)
        notes = prepared.notes
        if rung.coarser != 1:
            notes += (f"Memory was short: the images were analysed at 1/{rung.coarser:g} of the resolution the model is made for.",)
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
            notes=notes,
            seconds={"region": located - started, "inference": inferred - located, "findings": time.perf_counter() - inferred},
        )

    def maps(self, volumes: Mapping[str, Volume]) -> tuple[Prepared, torch.Tensor]:
        """Return what the network was given and (outputs, k, r, c) what it says there, before anything is a finding.

        Raises:
            NotEligible, AnalysisFailed: as a call does.
        """
        prepared = prepare(self.manifest, volumes, self.device)
        return prepared, self._probabilities(prepared, go_on, next(ladder(self.manifest, self.backend)))

    def _probabilities(self, prepared: Prepared, between: Between, rung: Rung) -> torch.Tensor:
        """Return (outputs, k, r, c) float32 probabilities; zero in windows that hold no region, where no finding may lie."""
        outputs, settings = self.manifest.outputs, _inference(self.manifest)
        how = Sliding(
            window=settings.window, overlap=settings.overlap, batch=rung.batch, outputs=len(outputs), stitch_on=rung.stitch_on
        )  # fmt: skip

        def predict_once(windows: torch.Tensor) -> torch.Tensor:
            logits = self.logits(windows)
            soft = logits.softmax(dim=1) if any(output.activation == "softmax" for output in outputs) else logits
            return torch.stack([_activated(output, logits, soft) for output in outputs], dim=1)

        def predict(windows: torch.Tensor) -> torch.Tensor:
            once = predict_once(windows)
            return (once + predict_once(windows.flip(-1)).flip(-1)) / 2 if settings.mirror else once

        def told(number: int) -> Between:
            return lambda share: between((number + share) / len(settings.scales))

        with torch.inference_mode():
            passes = [_one_pass(prepared, predict, how, scale, told(number)) for number, scale in enumerate(settings.scales)]
            probabilities = passes[0] if len(passes) == 1 else torch.stack(passes).amax(dim=0)
            brighten(self.manifest, probabilities, prepared.image)
            if not bool(torch.isfinite(probabilities.sum())):
                raise AnalysisFailed(f"The network of the package {self.manifest.name} gave numbers that are not finite.")
        return probabilities

    def logits(self, windows: torch.Tensor) -> torch.Tensor:
        """Return what the network says of (n, inputs, *window), of the same size; a 2D network gets windows without their one slice.

        Raises:
            AnalysisFailed: it fails on them, or answers with another shape.
        """
        name = self.manifest.name
        flat = self.manifest.inputs[0].dimensions == 2
        try:
            logits = self.backend(windows.squeeze(2) if flat else windows)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:  # what layers raise on shapes and memory
            if is_out_of_memory(error):
                raise
            raise AnalysisFailed(f"The network of the package {name} failed: {first_line(error)}.") from error
        if flat and isinstance(logits, torch.Tensor):
            logits = logits.unsqueeze(2)
        channels = 1 + max(output.channel for output in self.manifest.outputs)
        if not isinstance(logits, torch.Tensor) or logits.shape[2:] != windows.shape[2:] or logits.shape[1] < channels:
            raise AnalysisFailed(f"The network of the package {name} doesn't give {channels} channel(s) of the window's size.")
        return logits


def _one_pass(prepared: Prepared, predict: Predict, how: Sliding, scale: int, between: Between) -> torch.Tensor:
    """Return (outputs, k, r, c) on the image's grid, of windows in which `scale` voxels along each axis are averaged to one.

    At scale 1 nothing outside the organ counts, where the region is wider: only what is large may lie there.
    """
    if scale == 1:
        if prepared.organ is None:
            return slide(prepared.image, predict, how, where=prepared.region, between=between)
        fine = slide(prepared.image, predict, how, where=prepared.organ, between=between)
        return fine.mul_(torch.from_numpy(np.ascontiguousarray(prepared.organ)).to(fine.device))
    steps = tuple(1 if edge == 1 else scale for edge in how.window)
    image = functional.avg_pool3d(prepared.image, steps, ceil_mode=True, count_include_pad=False)
    where = None
    if prepared.region is not None:
        region = torch.from_numpy(prepared.region)[None].float()
        where = functional.max_pool3d(region, steps, ceil_mode=True)[0].numpy() > 0
    coarse = slide(image, predict, how, where=where, between=between)
    fine = functional.interpolate(coarse[None], scale_factor=[float(step) for step in steps], mode="trilinear")[0]
    slices, rows, columns = prepared.image.shape[1:]
    return fine[:, :slices, :rows, :columns]


def ladder(manifest: Manifest, backend: Backend) -> Iterator[Rung]:
    """Yield ways to run a model, each needing less memory than the one before: the quick one first."""
    settings = _inference(manifest)
    host = torch.device("cpu")
    batch = max(settings.batch, backend.windows)
    yield Rung(batch=batch, stitch_on=backend.device)
    while batch > 1:
        batch //= 2
        yield Rung(batch=batch, stitch_on=backend.device)
    if backend.device != host:
        yield Rung(batch=1, stitch_on=host)
    if settings.half_resolution:
        yield Rung(batch=1, stitch_on=host, coarser=2.0)


def scores_of(manifest: Manifest, probabilities: torch.Tensor, prepared: Prepared) -> tuple[Score, ...]:
    """Return the scores of the whole image, one for each output that has a rule for it."""
    return tuple(
        image_score(output, output.image_score, marked_share(values.cpu().numpy(), prepared.region, output.image_score.above))
        for output, values in zip(manifest.outputs, probabilities, strict=True)
        if output.image_score is not None
    )


def findings_of(
    manifest: Manifest, probabilities: torch.Tensor, prepared: Prepared, volume: Volume, scores: Sequence[Score]
) -> tuple[tuple[Finding, ...], int]:
    """Return the findings of all outputs, most probable first and numbered, and how many more the caps left out.

    An output whose score of the whole image is negative has none, and one whose score is positive has at least one.
    What lies above an output's threshold is looked for on the device; only the box around it becomes an array.
    """
    found: list[Finding] = []
    omitted = 0
    positive = {score.label: score.positive for score in scores}
    for output, values in zip(manifest.outputs, probabilities, strict=True):
        box = _box_above(values, output.threshold)
        if not output.finding or box is None or not positive.get(output.label, True) or set(output.needs) & set(prepared.absent):
            continue
        first, second, third = (start + s.start for start, s in zip(prepared.origin, box, strict=True))
        area = ProbabilityMap(
            grid=prepared.grid, origin=(first, second, third), values=np.ascontiguousarray(values[box].cpu().numpy()),
            region=None if prepared.region is None else prepared.region[box], side=None if prepared.side is None else prepared.side[box],
        )  # fmt: skip
        kept, left_out = find(output, area, volume)
        if not kept and positive.get(output.label):
            kept, _ = find(output.model_copy(update=_ANY), area, volume)
        found += kept
        omitted += left_out
    found = without_orphans(found, manifest)
    found.sort(key=lambda f: (-f.probability, -f.volume_ml, f.centre_lps_mm or (), f.segment.origin))
    omitted += max(0, len(found) - manifest.maximum_findings)
    return tuple(replace(finding, number=number) for number, finding in enumerate(found[: manifest.maximum_findings], start=1)), omitted


def load_model(
    folder: Path, *, digest: str, device: str = "auto", threads: int = 0, backend: Choice = "torch", report: Mapping[str, Any] | None = None
) -> Model:
    """Load the network of a package whose content has `digest`; `threads` above 0 limits torch's CPU threads in this process.

    Each file is read once: what was digested is what is loaded. What computes it is chosen by `backend` among those that agreed
    with torch when the package was checked, as that check's `report` says.

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
    place = device_named(device)
    if manifest.bundle is not None:
        return load_bundle(contents, manifest, digest, place)
    if manifest.kind == "detection":
        raise PackageError(f"the package {manifest.name} detects: only a MONAI Bundle says how its boxes are made (bundle in the manifest)")
    network = load_network(contents, manifest.name, place)
    _lay_out(network)
    if manifest.kind == "classification":
        return WholeImageModel(manifest=manifest, digest=digest, network=network, backend=TorchBackend(network=network, device=place))
    chosen = backend_for(network, choose(report, backend, place), device=place, threads=threads)
    return OwnModel(manifest=manifest, digest=digest, network=network, backend=chosen)


def check_package(folder: Path, volumes: Mapping[str, Volume], *, digest: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Run the package on `volumes` in this process and report digest, device, findings, seconds and peak memory.

    Each other backend that this machine has is run too: "backends" says how long each took, its least Dice with torch's findings,
    and whether it may be used. For people and for the registry; `check.check_in_child` wraps it in a process without network, under
    limits.

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
        "scores": {score.label: score.probability for score in result.scores},
        "notes": list(result.notes),
        "seconds": {"load": loaded - started, **result.seconds},
        "peak_memory_bytes": memory,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else 0,
        "torch": torch.__version__,
        "backends": compare_backends(model, volumes, result),
    }


def compare_backends(model: Model, volumes: Mapping[str, Volume], result: Findings) -> dict[str, dict[str, Any]]:
    """Return for each backend: the seconds its network took, its least Dice with torch's findings, and whether it may be used.

    Scores of the whole image must agree too. Without a finding nothing is compared, and only torch may be used.
    """
    rows: dict[str, dict[str, Any]] = {TORCH: {"seconds": result.seconds["inference"], "dice": 1.0, "passed": True}}
    if not isinstance(model, OwnModel) or not result.findings:
        return rows
    for name in available(model.device):
        if name == TORCH:
            continue
        other = replace(model, backend=backend_for(model.network, name, device=model.device, threads=torch.get_num_threads()))
        try:
            other(volumes)  # it is compiled here
            theirs = other(volumes)
        except AnalysisFailed as error:
            rows[name] = {"passed": False, "reason": str(error)}
            continue
        dice = least_dice(result.findings, theirs.findings)
        rows[name] = {"seconds": theirs.seconds["inference"], "dice": dice, "passed": dice >= 1 - AGREEMENT}
        if result.scores:
            rows[name]["score_difference"] = largest_difference(result.scores, theirs.scores)
            rows[name]["passed"] &= rows[name]["score_difference"] <= AGREEMENT
    return rows


def least_dice(first: Sequence[Finding], second: Sequence[Finding]) -> float:
    """Return the least Dice of findings of the same output, each with the one that overlaps it most; 0 if their numbers differ."""
    if len(first) != len(second):
        return 0.0
    return min((max((_dice(mine, other) for other in second if other.label == mine.label), default=0.0) for mine in first), default=1.0)


def largest_difference(first: Sequence[Score], second: Sequence[Score]) -> float:
    """Return by how much two answers of one model differ at most in their scores; 1 where only one of them is positive."""
    return max(
        (abs(a.probability - b.probability) if a.positive == b.positive else 1.0 for a, b in zip(first, second, strict=True)), default=0.0
    )


def _dice(first: Finding, second: Finding) -> float:
    a, b = first.segment, second.segment
    starts = [max(x, y) for x, y in zip(a.origin, b.origin, strict=True)]
    ends = [min(x + n, y + m) for x, n, y, m in zip(a.origin, a.mask.shape, b.origin, b.mask.shape, strict=True)]
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        return 0.0
    cut = [
        segment.mask[tuple(slice(start - o, end - o) for start, end, o in zip(starts, ends, segment.origin, strict=True))]
        for segment in (a, b)
    ]
    return 2 * int(np.count_nonzero(cut[0] & cut[1])) / (a.voxel_count + b.voxel_count)


def _activated(output: OutputSection, logits: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    if output.activation == "sigmoid":
        return logits[:, output.channel].sigmoid()
    return (soft if output.activation == "softmax" else logits)[:, output.channel]


def _box_above(values: torch.Tensor, threshold: float) -> tuple[slice, slice, slice] | None:
    """Return the box around all values above the threshold, wider by one voxel, or None if there are none."""
    above = values.amax(dim=2) > threshold  # (k, r)
    slices, rows = (torch.nonzero(above.any(dim=axis)).flatten() for axis in (1, 0))
    if not len(slices):
        return None
    columns = torch.nonzero(values.amax(dim=(0, 1)) > threshold).flatten()
    k, r, c = (slice(max(0, int(i[0]) - 1), min(n, int(i[-1]) + 2)) for i, n in zip((slices, rows, columns), values.shape, strict=True))
    return k, r, c


def _inference(manifest: Manifest) -> InferenceSection:
    if manifest.inference is None:
        raise PackageError(f"the package {manifest.name} has no sliding window of its own")
    return manifest.inference


def _lay_out(network: torch.nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.dim() == 5:  # weights of 3D convolutions: a fifth faster so on the CPU too, measured with a U-Net of 8 to 96 channels
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
