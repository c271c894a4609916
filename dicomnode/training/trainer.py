"""One run's network, averaged network, optimiser and counters: what a step changes, and what a checkpoint keeps.

fp32 on a CPU, because bf16 autocast gave non-finite gradients with a finite loss there; on a GPU bf16 autocast, or fp16 with scaled
gradients where it has no bf16. A step whose loss or gradients are not finite changes nothing but counters.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai.networks.nets
import numpy as np
import torch
from safetensors.torch import load_file

from dicomnode.analysis.package import WEIGHTS
from dicomnode.errors import ConfigError, TrainingFailed, UsageError
from dicomnode.training.detection import build_retinanet, detection_losses, detector_of
from dicomnode.training.losses import loss_parts, meaning_of
from dicomnode.training.recipe import NetworkSection, Recipe
from dicomnode.training.streams import Patch as Batch

PACKAGES = Path(__file__).parents[1] / "packages"
SKIPPED_IN_A_ROW = 20  # as many, or more than this share of all steps, end a training
SKIPPED_SHARE = 0.05
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by a tensor's dimensions

History = list[tuple[int, float]]  # step and metric of every validation, oldest first


def build_network(section: NetworkSection) -> torch.nn.Module:
    """Build the network that the recipe names.

    Raises:
        ConfigError: MONAI has no such network, or it doesn't take these arguments.
    """
    network_class = getattr(monai.networks.nets, section.name, None)
    if not (isinstance(network_class, type) and issubclass(network_class, torch.nn.Module)):
        raise ConfigError(f"network.name: monai.networks.nets has no network called {section.name}")
    try:
        return network_class(**section.arguments)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"network.arguments: {section.name} doesn't take these arguments: {error}") from error


def network_of(recipe: Recipe) -> torch.nn.Module:
    """A new network as a recipe says.

    Raises:
        ConfigError: it can't be built.
    """
    return build_retinanet(recipe) if recipe.package.kind == "detection" else build_network(recipe.network)


def _load_weights(network: torch.nn.Module, start: str) -> None:
    file = PACKAGES / start / WEIGHTS[0]
    if not file.is_file():
        raise ConfigError(f"training.start: no package {start} with its weights comes with the node")
    try:
        network.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise ConfigError(f"training.start: the weights of {start} are of another network than the recipe's") from error


@dataclass(frozen=True, kw_only=True)
class Computing:
    """Where and how precisely a training computes."""

    device: torch.device
    autocast_type: torch.dtype | None  # None: fp32 throughout

    @property
    def name(self) -> str:
        """Device and precision in words."""
        words = {None: "fp32", torch.bfloat16: "bf16 autocast", torch.float16: "fp16 autocast with scaled gradients"}
        return f"{self.device.type}, {words[self.autocast_type]}"

    def moved(self, part: torch.Tensor) -> torch.Tensor:
        """A tensor on the device, channels last in memory, which convolutions are faster with."""
        return part.to(self.device, memory_format=CHANNELS_LAST.get(part.ndim, torch.preserve_format), non_blocking=True)

    def placed(self, network: torch.nn.Module) -> torch.nn.Module:
        """A network on the device, its weights laid out like the images."""
        network = network.to(self.device)
        for weight in network.parameters():
            weight.data = self.moved(weight.data)
        return network

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass."""
        return torch.autocast(self.device.type, self.autocast_type or torch.bfloat16, enabled=self.autocast_type is not None)


