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
    "jobs created, not committed": Point(owner="dicomnode.completion", name="create_analyses", when="after"),
    "revision committed": Point(owner="dicomnode.completion", name="_close", when="after"),
    # analysis
    "analysis begun": Point(owner="storage.jobs:Jobs", name="start", when="after"),
    "volume read": Point(owner="dicomnode.pipeline", name="read_volume", when="after"),
    "findings made": Point(owner="dicomnode.pipeline", name="_encoded", when="before"),
    "results proven, not stored": Point(owner="dicomnode.pipeline", name="prove", when="after"),
    "first result stored, no row": Point(owner="dicomnode.pipeline", name="_result", when="after"),
    "results and deliveries not committed": Point(owner="dicomnode.pipeline:Analyser", name="_create_delivery", when="after"),
    "results committed": Point(owner="dicomnode.pipeline:Analyser", name="_keep", when="after"),
    # delivery
    "delivery begun": Point(owner="storage.jobs:Jobs", name="start", when="after", call=2),
    "first result sent, nothing recorded": Point(owner="storage.jobs:Jobs", name="record_delivery", when="before"),
    "one of two results recorded": Point(owner="storage.jobs:Jobs", name="record_delivery", when="after"),
    "both recorded, job not done": Point(owner="storage.jobs:Jobs", name="record_delivery", when="after", call=2),
}

# Of a package that starts on the first series, whose result stands when the study closes.
FIRST_SERIES_POINTS = {
    "first series begun, not committed": Point(owner="storage.index:Index", name="begin_revision", when="after"),
    "its job created, not committed": Point(owner="dicomnode.completion", name="create_analyses", when="after"),
    "its inputs chosen": Point(owner="dicomnode.pipeline", name="standing", when="before"),
    "results stand, not committed": Point(owner="dicomnode.pipeline", name="detail_of", when="after"),
    "carried over": Point(owner="dicomnode.pipeline:Analyser", name="_keep", when="after", call=2),
}

# Of an association that sends three images, counted from its request on. A response is sent by Wire.send, as the acceptance is.
RECEPTION_POINTS = {
    "association accepted": Point(owner="dicomnode.dimse.wire:Wire", name="send", when="after"),
    "file created": Point(owner="storage.objects:ObjectStore", name="create", when="after", call=2),
    "file half written": Point(owner="storage.incoming:Incoming", name="write", when="after", call=2),
    "file written, not synced": Point(owner="storage.incoming:Incoming", name="sync", when="before", call=2),
    "file synced, not renamed": Point(owner="storage.incoming:Incoming", name="rename", when="before", call=2),
    "file renamed, folder not synced": Point(owner="storage.incoming:Incoming", name="rename", when="after", call=2),
    "folder synced, no row": Point(owner="storage.objects:ObjectStore", name="keep", when="after", call=2),
    "row inserted, not committed": Point(owner="storage.arriving:Arriving", name="add", when="after", call=2),
    "row committed, no response": Point(owner="storage.index:Index", name="add_instances", when="after", call=2),
    "response not sent": Point(owner="dicomnode.dimse.wire:Wire", name="send", when="before", call=3),
    "response sent": Point(owner="dicomnode.dimse.wire:Wire", name="send", when="after", call=3),
}
# Where the test stops sending and kills the receiver itself.
RECEPTION_CUTS = ("amid the command set", "amid the data set", "at any moment")


def run_node(settings: Any, point: str | None, up: Any) -> None:
    """The child's main: run the node, with its stub model, that the fork server has imported. The test's own process never does."""
    assert "crash_node" in sys.modules, "the fork server didn't find the node: each child would import it anew"
    import crash_node

    crash_node.run_node(settings, point, up)
