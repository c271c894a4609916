"""What a training says while it runs: lines of log.jsonl, and the same curves and pictures for TensorBoard.

Must never change what is trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from dicomnode.training.validation import Measured

EVERY = 25  # steps


class Journal:
    """The log of a run, written while it is entered; one that goes on after `step` forgets what an interrupted one said of later steps."""

    def __init__(self, folder: Path, *, step: int) -> None:
        file = folder / "log.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._log = file.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._recent: list[Mapping[str, float]] = []

    @property
    def loss(self) -> float:
        """Mean of the last steps that were not skipped."""
        return float(np.mean([parts["loss"] for parts in self._recent])) if self._recent else float("nan")

    def stepped(self, step: int, parts: Mapping[str, float] | None, *, rate: float, skipped: int, seconds: float) -> None:
        """Note a step; a line and points are written for each 25th."""
        if parts is not None:
            self._recent = [*self._recent, parts][-EVERY:]
        if step % EVERY:
            return
        self._line({"step": step, "loss": round(self.loss, 4), "skipped": skipped, "seconds": round(seconds, 1)})
        for name in self._recent[-1] if self._recent else ():
            label = name if name == "gradient_norm" else f"loss/{name}"
            self._board.add_scalar(label, float(np.mean([entry[name] for entry in self._recent])), step)
        self._board.add_scalar("learning_rate", rate, step)
        self._board.add_scalar("skipped_steps", skipped, step)

    def validated(self, step: int, measured: Measured, labels: tuple[str, ...]) -> None:
        """Note a validation."""
        self._line({"step": step, f"validation_{measured.name}": round(measured.metric, 4)})
        self._board.add_scalar(f"validation/{measured.name}", measured.metric, step)
        for label, value in zip(labels, measured.of_outputs, strict=True):
            if np.isfinite(value) and len(labels) > 1:
                self._board.add_scalar(f"validation/{label}", value, step)
        if measured.picture is not None:
            self._board.add_image("validation/truth green, prediction red", measured.picture, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        self._board.close()

    def _line(self, entries: Mapping[str, float]) -> None:
        self._log.write(json.dumps(entries) + "\n")
        self._log.flush()
        self._board.flush()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut by a kill
        return float("inf")
