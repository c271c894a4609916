"""Which studies this node has asked a peer for, to compare another one with them: what comes so starts no analysis by itself."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import select, update

from storage.database import Database
from storage.schema import FETCHED


class Fetched:
    """The table fetched. Any number of threads and processes may use it."""

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
