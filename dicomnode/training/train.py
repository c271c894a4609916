"""Training: a recipe in, numbered checkpoints out. Stops and goes on at any checkpoint with the same result.

Must never see a real image. fp32 on the CPU, because bf16 autocast gave non-finite gradients with a finite loss there;
on a GPU autocast in bf16. A step whose gradients are not finite is skipped and counted.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai.networks.nets
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from dicomnode.errors import ConfigError, UsageError
from dicomnode.training.export import write_package
from dicomnode.training.recipe import NetworkSection, Recipe, TrainingSection, load_recipe
from dicomnode.training.streams import Patch as Batch, stream_of


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training run ended with."""

    folder: Path
    last_checkpoint: Path
    steps: int
    skipped_steps: int
    seconds: float  # of this call
    finished: bool


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


def segmentation_loss(logits: torch.Tensor, truth: torch.Tensor, region: torch.Tensor, section: TrainingSection) -> torch.Tensor:
    """Weighted sum of cross entropy in the region, of its worst share of voxels, and of soft Dice over the batch. A scalar."""
    counted = region > 0
    entropy = functional.binary_cross_entropy_with_logits(logits[counted], truth[counted], reduction="none")
    if entropy.numel() == 0:
        return logits.sum() * 0.0
    worst = entropy.topk(max(1, int(entropy.numel() * section.worst_share))).values
    probability = torch.sigmoid(logits) * region
    overlap = (probability * truth).sum()
    dice = 1 - (2 * overlap + 1) / (probability.sum() + truth.sum() + 1)
    return section.bce_weight * entropy.mean() + section.worst_weight * worst.mean() + section.dice_weight * dice


class Trainer:
    """Network, averaged network, optimiser and counters of one run: what a checkpoint holds."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        self._section = recipe.training
        self._device = device
        torch.manual_seed(recipe.training.seed)
        random.seed(recipe.training.seed)
        self.network = build_network(recipe.network).to(device)
        self.average = build_network(recipe.network).to(device).eval()
        self.average.load_state_dict(self.network.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.training.learning_rate, weight_decay=recipe.training.weight_decay
        )
        self.step = 0
        self.skipped = 0

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to a hundredth."""
        section = self._section
        if self.step < section.warm_up_steps:
            return section.learning_rate * (self.step + 1) / section.warm_up_steps
        share = (self.step - section.warm_up_steps) / max(1, section.steps - section.warm_up_steps)
        return section.learning_rate * (0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * share))))

    def learn(self, batch: Batch) -> float | None:
        """One step; its loss, or None if it was skipped because the loss or a gradient was not finite."""
        image, truth, region = (part.to(self._device) for part in batch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.step += 1
        self.network.train()
        statistics = [buffer.clone() for buffer in self.network.buffers()]  # what batch normalisation keeps changes in the forward pass
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self._device.startswith("cuda")):
            logits = self.network(image)
        loss = segmentation_loss(logits.float(), truth, region, self._section)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._section.clip_norm)
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(norm)):
            self.skipped += 1
            with torch.no_grad():
                for buffer, value in zip(self.network.buffers(), statistics, strict=True):
                    buffer.copy_(value)
            return None
        self.optimizer.step()
        self._follow()
        return float(loss.detach())

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self._section.ema_decay, (1 + self.step) / (10 + self.step))
        # parameters() and buffers() give each tensor once, however often a network names it
        means = (*self.average.parameters(), *self.average.buffers())
        values = (*self.network.parameters(), *self.network.buffers())
        for mean, value in zip(means, values, strict=True):
            if mean.dtype.is_floating_point:
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)

    def save(self, file: Path) -> None:
        """Write a checkpoint; it appears whole or not at all."""
        partial = file.with_suffix(".partial")
        torch.save(
            {
                "network": self.network.state_dict(), "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(), "step": self.step, "skipped": self.skipped,
            },
            partial,
        )  # fmt: skip
        partial.replace(file)

    def restore(self, file: Path) -> None:
        """Go back to a checkpoint."""
        state: dict[str, Any] = torch.load(file, map_location=self._device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.skipped = int(state["step"]), int(state["skipped"])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((folder / "checkpoints").glob("[0-9]*.pt"))


def train(config_path: Path, out_folder: Path, *, device: str = "auto", stop_after: int | None = None, quiet: bool = False) -> Training:
    """Train what the recipe says, into `out_folder`; an interrupted run goes on from its last checkpoint.

    Writes `recipe.toml`, `log.jsonl` (a line per 25 steps), `checkpoints/<step>.pt` and, at the end, the model package in
    `package`. `stop_after` ends this call after so many steps of its own, with a checkpoint.

    Raises:
        ConfigError: the recipe has mistakes.
        UsageError: `out_folder` holds a run of another recipe.
    """
    started = time.monotonic()
    recipe = load_recipe(config_path)
    section = recipe.training
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    torch.set_num_threads(section.threads)
    (out_folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    kept_recipe = out_folder / "recipe.toml"
    if kept_recipe.exists() and not _same_training(load_recipe(kept_recipe), recipe):
        raise UsageError(f"{out_folder} holds a training run of another recipe; take an empty folder")
    if config_path.resolve() != kept_recipe.resolve():
        shutil.copyfile(config_path, kept_recipe)
    trainer = Trainer(recipe, chosen)
    if existing := checkpoints(out_folder):
        trainer.restore(existing[-1])
    last = section.steps if stop_after is None else min(section.steps, trainer.step + stop_after)
    progress = Progress(
        TextColumn("[bold]training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(), disable=quiet,
    )  # fmt: skip
    with progress, (out_folder / "log.jsonl").open("a", encoding="utf-8") as log:
        task = progress.add_task("training", total=section.steps, completed=trainer.step, loss=float("nan"))
        recent: list[float] = []
        for batch in _batches(recipe, first=trainer.step, last=last):
            loss = trainer.learn(batch)
            if loss is not None:
                recent.append(loss)
            mean = float(np.mean(recent[-25:])) if recent else float("nan")
            progress.update(task, completed=trainer.step, loss=mean)
            if trainer.step % 25 == 0:
                seconds = round(time.monotonic() - started, 1)
                line = {"step": trainer.step, "loss": round(mean, 4), "skipped": trainer.skipped, "seconds": seconds}
                log.write(json.dumps(line) + "\n")
                log.flush()
            if trainer.step % section.checkpoint_every == 0 or trainer.step == last:
                trainer.save(out_folder / "checkpoints" / f"{trainer.step:06d}.pt")
    finished = trainer.step >= section.steps
    if finished:
        write_package(recipe, trainer.average.state_dict(), out_folder / "package")
    return Training(
        folder=out_folder, last_checkpoint=checkpoints(out_folder)[-1], steps=trainer.step, skipped_steps=trainer.skipped,
        seconds=time.monotonic() - started, finished=finished,
    )  # fmt: skip


def _same_training(first: Recipe, second: Recipe) -> bool:
    """Whether two recipes train the same network; what the package says may differ."""
    return (first.data, first.network, first.training) == (second.data, second.network, second.training)


def _batches(recipe: Recipe, *, first: int, last: int) -> Iterator[Batch]:
    section = recipe.training
    patches = stream_of(recipe.data, seed=section.seed, count=section.steps * section.batch)
    rest = Subset(patches, range(first * section.batch, last * section.batch))
    yield from DataLoader(
        rest, batch_size=section.batch, num_workers=section.workers, worker_init_fn=_one_thread,
        multiprocessing_context="spawn" if section.workers else None, prefetch_factor=6 if section.workers else None,
    )  # fmt: skip


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
