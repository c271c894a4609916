"""A worker process for the engine's tests: URL FOLDER JOURNAL BEHAVIOUR. Its analyse work does nothing but what BEHAVIOUR says."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from pathlib import Path

from dicomnode import engine
from dicomnode.config import EngineSection
from dicomnode.engine import EngineClient, Queue, Worker
from storage import open_storage
from storage.errors import Unavailable


def main(url: str, folder: str, journal: str, behaviour: str) -> None:
    storage = open_storage(url, Path(folder))
    client = EngineClient(url)

    def work(key: str, attempt: int) -> float | None:
        storage.jobs.start(key)
        with Path(journal).open("a", encoding="utf-8") as stream:
            stream.write(key + "\n")
        if behaviour == "record":  # what an analysis is given
            job = storage.jobs.job(key)
            assert job is not None
            given = [instance.sop_instance_uid for instance in storage.index.instances(job.study_instance_uid, job.revision)]
            with Path(journal + ".given").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([key, given]) + "\n")
        if behaviour == "hang":
            time.sleep(600)
        if behaviour == "raise":
            raise ZeroDivisionError
        if behaviour == "database-away" and attempt == 0:
            raise Unavailable("the database is away")
        if behaviour == "third-time" and attempt < 2:
            return 0.2
        storage.jobs.finish(key, "done")
        return None

    engine.AWAY_SECONDS = 0.5
    settings = EngineSection(lease_seconds=1.5, poll_seconds=0.1)
    worker = Worker(settings, storage, client, database_url=url, queues=(Queue(kind="analyse", work=work, concurrency=1),))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    worker.start()
    stop.wait()
    worker.stop(1)
    client.close()
    storage.database.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
