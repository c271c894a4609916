"""The node's durable memory: DICOM objects on disk and everything known about them in one database.

Imports nothing of dicomnode, and is the only importer of SQLAlchemy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from storage.backlogs import Backlogs
from storage.commitments import Commitments
from storage.counters import Counters
from storage.database import Database
from storage.errors import StorageError
from storage.fetched import Fetched
from storage.folders import make_folder, sync_folder
from storage.index import Index
from storage.intake import Intake
from storage.jobs import Jobs
from storage.leases import Leases
from storage.notices import Notices
from storage.objects import ObjectStore
from storage.query import Query
from storage.registry import Registry
from storage.requests import CommitmentRequests
from storage.retention import Retention
from storage.subscriptions import Subscriptions
from storage.upgrade import is_current, upgrade
from storage.workitems import WorkItems


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Everything that storage offers, over one database and one folder."""

    database: Database
    objects: ObjectStore
    index: Index
    intake: Intake
    query: Query
    fetched: Fetched
    registry: Registry
    jobs: Jobs
    workitems: WorkItems
    subscriptions: Subscriptions
    backlogs: Backlogs
    commitments: Commitments
    requests: CommitmentRequests
    leases: Leases
    counters: Counters
    retention: Retention
    notices: Notices


def prepare_storage(database_url: str, folder: Path) -> None:
    """Make the folders and the tables, or bring them up to date. Safe to repeat, and from several processes at once.

    Raises:
        StorageError: the folder or the database cannot be used; or another version of the program is ahead of this one.
    """
    database = Database(database_url)
    try:
        folders = [folder, folder / "objects", folder / "objects" / "incoming", folder / "packages"]
        if database.file is not None:
            folders.append(database.file.absolute().parent)
        for path in folders:
            make_folder(path)
        upgrade(database)
        if database.file is not None:
            sync_folder(database.file.absolute().parent)
    except OSError as error:
        raise StorageError(f"{error.filename} cannot be made: {error.strerror}") from error
    finally:
        database.close()


def open_storage(database_url: str, folder: Path, *, reserve_bytes: int = 0, resume_bytes: int = 0) -> Storage:
    """Open what `prepare_storage` made.

    `reserve_bytes` of the disk stay free: below that nothing more is taken in until `resume_bytes` are, 0 for a tenth more.

    Raises:
        StorageError: the folder is absent, or the database is absent or of another version of the program.
    """
    database = Database(database_url)
    is_there = (folder / "objects" / "incoming").is_dir() and (database.file is None or database.file.is_file())
    try:
        if not is_there or not is_current(database):
            raise StorageError("the database is not at this program's revision: it has to be prepared first")
    except StorageError:
        database.close()
        raise
    objects, index = ObjectStore(folder / "objects", reserve_bytes=reserve_bytes, resume_bytes=resume_bytes), Index(database)
    return Storage(
        database=database,
        objects=objects,
        index=index,
        intake=Intake(objects, index),
        query=Query(database),
        fetched=Fetched(database),
        registry=Registry(database, folder / "packages"),
        jobs=Jobs(database),
        workitems=WorkItems(database),
        subscriptions=Subscriptions(database),
        backlogs=Backlogs(database),
        commitments=Commitments(database),
        requests=CommitmentRequests(database),
        leases=Leases(database),
        counters=Counters(database),
        retention=Retention(database, objects),
        notices=Notices(database),
    )