def computing_on(device: str) -> Computing:
    """Choose by `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: no such device, or cuda where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device}: auto, cpu or cuda is wanted")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: this machine has no GPU that torch can use")
    if device == "cpu" or not torch.cuda.is_available():
        return Computing(device=torch.device("cpu"), autocast_type=None)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Computing(device=torch.device("cuda"), autocast_type=torch.bfloat16 if has_bf16 else torch.float16)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # what libraries draw from; ours take generators
    torch.manual_seed(seed)


class Trainer:
    """Everything a step changes."""

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        self._section = recipe.training
        self._meaning = meaning_of(recipe)
        self.computing = computing_on(device)
        seed_everything(recipe.training.seed)
        self.network = self.computing.placed(network_of(recipe))
        if recipe.training.start:
            _load_weights(self.network, recipe.training.start)
        self.average = self.computing.placed(network_of(recipe)).eval()
        self._detector = detector_of(recipe, self.network) if recipe.package.kind == "detection" else None
        self.average.load_state_dict(self.network.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.training.learning_rate, weight_decay=recipe.training.weight_decay, fused=True
        )
        self._scaler = torch.amp.GradScaler(self.computing.device.type, enabled=self.computing.autocast_type is torch.float16)
        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.history: History = []

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to a hundredth."""
        section = self._section
        if self.step < section.warm_up_steps:
            return section.learning_rate * (self.step + 1) / section.warm_up_steps
        share = (self.step - section.warm_up_steps) / max(1, section.steps - section.warm_up_steps)
        return section.learning_rate * (0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * share))))

    def learn(self, batch: Batch) -> Mapping[str, float] | None:
        """One step; loss, its terms and the norm of the gradients, or None if it was skipped because one was not finite.

        Raises:
            ConfigError: the network's answer doesn't fit the data.
            TrainingFailed: too many steps were skipped.
        """
        image, truth, region = map(self.computing.moved, batch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.step += 1
        self.network.train()
        buffers = list(self.network.buffers())
        statistics = [buffer.clone() for buffer in buffers]  # what batch normalisation keeps changes in the forward pass
        self.optimizer.zero_grad(set_to_none=True)
        parts = self._losses(image, truth, region)
        loss = torch.stack(list(parts.values())).sum()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._section.clip_norm, foreach=True)
        values = torch.stack([loss.detach(), norm, *(part.detach() for part in parts.values())]).tolist()  # the one wait for the device
        if not all(map(np.isfinite, values[:2])):
            self._skip(buffers, statistics)
            return None
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.skipped_in_a_row = 0
        self._follow()
        return dict(zip(("loss", "gradient_norm", *parts), values, strict=True))

    def _losses(self, image: torch.Tensor, truth: torch.Tensor, region: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._detector is not None:
            with self.computing.autocast():
                return detection_losses(self._detector, image, truth, self._section)
        with self.computing.autocast():
            logits = self.network(image)
        if not isinstance(logits, torch.Tensor):
            raise ConfigError(f"network.name: {type(self.network).__name__} gives more than one tensor, as here, and can't be trained so")
        return loss_parts(logits.float(), truth, region, self._section, self._meaning)

    def _skip(self, buffers: Sequence[torch.Tensor], statistics: Sequence[torch.Tensor]) -> None:
        if self._scaler.is_enabled():
            self._scaler.update()  # to a smaller scale
        with torch.no_grad():
            for buffer, value in zip(buffers, statistics, strict=True):
                buffer.copy_(value)
        self.skipped += 1
        self.skipped_in_a_row += 1
        most = max(SKIPPED_IN_A_ROW, int(SKIPPED_SHARE * self._section.steps))
        if self.skipped_in_a_row >= SKIPPED_IN_A_ROW or self.skipped > most:
            raise TrainingFailed(
                f"training ended at step {self.step}: loss or gradients were not finite in {self.skipped} steps, {self.skipped_in_a_row} of"
                f" them in a row; a smaller learning_rate or clip_norm may help"
            )

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self._section.ema_decay, (1 + self.step) / (10 + self.step))
        # parameters() and buffers() give each tensor once, however often a network names it
        pairs = list(
            zip((*self.average.parameters(), *self.average.buffers()), (*self.network.parameters(), *self.network.buffers()), strict=True)
        )
        floating = [(mean, value) for mean, value in pairs if mean.dtype.is_floating_point]
        torch._foreach_lerp_([mean for mean, _ in floating], [value for _, value in floating], 1 - decay)
        for mean, value in pairs:
            if not mean.dtype.is_floating_point:
                mean.copy_(value)

    def save(self, file: Path) -> None:
        """Write a checkpoint; it appears whole or not at all, a power cut included."""
        state = {
            "network": self.network.state_dict(), "average": self.average.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(), "step": self.step, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row,
            "history": self.history, "random": _random_state(),
        }  # fmt: skip
        write_whole(file, state)

    def restore(self, file: Path) -> None:
        """Go back to a checkpoint.

        Raises:
            OSError, RuntimeError, EOFError, KeyError, ValueError: it can't be read, or isn't of this training.
        """
        state: dict[str, Any] = torch.load(file, map_location=self.computing.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.step, self.skipped, self.skipped_in_a_row = (int(state[key]) for key in ("step", "skipped", "skipped_in_a_row"))
        self.history = [(int(step), float(value)) for step, value in state["history"]]
        _set_random_state(state["random"])


def write_whole(file: Path, state: Mapping[str, Any]) -> None:
    """Write what torch.save takes so that the file appears whole or not at all."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        torch.save(dict(state), stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn inside, the random numbers afterwards are those of before."""
    state = _random_state()
    try:
        yield
    finally:
        _set_random_state(state)


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # see seed_everything
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))  # see seed_everything
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])
