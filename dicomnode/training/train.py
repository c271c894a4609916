"""Training: a recipe in, numbered checkpoints and a package out. A run that was killed goes on to the same bits on the same machine.

Must never see a real image but those of a data set that it is handed.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset, Subset

from dicomnode.errors import UsageError
from dicomnode.training.dataset import DATASET, load_dataset
from dicomnode.training.detection import average_precision, detector_of
from dicomnode.training.export import write_package
from dicomnode.training.journal import Journal
from dicomnode.training.leakage import check_dataset
from dicomnode.training.losses import meaning_of
from dicomnode.training.recipe import Recipe, load_recipe
from dicomnode.training.streams import KINDS, Patch as Batch, stream_of
from dicomnode.training.trainer import Trainer, random_state_kept
from dicomnode.training.validation import Measured, best_of, is_exhausted, of_classes, validate

KEPT_CHECKPOINTS = 3  # the newest ones, and the best one
VALIDATION_SEEDS = 2**40  # added to a recipe's seed: patches of validation are of other seeds than those of any training


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training run ended with."""

    folder: Path
    last_checkpoint: Path
    steps: int
    skipped_steps: int
    seconds: float  # of this call
    cpu_seconds: float  # of this call and of its workers: what is left of a measurement on a busy machine
    finished: bool
    exported_step: int | None = None  # of the best validation; None: not finished
    metric: tuple[str, float] | None = None  # name and value at that step
    stopped_by: str = ""  # a signal's name
    computing: str = ""  # device and precision in words


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((folder / "checkpoints").glob("[0-9]*.pt"))


