"""A worker process that does all of an analysis but the analysis: URL FOLDER JOURNAL. It writes down what each job was given and chose.

Which series are chosen, and whether the results of a former revision stand, is the node's own doing; the result is a file of one byte.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

stub = types.ModuleType("dicomnode.analysis.inference")  # nothing here loads torch
stub.Model = Callable  # type: ignore[attr-defined]  # a module made by hand
stub.load_model = None  # type: ignore[attr-defined]  # likewise
sys.modules["dicomnode.analysis.inference"] = stub

from dicomnode.analysis.manifest import Manifest  # noqa: E402
from dicomnode.analysis.select import Selection  # noqa: E402
from dicomnode.config import EngineSection, Settings  # noqa: E402
from dicomnode.engine import EngineClient, Queue, Worker  # noqa: E402
from dicomnode.findings import ResultObject  # noqa: E402
from dicomnode.pipeline import Analyser, Outcome  # noqa: E402
from dicomnode.prefetch import Prefetched  # noqa: E402
from dicomnode.priors import PRIOR, identity_of  # noqa: E402
from dicomnode.results.identity import object_uid  # noqa: E402
from dicomnode.results.profile import OWN, Part, parts  # noqa: E402
from storage import open_storage  # noqa: E402
from storage.records import Instance, Job  # noqa: E402

REPORT, EXPLICIT = "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.1.2.1"


class Recorder(Analyser):
    """An analyser whose package finds nothing, and says so in a report that is none."""

    def __init__(self, journal: Path, *rest: Any) -> None:
        super().__init__(*rest)
        self._journal = journal

    def _write(self, what: str, key: str, uids: list[str]) -> None:
        with self._journal.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([what, key, uids]) + "\n")

    def _outcome(self, job: Job, instances: Sequence[Instance], given: Mapping[str, Sequence[Part]]) -> Outcome:
        outcome = super()._outcome(job, instances, given)
        self._write("given", job.key, [instance.sop_instance_uid for instance in instances])
        return outcome

    def _computed(self, job: Job, _manifest: Manifest, selection: Selection, _read: Prefetched, _wanted: frozenset[Part]) -> Outcome:
        self._write("computed", job.key, [str(header.SOPInstanceUID) for series in selection.series for header in series.headers])
        self._storage.jobs.remember(job.key, PRIOR, {"reason": "nothing is compared here"})
        uid = object_uid(identity_of(job), REPORT, EXPLICIT)
        report = ResultObject(
            sop_instance_uid=uid, sop_class_uid=REPORT, transfer_syntax_uid=EXPLICIT, series_instance_uid=f"{uid}.1", modality="SR",
            parts=(b"0",),
        )  # fmt: skip
        return Outcome(state="done", reason_code=None, reason=None, objects={parts(OWN)[-1]: (report,)}, detail={})


def main(url: str, folder: str, journal: str) -> None:
    storage = open_storage(url, Path(folder))
    client = EngineClient(url)
    recorder = Recorder(Path(journal), Settings(), storage, client)
    settings = EngineSection(lease_seconds=5, poll_seconds=0.1)
    worker = Worker(
        settings, storage, client, database_url=url, queues=(Queue(kind="analyse", work=recorder.analyse, concurrency=1),)
    )  # fmt: skip
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    worker.start()
    stop.wait()
    worker.stop(1)
    client.close()
    storage.database.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
