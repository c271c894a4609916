"""Who is told of which work items (PS3.4 CC.2.3): one, all of them, or those that match.

A subscription outlives the connection on which reports are sent: `told_until` says up to when its subscriber has been told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, Final

from sqlalchemy import delete, func, select, update

from storage.database import Database
from storage.records import Subscription
from storage.schema import SUBSCRIPTION

GLOBAL: Final = "1.2.840.10008.5.1.4.34.5"  # PS3.4 CC.2.3.1: every work item
FILTERED: Final = "1.2.840.10008.5.1.4.34.5.1"  # those that match


class Subscriptions:
    """The table subscription. Any number of threads and processes may use it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, ae_title: str, target: str, keys: Mapping[str, str] | None = None) -> None:
        """Subscribe to a work item, to all, or to those that match `keys`; the last subscription to the same counts."""
        with self._database.writing() as connection:
            now = self._database.now(connection)
            values: dict[str, Any] = {"keys": dict(keys or {}), "wanted": True, "created_at": now, "suspended_at": None, "told_until": None}
            key = {"ae_title": ae_title, "target": target}
            if self._database.insert_new(connection, SUBSCRIPTION, key | values) is None:
                connection.execute(update(SUBSCRIPTION).where(*_of(ae_title, target)).values(values))

    def remove(self, ae_title: str, target: str) -> None:
        """Tell a subscriber of a work item no more, whatever else it has subscribed to; of all, it loses every subscription."""
        with self._database.writing() as connection:
            if target == GLOBAL:
                connection.execute(delete(SUBSCRIPTION).where(SUBSCRIPTION.c.ae_title == ae_title))
                return
            connection.execute(delete(SUBSCRIPTION).where(*_of(ae_title, target)))
            of_many = (SUBSCRIPTION.c.ae_title == ae_title, SUBSCRIPTION.c.target.in_((GLOBAL, FILTERED)))
            if target != FILTERED and connection.execute(select(func.count()).where(*of_many)).scalar_one():
                values = {"keys": {}, "wanted": False, "created_at": self._database.now(connection)}
                self._database.insert_new(connection, SUBSCRIPTION, {"ae_title": ae_title, "target": target, **values})

    def suspend(self, ae_title: str, target: str) -> bool:
        """Tell of no work item that is created from now on by a subscription to many; False if there is none."""
        with self._database.writing() as connection:
            values = {"suspended_at": self._database.now(connection)}
            return bool(connection.execute(update(SUBSCRIPTION).where(*_of(ae_title, target)).values(values)).rowcount)

    def of(self, ae_title: str) -> list[Subscription]:
        """Return the subscriptions of an AE title."""
        statement = select(SUBSCRIPTION).where(SUBSCRIPTION.c.ae_title == ae_title).order_by(SUBSCRIPTION.c.target)
        with self._database.reading() as connection:
            return [
                Subscription(
                    target=row["target"],
                    keys=row["keys"],
                    wanted=row["wanted"],
                    created_at=row["created_at"],
                    suspended_at=row["suspended_at"],
                    told_until=row["told_until"],
                )
                for row in connection.execute(statement).mappings()
            ]

    def note_told(self, ae_title: str, targets: Collection[str], until: datetime) -> None:
        """Note that a subscriber was told of everything up to a time of the database's clock, by some of its subscriptions."""
        with self._database.writing() as connection:
            told = (SUBSCRIPTION.c.ae_title == ae_title, SUBSCRIPTION.c.target.in_(targets), SUBSCRIPTION.c.created_at <= until)
            connection.execute(update(SUBSCRIPTION).where(*told).values(told_until=until))

    def now(self) -> datetime:
        """Return the time on the clock that subscriptions and work items go by."""
        with self._database.reading() as connection:
            return self._database.now(connection)


def _of(ae_title: str, target: str) -> tuple[Any, Any]:
    return SUBSCRIPTION.c.ae_title == ae_title, SUBSCRIPTION.c.target == target
