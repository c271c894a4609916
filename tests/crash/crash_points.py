"""Where the crash test kills the node, by name. Imports nothing of the node: the child alone does (crash_node)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Point:
    """Die before or after the n-th call of a function."""

    owner: str  # module, or module:class
    name: str
    when: str  # "before" or "after"
    call: int = 1


POINTS = {
    # reception
    "file written, not synced": Point(owner="storage.incoming:Incoming", name="sync", when="before"),
    "file synced, not renamed": Point(owner="storage.incoming:Incoming", name="rename", when="before"),
    "file renamed, folder not synced": Point(owner="storage.incoming:Incoming", name="rename", when="after"),
    "third file stored, no row": Point(owner="storage.index:Index", name="add_instances", when="before", call=3),
    "row committed, no response": Point(owner="storage.intake:Intake", name="add", when="after"),
    "last row committed, no response": Point(owner="storage.intake:Intake", name="add", when="after", call=8),
    # closing
    "revision closed, not committed": Point(owner="storage.index:Index", name="close_revision", when="after"),
    "jobs created, not committed": Point(owner="dicomnode.completion", name="_create_jobs", when="after"),
    "revision committed": Point(owner="dicomnode.completion", name="_close", when="after"),
    # analysis
    "analysis begun": Point(owner="storage.jobs:Jobs", name="start", when="after"),
    "volume read": Point(owner="dicomnode.pipeline", name="read_volume", when="after"),
    "findings made": Point(owner="dicomnode.pipeline", name="encode_segmentation", when="before"),
    "results proven, not stored": Point(owner="dicomnode.pipeline", name="prove", when="after"),
    "first result stored, no row": Point(owner="dicomnode.pipeline", name="_result", when="after"),
    "results and deliveries not committed": Point(owner="dicomnode.pipeline:Analyser", name="_create_delivery", when="after"),
    "results committed": Point(owner="dicomnode.pipeline:Analyser", name="_keep", when="after"),
    # delivery
    "delivery begun": Point(owner="storage.jobs:Jobs", name="start", when="after", call=2),
    "results sent, nothing recorded": Point(owner="dicomnode.delivery", name="send", when="after"),
    "one of two results recorded": Point(owner="storage.jobs:Jobs", name="record_delivery", when="after"),
    "both recorded, job not done": Point(owner="storage.jobs:Jobs", name="record_delivery", when="after", call=2),
}


def run_node(settings: Any, point: str | None, up: Any) -> None:
    """The child's main: run the node, with its stub model, that the fork server has imported. The test's own process never does."""
    assert "crash_node" in sys.modules, "the fork server didn't find the node: each child would import it anew"
    import crash_node

    crash_node.run_node(settings, point, up)
