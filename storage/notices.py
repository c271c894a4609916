"""What modalities and archives announce about studies: performed procedure steps (MPPS) and available instances (IAN).

Evidence of what must be there, and nothing more: an announcement makes no study and no revision. Must never change a step that has
ended, nor one that another AE title made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Row, delete, func, select, update

from storage.database import Database
from storage.records import Notice, NoticeKind, NoticeState
from storage.schema import NOTICE, STUDY

KEPT = timedelta(days=30)  # after its last change: no study is waited for that long

Change = Literal["changed", "unknown", "ended", "of another"]


class Notices:
    """The table notice. Any number of threads and processes may use it."""

    def __init__(self, database: Database):
        self._database = database

    def create(
        self,
        sop_instance_uid: str,
        *,
        kind: NoticeKind,
        ae_title: str,
        state: NoticeState,
        studies: Collection[str],
        images: Mapping[str, Sequence[str]],
    ) -> bool:
        """Add an announcement, for each study that it names; False, and nothing changed, if there is one with this UID.

        `images` are those that it names, by Series Instance UID. What has not changed for a month is forgotten meanwhile.
        """
        with self._database.writing() as connection:
            self._database.lock(connection, f"notice {sop_instance_uid}")
            same = NOTICE.c.sop_instance_uid == sop_instance_uid
            if connection.execute(select(NOTICE.c.sop_instance_uid).where(same).limit(1)).one_or_none() is not None:
                return False
            now = self._database.now(connection)
            connection.execute(delete(NOTICE).where(NOTICE.c.changed_at < now - KEPT))
            for study in sorted(set(studies)):
                values: dict[str, Any] = {"sop_instance_uid": sop_instance_uid, "study_instance_uid": study, "kind": kind, "state": state}
                values |= {"ae_title": ae_title, "images": _plain(images), "created_at": now, "changed_at": now}
                connection.execute(NOTICE.insert().values(**values))
            return True

    def change(
        self, sop_instance_uid: str, *, ae_title: str, state: NoticeState | None, images: Mapping[str, Sequence[str]] | None
    ) -> Change:
        """Change a performed procedure step that is in progress; None leaves state or images as they are."""
        with self._database.writing() as connection:
            self._database.lock(connection, f"notice {sop_instance_uid}")
            this = (NOTICE.c.sop_instance_uid == sop_instance_uid) & (NOTICE.c.kind == "mpps")
            rows = connection.execute(select(NOTICE.c.state, NOTICE.c.ae_title).where(this)).all()
            if not rows:
                return "unknown"
            if rows[0].ae_title != ae_title:
                return "of another"
            if rows[0].state != "in progress":
                return "ended"
            values: dict[str, Any] = {"changed_at": self._database.now(connection)}
            values |= {"state": state} if state is not None else {}
            values |= {"images": _plain(images)} if images is not None else {}
            connection.execute(update(NOTICE).where(this).values(**values))
            return "changed"

    def step(self, sop_instance_uid: str) -> Notice | None:
        """Return a performed procedure step, as one of its studies has it."""
        this = (NOTICE.c.sop_instance_uid == sop_instance_uid) & (NOTICE.c.kind == "mpps")
        with self._database.reading() as connection:
            row = connection.execute(select(NOTICE).where(this).order_by(NOTICE.c.study_instance_uid).limit(1)).one_or_none()
        return _notice(row) if row else None

    def of_study(self, study_instance_uid: str) -> list[Notice]:
        """Return what was announced of a study, oldest first."""
        statement = select(NOTICE).where(NOTICE.c.study_instance_uid == study_instance_uid)
        with self._database.reading() as connection:
            return [_notice(row) for row in connection.execute(statement.order_by(NOTICE.c.created_at, NOTICE.c.sop_instance_uid))]

    def last_changes(self) -> dict[str, datetime]:
        """Return when what was announced of each study that is being received changed last; of most nothing is announced."""
        statement = (
            select(NOTICE.c.study_instance_uid, func.max(NOTICE.c.changed_at))
            .join_from(NOTICE, STUDY, NOTICE.c.study_instance_uid == STUDY.c.study_instance_uid)
            .where(STUDY.c.last_image > STUDY.c.closed_image)
            .group_by(NOTICE.c.study_instance_uid)
        )
        with self._database.reading() as connection:
            return dict(connection.execute(statement).all())


def _plain(images: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {series: list(uids) for series, uids in images.items()}


def _notice(row: Row[Any]) -> Notice:
    return Notice(
        sop_instance_uid=row.sop_instance_uid,
        study_instance_uid=row.study_instance_uid,
        kind=row.kind,
        ae_title=row.ae_title,
        state=row.state,
        images={series: tuple(uids) for series, uids in row.images.items()},
        created_at=row.created_at,
        changed_at=row.changed_at,
    )
