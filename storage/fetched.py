"""What this node has asked peers for: earlier studies to compare others with, and images that did not come.

Studies that came to be compared with start no analysis by themselves; images that did not come are asked for a few times and no more.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Row, select, update

from storage.database import Database
from storage.records import MissingImages
from storage.schema import FETCHED, MISSING


class Fetched:
    """The tables fetched and missing. Any number of threads and processes may use them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, study_instance_uid: str, peer: str, for_study: str) -> None:
        """Note, before it is asked for, that a study will come from a peer; the last one asked counts."""
        with self._database.writing() as connection:
            values = {"peer": peer, "for_study": for_study, "asked_at": self._database.now(connection)}
            if self._database.insert_new(connection, FETCHED, {"study_instance_uid": study_instance_uid, **values}) is None:
                connection.execute(update(FETCHED).where(FETCHED.c.study_instance_uid == study_instance_uid).values(**values))

    def peer_of(self, study_instance_uid: str) -> str | None:
        """Return whom a study was asked of, None if it wasn't."""
        with self._database.reading() as connection:
            return connection.execute(select(FETCHED.c.peer).where(FETCHED.c.study_instance_uid == study_instance_uid)).scalar_one_or_none()

    def is_mere_prior(self, study_instance_uid: str, callers: Collection[tuple[str, str]]) -> bool:
        """Whether all images of a study came from the peer that was asked for it; `callers` are the (calling, called) AE titles."""
        peer = self.peer_of(study_instance_uid)
        return peer is not None and all(calling == peer for calling, _ in callers)

    def begin_missing(self, study_instance_uid: str, peer: str, *, revision: int, instances: int, sent_before: bool) -> MissingImages:
        """Note, before they are asked for, that so many images of the revision to be are asked of a peer, and count the try.

        `sent_before`, whether images had come from the peer, holds as it was when the peer was asked first.
        """
        mine = (MISSING.c.study_instance_uid == study_instance_uid) & (MISSING.c.peer == peer)
        with self._database.writing() as connection:
            known = connection.execute(select(MISSING).where(mine)).one_or_none()
            same = known is not None and known.revision == revision
            values = {
                "revision": revision,
                "tries": known.tries + 1 if known is not None and same else 1,
                "instances": instances,
                "arrived": known.arrived if known is not None and same else 0,
                "reason": "the node stopped meanwhile",
                "asked_at": self._database.now(connection),
            }
            if known is not None:
                connection.execute(update(MISSING).where(mine).values(**values))
            else:
                new = {"study_instance_uid": study_instance_uid, "peer": peer, "sent_before": sent_before, **values}
                self._database.insert_new(connection, MISSING, new)
            return _missing(connection.execute(select(MISSING).where(mine)).one())

    def end_missing(self, study_instance_uid: str, peer: str, *, arrived: int, reason: str | None) -> None:
        """Note how a try ended: so many of its images arrived, and why not all."""
        mine = (MISSING.c.study_instance_uid == study_instance_uid) & (MISSING.c.peer == peer)
        with self._database.writing() as connection:
            connection.execute(update(MISSING).where(mine).values(arrived=MISSING.c.arrived + arrived, reason=reason))

    def missing(self, study_instance_uid: str, *, revision: int) -> tuple[MissingImages, ...]:
        """Return what peers were asked for, for a revision, by the peer's AE title."""
        mine = (MISSING.c.study_instance_uid == study_instance_uid) & (MISSING.c.revision == revision)
        with self._database.reading() as connection:
            return tuple(_missing(row) for row in connection.execute(select(MISSING).where(mine).order_by(MISSING.c.peer)))


def _missing(row: Row[Any]) -> MissingImages:
    return MissingImages(
        peer=row.peer, tries=row.tries, instances=row.instances, arrived=row.arrived, reason=row.reason, asked_at=row.asked_at
    )  # fmt: skip
