"""A whole node in one process that kills itself at a named point: the child of the crash test.

Receiver, completion, analyser and sender run as threads of one process, so that SIGKILL takes all of them at once. The model
is a stub that marks what is brighter than a threshold: nothing here loads torch or MONAI.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from dicomnode.analysis.components import long_axis_of
from dicomnode.findings import Code, Finding, Findings, Measurement, Segment, Volume

THRESHOLD_HU = 0.0


def stub_findings(volume: Volume) -> Findings:
    """One finding: everything brighter than the threshold."""
    mask = volume.voxels > THRESHOLD_HU
    (box,) = ndimage.find_objects(mask.astype(np.int8))
    segment = Segment(mask=mask[box], origin=(box[0].start, box[1].start, box[2].start))
    axis = long_axis_of(segment, volume)
    centre = volume.to_lps(np.argwhere(mask).mean(axis=0))
    millilitre = Code(value="ml", scheme="UCUM", meaning="milliliter")
    millimetre = Code(value="mm", scheme="UCUM", meaning="millimeter")
    finding = Finding(
        number=1,
        label="Bright thing",
        probability=0.9,
        category=Code(value="49755003", scheme="SCT", meaning="Morphologically Abnormal Structure"),
        type=Code(value="27925004", scheme="SCT", meaning="Nodule"),
        site=Code(value="39607008", scheme="SCT", meaning="Lung"),
        side=None,
        centre_lps_mm=(float(centre[0]), float(centre[1]), float(centre[2])),
        segment=segment,
        long_axis=axis,
        measurements=(
            Measurement(
                name=Code(value="118565006", scheme="SCT", meaning="Volume"), value=segment.voxel_count * volume.voxel_ml, unit=millilitre
            ),
            Measurement(name=Code(value="103339001", scheme="SCT", meaning="Long Axis"), value=axis.length_mm, unit=millimetre),
        ),
        colour_cielab=(60.0, 50.0, 40.0),
    )
    return Findings(
        package="stub", version="1", digest="d" * 64, algorithm_name="stub", manufacturer="dicomnode",
        series_instance_uid=volume.series_instance_uid, findings=(finding,), device="stub",
    )  # fmt: skip


stub = types.ModuleType("dicomnode.analysis.inference")
stub.Model = Callable  # type: ignore[attr-defined]  # a module made by hand
stub.load_model = lambda _folder, **_: stub_findings  # type: ignore[attr-defined]  # likewise
sys.modules["dicomnode.analysis.inference"] = stub

import dicomnode.completion  # noqa: E402  after the stub has taken inference's place
import dicomnode.delivery  # noqa: E402
import dicomnode.pipeline  # noqa: E402
import dicomnode.receiver  # noqa: E402
import storage.index  # noqa: E402
import storage.jobs  # noqa: E402
import storage.objects  # noqa: E402
from dicomnode.config import Settings  # noqa: E402
from dicomnode.engine import EngineClient, Queue, Worker, prepare_engine  # noqa: E402
from storage import open_storage, prepare_storage  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Point:
    """Die before or after the n-th call of a function, once the node is up."""

    owner: Any
    name: str
    when: str  # "before" or "after"
    call: int = 1


POINTS = {
    # reception
    "file written, not synced": Point(owner=storage.objects.os, name="fsync", when="before"),
    "file synced, not renamed": Point(owner=storage.objects.Path, name="rename", when="before"),
    "file renamed, folder not synced": Point(owner=storage.objects.Path, name="rename", when="after"),
    "third file stored, no row": Point(owner=dicomnode.receiver.Receiver, name="_index", when="before", call=3),
    "row committed, no response": Point(owner=dicomnode.receiver.Receiver, name="_index", when="after"),
    "last row committed, no response": Point(owner=dicomnode.receiver.Receiver, name="_index", when="after", call=8),
    # closing
    "revision closed, not committed": Point(owner=storage.index.Index, name="close_revision", when="after"),
    "jobs created, not committed": Point(owner=dicomnode.completion, name="_create_jobs", when="after"),
    "revision committed": Point(owner=dicomnode.completion, name="_close", when="after"),
    # analysis
    "analysis begun": Point(owner=storage.jobs.Jobs, name="start", when="after"),
    "volume read": Point(owner=dicomnode.pipeline, name="read_volume", when="after"),
    "findings made": Point(owner=dicomnode.pipeline, name="encode_segmentation", when="before"),
    "results proven, not stored": Point(owner=dicomnode.pipeline, name="prove", when="after"),
    "first result stored, no row": Point(owner=dicomnode.pipeline, name="_result", when="after"),
    "results and deliveries not committed": Point(owner=dicomnode.pipeline.Analyser, name="_create_delivery", when="after"),
    "results committed": Point(owner=dicomnode.pipeline.Analyser, name="_keep", when="after"),
    # delivery
    "delivery begun": Point(owner=storage.jobs.Jobs, name="start", when="after", call=2),
    "results sent, nothing recorded": Point(owner=dicomnode.delivery, name="send", when="after"),
    "one of two results recorded": Point(owner=storage.jobs.Jobs, name="record_delivery", when="after"),
    "both recorded, job not done": Point(owner=storage.jobs.Jobs, name="record_delivery", when="after", call=2),
}


def run_node(settings: Settings, point: str | None, up: Any) -> None:
    """Run the node until it is killed, dying by itself at `point`; `up` is set (a multiprocessing event) when it listens."""
    prepare_storage(settings.database_url, settings.data_folder)
    prepare_engine(settings.database_url)
    store = open_storage(settings.database_url, settings.data_folder)
    client = EngineClient(settings.database_url)
    queues = (
        Queue(kind="analyse", work=dicomnode.pipeline.Analyser(settings, store, client).analyse, concurrency=1),
        Queue(kind="deliver", work=dicomnode.delivery.Sender(settings, store).deliver, concurrency=1),
    )
    receiver = dicomnode.receiver.Receiver(settings, store)
    worker = Worker(settings.engine, store, client, database_url=settings.database_url, queues=queues)
    if point is not None:
        die_at(POINTS[point])
    worker.start()
    dicomnode.completion.Completion(store, client, settings.engine).start()
    receiver.start()
    up.set()
    threading.Event().wait()


def die_at(point: Point) -> None:
    """Replace the point's function by one that ends this process with SIGKILL at the named call."""
    original = getattr(point.owner, point.name)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        mine = calls == point.call
        if mine and point.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(point.owner, point.name, dying)
