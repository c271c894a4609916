"""A receiver in a process that kills itself at a named point once it is told to: the child of the reception crash test.

Imports nothing of the node: the child alone does (crash_node puts a stub in inference's place).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from crash_points import RECEPTION_POINTS


@dataclass(frozen=True)
class Signals:
    """Events between test and child: the child listens, the test wants it dead at the point, the child is ready to die."""

    up: Any
    arm: Any
    armed: Any


def run_receiver(settings: Any, point: str | None, signals: Signals) -> None:
    """Receive, from `arm` on until the point is reached."""
    from crash_node import die_at

    from dicomnode.receiver import Receiver
    from storage import open_storage

    receiver = Receiver(settings, open_storage(settings.database_url, settings.data_folder))
    receiver.start()
    signals.up.set()
    signals.arm.wait()
    if point in RECEPTION_POINTS:
        die_at(RECEPTION_POINTS[point])
    signals.armed.set()
    threading.Event().wait()