def train(
    config_path: Path, out_folder: Path, *, device: str = "auto", dataset: Path | None = None, long: bool = False, seed: int | None = None,
    stop_after: int | None = None, quiet: bool = False,
) -> Training:  # fmt: skip
    """Train what the recipe says, into `out_folder`; an interrupted run goes on from its last checkpoint.

    Writes `recipe.toml`, `run.json` (seed, steps and data set), `log.jsonl` (a line per 25 steps and validation), `tensorboard`,
    `checkpoints/<step>.pt` and, at the end, in `package` the model package of the step with the best validation. `seed` is in the place
    of the recipe's, `long` multiplies its steps by its `long_factor`, `stop_after` ends this call after so many steps of its own.
    SIGTERM and SIGINT end it after the step that they find; each way it ends with a checkpoint.

    Raises:
        ConfigError: the recipe has mistakes.
        UsageError: `out_folder` holds a run of another recipe, or device or data set are not as they must be.
        TrainingFailed: too many steps gave no finite numbers.
    """
    started, cpu_before = time.monotonic(), sum(os.times()[:4])
    recipe = _asked(load_recipe(config_path), seed=seed, long=long)
    section = recipe.training
    run = _run_of(recipe, dataset)
    torch.set_num_threads(section.threads)
    torch.backends.cudnn.deterministic = True
    trainer = _resumed(recipe, device, out_folder)
    _claim(out_folder, config_path, recipe, run)
    last = section.steps if stop_after is None else min(section.steps, trainer.step + stop_after)
    if is_exhausted(trainer.history, recipe.validation.patience):
        last = trainer.step
    kept_back = _ValidationPatches(recipe, dataset)
    columns = (TextColumn("[bold]training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with _signals() as received, Journal(out_folder, step=trainer.step) as journal, Progress(*columns, disable=quiet) as progress:
        task = progress.add_task("training", total=section.steps, completed=trainer.step, said="")
        for batch in _batches(recipe, dataset, first=trainer.step, last=last):
            rate = trainer.learning_rate()
            parts = trainer.learn(batch)
            journal.stepped(trainer.step, parts, rate=rate, skipped=trainer.skipped, seconds=time.monotonic() - started)
            is_due = trainer.step % recipe.validation.every == 0 or trainer.step == section.steps
            if is_due:
                measured = kept_back.measure(trainer)
                trainer.history.append((trainer.step, measured.metric))
                journal.validated(trainer.step, measured, tuple(output.label for output in recipe.package.outputs))
            if is_due or received or trainer.step % section.checkpoint_every == 0 or trainer.step == last:
                _checkpoint(trainer, out_folder)
            progress.update(task, completed=trainer.step, said=_said(journal, trainer))
            if received or is_exhausted(trainer.history, recipe.validation.patience):
                break
    finished = trainer.step >= section.steps or is_exhausted(trainer.history, recipe.validation.patience)
    best = best_of(trainer.history) if finished else None
    if best is not None:
        averages = torch.load(_file_of(out_folder, best[0]), map_location="cpu", weights_only=True)["average"]
        recipe = KINDS[recipe.data.kind].fitted(recipe, dataset)
        write_package(recipe, averages, out_folder / "package", record=_record(recipe, trainer, run))
    return Training(
        folder=out_folder, last_checkpoint=checkpoints(out_folder)[-1], steps=trainer.step, skipped_steps=trainer.skipped,
        seconds=time.monotonic() - started, cpu_seconds=sum(os.times()[:4]) - cpu_before, finished=finished,
        exported_step=best[0] if best else None,
        metric=(metric_name(recipe), best[1]) if best else None, stopped_by="".join(received[:1]),
        computing=trainer.computing.name,
    )  # fmt: skip


def metric_name(recipe: Recipe) -> str:
    """What a recipe's validation measures."""
    return {"segmentation": "dice", "classification": "auc", "detection": "average_precision"}[recipe.package.kind]


def _asked(recipe: Recipe, *, seed: int | None, long: bool) -> Recipe:
    section = recipe.training
    changed = {"seed": section.seed if seed is None else seed, "steps": section.steps * (section.long_factor if long else 1)}
    return recipe.model_copy(update={"training": section.model_copy(update=changed)})


def _run_of(recipe: Recipe, dataset: Path | None) -> dict[str, Any]:
    """What of a run isn't in its recipe.

    Raises:
        UsageError: a data set is needed and not given, or given and not needed, or it has a fault: every case is read to find out.
    """
    kind = KINDS[recipe.data.kind]
    if (dataset is not None) != kind.reads_dataset:
        raise UsageError(f"data of kind {recipe.data.kind} {'need a data set: --data' if dataset is None else 'read no data set'}")
    run: dict[str, Any] = {"seed": recipe.training.seed, "steps": recipe.training.steps, "dataset": None}
    if dataset is not None:  # dataset.json holds the hashes of all cases
        read = load_dataset(dataset)
        check_dataset(read)
        run["dataset"] = {"name": read.name, "sha256": hashlib.sha256((dataset / DATASET).read_bytes()).hexdigest()}
    return run


def _claim(folder: Path, config_path: Path, recipe: Recipe, run: dict[str, Any]) -> None:
    """Note in a run's folder what it trains; refuse one that holds another training."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    kept_recipe, kept_run = folder / "recipe.toml", folder / "run.json"
    if kept_recipe.exists():
        kept = load_recipe(kept_recipe)
        trains = json.loads(kept_run.read_text(encoding="utf-8")) if kept_run.exists() else run
        if trains != run or not _same_training(kept, recipe):
            raise UsageError(f"{folder} holds a training run of another recipe, seed, length or data set; take an empty folder")
    if config_path.resolve() != kept_recipe.resolve():
        shutil.copyfile(config_path, kept_recipe)
    kept_run.write_text(json.dumps(run) + "\n", encoding="utf-8")


def _same_training(first: Recipe, second: Recipe) -> bool:
    """Whether two recipes train the same network; what the package says may differ, and seed and steps stand in run.json."""
    settings = [recipe.training.model_copy(update={"seed": 0, "steps": 1}) for recipe in (first, second)]
    return settings[0] == settings[1] and all(getattr(first, part) == getattr(second, part) for part in ("data", "network", "validation"))


def _resumed(recipe: Recipe, device: str, folder: Path) -> Trainer:
    """A trainer at the newest checkpoint that can be read, else at its beginning; a file that was damaged is passed over."""
    for file in reversed(checkpoints(folder)):
        trainer = Trainer(recipe, device)
        try:
            trainer.restore(file)
        except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError):
            continue
        return trainer
    return Trainer(recipe, device)


def _file_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"{step:06d}.pt"


def _checkpoint(trainer: Trainer, folder: Path) -> None:
    trainer.save(_file_of(folder, trainer.step))
    best = best_of(trainer.history)
    wanted = {*checkpoints(folder)[-KEPT_CHECKPOINTS:], *([_file_of(folder, best[0])] if best else [])}
    for file in checkpoints(folder):
        if file not in wanted:
            file.unlink()


def _said(journal: Journal, trainer: Trainer) -> str:
    best = best_of(trainer.history)
    words = [f"loss {journal.loss:.3f}"]
    words += [f"best {best[1]:.3f} at {best[0]}"] if best else []
    words += [f"{trainer.skipped} skipped"] if trainer.skipped else []
    return ", ".join(words)


def _record(recipe: Recipe, trainer: Trainer, run: dict[str, Any]) -> dict[str, Any]:
    """How a package was trained: for its training.json. The same for the same training."""
    best = best_of(trainer.history)
    return {
        "schema": 1, **run, "data": recipe.data.kind, "steps_done": trainer.step, "stopped_early": trainer.step < recipe.training.steps,
        "skipped_steps": trainer.skipped, "exported_step": best[0] if best else None, "metric": metric_name(recipe),
        "validations": [{"step": step, "metric": value} for step, value in trainer.history], "computed_on": trainer.computing.name,
        "torch": str(torch.__version__), "monai": str(monai.__version__),
    }  # fmt: skip


class _ValidationPatches:
    """The patches that a run is measured on, read or rendered when they are first needed."""

    def __init__(self, recipe: Recipe, dataset: Path | None) -> None:
        self._recipe, self._dataset = recipe, dataset
        self._batches: list[Batch] = []

    def measure(self, trainer: Trainer) -> Measured:
        section = self._recipe.training
        with random_state_kept():
            if not self._batches:
                patches = stream_of(
                    self._recipe.data, seed=section.seed + VALIDATION_SEEDS, count=self._recipe.validation.patches, split="validation",
                    dataset=self._dataset,
                )  # fmt: skip
                # one worker would make the training wait as long as it makes them itself
                workers = section.workers if section.workers > 1 else 0
                self._batches = list(_loader(patches, section.batch, workers=workers, seed=section.seed, pinned=False))
            if self._recipe.package.kind == "detection":
                detector = detector_of(self._recipe, trainer.average)
                labels = [output.label for output in self._recipe.package.outputs]
                return of_classes(average_precision(detector, self._batches, trainer.computing.device, labels), "average_precision")
            return validate(trainer.average, self._batches, meaning_of(self._recipe), trainer.computing)


def _batches(recipe: Recipe, dataset: Path | None, *, first: int, last: int) -> Iterator[Batch]:
    section = recipe.training
    patches = stream_of(recipe.data, seed=section.seed, count=section.steps * section.batch, dataset=dataset)
    rest = Subset(patches, range(first * section.batch, last * section.batch))
    yield from _loader(rest, section.batch, workers=section.workers, seed=section.seed, pinned=torch.cuda.is_available())


def _loader(patches: Dataset[Batch], batch: int, *, workers: int, seed: int, pinned: bool) -> DataLoader[Batch]:
    return DataLoader(
        patches, batch_size=batch, num_workers=workers, worker_init_fn=_start_worker, pin_memory=pinned,
        generator=torch.Generator().manual_seed(seed),  # else it would draw from the random numbers of the training
        multiprocessing_context="spawn" if workers else None, prefetch_factor=6 if workers else None,
    )  # fmt: skip


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    np.random.seed(torch.initial_seed() % 2**32)  # torch has seeded itself and Python
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all of the processes: the trainer ends its workers when it has saved
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _signals() -> Iterator[Sequence[str]]:
    """Names of the signals that asked for an end; the second one ends at once."""
    received: list[str] = []

    def note(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():  # handlers can be set nowhere else
        yield received
        return
    earlier = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
