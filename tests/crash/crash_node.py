"""A whole node in one process that kills itself at a named point: the child of the crash test.

Receiver, completion, analyser and sender run as threads of one process, so that SIGKILL takes all of them at once. The model
is a stub that marks what is brighter than a threshold: nothing here loads torch or MONAI.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable
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
stub.load_model = lambda _folder, **_: lambda volumes, *_between: stub_findings(next(iter(volumes.values())))  # type: ignore[attr-defined]  # likewise
sys.modules["dicomnode.analysis.inference"] = stub

from crash_points import FIRST_SERIES_POINTS, POINTS, Point  # noqa: E402

import dicomnode.backlog  # noqa: E402  after the stub has taken inference's place
import dicomnode.completion  # noqa: E402
import dicomnode.delivery  # noqa: E402
import dicomnode.pipeline  # noqa: E402
import dicomnode.receiver  # noqa: E402
from dicomnode.config import Settings  # noqa: E402
from dicomnode.engine import EngineClient, Queue, Worker  # noqa: E402
from storage import open_storage  # noqa: E402


def run_node(settings: Settings, point: str | None, up: Any) -> None:
    """Run the node until it is killed, dying by itself at `point`; `up` is set (a multiprocessing event) when it listens."""
    store = open_storage(settings.database_url, settings.data_folder)
    client = EngineClient(settings.database_url)
    backlogs = dicomnode.backlog.Backlogs(settings, store, client)
    queues = (
        Queue(kind="analyse", work=dicomnode.pipeline.Analyser(settings, store, client).analyse, concurrency=1),
        Queue(kind="deliver", work=dicomnode.delivery.Sender(settings, store, client).deliver, concurrency=1),
        Queue(kind="resume", work=lambda key, _: backlogs.work_off(worker.do_now, key), concurrency=1, rows=store.backlogs),
    )
    receiver = dicomnode.receiver.Receiver(settings, store)
    worker = Worker(settings.engine, store, client, database_url=settings.database_url, queues=queues)
    if point is not None:
        die_at({**POINTS, **FIRST_SERIES_POINTS}[point])
    worker.start()
    dicomnode.completion.Completion(store, client, settings.engine).start()
    receiver.start()
    up.set()
    threading.Event().wait()


def die_at(point: Point) -> None:
    """Replace the point's function by one that ends this process with SIGKILL at the named call."""
    module, _, name = point.owner.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, name) if name else owner
    original = getattr(owner, point.name)
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

    setattr(owner, point.name, dying)
