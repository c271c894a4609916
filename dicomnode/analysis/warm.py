"""Networks that stay loaded between studies, under a budget of memory: the one used least recently leaves first.

One of them computes at a time, so that a device is never asked for two studies' memory by two threads. Must never import torch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, kw_only=True)
class _Entry(Generic[Loaded]):
    model: Loaded
    memory_bytes: int


class WarmModels(Generic[Loaded]):
    """Models by their digest. The one in use always stays, however large it is."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._entries: OrderedDict[str, _Entry[Loaded]] = OrderedDict()  # the one used last stands last
        self._device = threading.RLock()  # the same thread may use another model in between: a study that lets an urgent one pass

    @contextmanager
    def using(self, key: str, load: Callable[[], Loaded], *, expected_bytes: int = 0) -> Iterator[Loaded]:
        """Give the model `key` for the length of the block, loaded by `load` if it isn't warm; `expected_bytes` make room before.

        What a model takes is its `memory_bytes`, or what was expected if it doesn't say.
        """
        with self._device:
            if key not in self._entries:
                self._make_room(expected_bytes)  # before: the old and the new one together may be too much
                model = load()
                self._entries[key] = _Entry(model=model, memory_bytes=int(getattr(model, "memory_bytes", expected_bytes)))
            entry = self._entries[key]
            self._entries.move_to_end(key)
            self._make_room(0, keep=key)
            yield entry.model

    @property
    def warm(self) -> tuple[str, ...]:
        """The keys of the models that are loaded, the one used least recently first."""
        return tuple(self._entries)

    def _make_room(self, wanted_bytes: int, keep: str | None = None) -> None:
        while self._entries and wanted_bytes + sum(entry.memory_bytes for entry in self._entries.values()) > self._budget:
            oldest = next(iter(self._entries))
            if oldest == keep:
                return
            del self._entries[oldest]
