"""What admins change while the node runs: peers, routes and model packages.

Must never be written from an association request or from a package's own files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, delete, select, update

from storage.database import Database
from storage.errors import Conflict, StorageError
from storage.records import PackageRecord, Peer, PriorRule, Quirks, Route
from storage.schema import PACKAGE, PEER, ROUTE, ROUTE_DESTINATION

ANY = "*"  # in a route: every AE title
_PACKAGE_WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

_ONE_PEER = select(PEER).where(PEER.c.ae_title == bindparam("ae_title"))  # asked at each association


class Registry:
    """Peers, routes and packages. Each call sees what was committed last, by whichever process."""

    def __init__(self, database: Database, packages: Path):
        self._database = database
        self._packages = packages

    def peers(self) -> list[Peer]:
        """Return every peer by AE title."""
        with self._database.reading() as connection:
            return [_peer(row) for row in connection.execute(select(PEER).order_by(PEER.c.ae_title))]

    def peer(self, ae_title: str) -> Peer | None:
        """Return the peer with this AE title."""
        with self._database.reading() as connection:
            row = connection.execute(_ONE_PEER, {"ae_title": ae_title}).one_or_none()
        return _peer(row) if row else None

    def add_peer(self, peer: Peer) -> None:
        """Add the peer, or replace the one of its AE title."""
        values = {
            "host": peer.host,
            "port": peer.port,
            "sends": peer.sends,
            "receives": peer.receives,
            "tls": peer.tls,
            "client_cert": peer.client_cert,
            "networks": list(peer.networks),
            "user": peer.user,
            "passcode_hash": peer.passcode_hash,
            "objects": list(peer.objects),
            "commits": peer.commits,
            "seg_per": peer.seg_per,
            "empty_frames": peer.empty_frames,
            "queries": peer.queries,
            "stow_url": peer.stow_url,
            "stow_credentials": peer.stow_credentials,
            "quirks": None if peer.quirks is None else {**asdict(peer.quirks), "probed_at": peer.quirks.probed_at.isoformat()},
            "retrieve_by": peer.retrieve_by,
        }
        with self._database.writing() as connection:
            if self._database.insert_new(connection, PEER, {"ae_title": peer.ae_title, **values}) is None:
                connection.execute(update(PEER).where(PEER.c.ae_title == peer.ae_title).values(**values))

    def remove_peer(self, ae_title: str) -> None:
        """Remove a peer. Raises StorageError if it is unknown, or if a route sends to it, asks it or fetches from it."""
        used = select(ROUTE_DESTINATION.c.route).where(ROUTE_DESTINATION.c.ae_title == ae_title)
        asks = select(ROUTE.c.name).where(ROUTE.c.completeness_peer == ae_title)
        with self._database.writing() as connection:
            routes = sorted(connection.execute(used).scalars())
            if routes:
                raise Conflict(f"route {', '.join(routes)} sends to {ae_title}: change or remove the route first")
            asking = sorted(connection.execute(asks).scalars())
            if asking:
                raise Conflict(f"route {', '.join(asking)} asks {ae_title}: change or remove the route first")
            rules = connection.execute(select(ROUTE.c.name, ROUTE.c.priors).order_by(ROUTE.c.name)).all()
            fetching = [name for name, rule in rules if rule is not None and rule["ae_title"] == ae_title]
            if fetching:
                raise Conflict(f"route {', '.join(fetching)} fetches earlier studies from {ae_title}: change or remove the route first")
            if not connection.execute(delete(PEER).where(PEER.c.ae_title == ae_title)).rowcount:
                raise StorageError(f"there is no peer {ae_title}")

    def routes(self) -> list[Route]:
        """Return every route by name."""
        with self._database.reading() as connection:
            rows = connection.execute(select(ROUTE).order_by(ROUTE.c.name)).all()
            destinations: dict[str, list[str]] = {}
            for row in connection.execute(select(ROUTE_DESTINATION).order_by(ROUTE_DESTINATION.c.position)):
                destinations.setdefault(row.route, []).append(row.ae_title)
        return [_route(row, tuple(destinations.get(row.name, ()))) for row in rows]

    def add_route(self, route: Route) -> None:
        """Add the route, or replace the one of its name. Raises StorageError if one of its destinations is no peer."""
        values = {
            "from_ae_title": route.from_ae_title,
            "called_ae_title": route.called_ae_title,
            "package": route.package,
            "version": route.version,
            "priority": route.priority,
            "quiet_seconds": route.quiet_seconds,
            "report_refusals": route.report_refusals,
            "priors": None if route.priors is None else asdict(route.priors),
            "objects": None if route.objects is None else list(route.objects),
            "early": route.early,
            "longest_wait_seconds": route.longest_wait_seconds,
            "completeness_peer": route.completeness_peer,
            "first_series_seconds": route.first_series_seconds,
            "fetch_missing": route.fetch_missing,
        }
        with self._database.writing() as connection:
            peers = set(connection.execute(select(PEER.c.ae_title)).scalars())
            unknown = [ae_title for ae_title in route.to_ae_titles if ae_title not in peers]
            if unknown:
                raise Conflict(f"route {route.name} sends to {', '.join(unknown)}, which is no peer")
            if route.completeness_peer is not None and route.completeness_peer not in peers:
                raise Conflict(f"route {route.name} asks {route.completeness_peer}, which is no peer")
            if route.priors is not None and route.priors.ae_title not in peers:
                raise Conflict(f"route {route.name} fetches from {route.priors.ae_title}, which is no peer")
            if self._database.insert_new(connection, ROUTE, {"name": route.name, **values}) is None:
                connection.execute(update(ROUTE).where(ROUTE.c.name == route.name).values(**values))
                connection.execute(delete(ROUTE_DESTINATION).where(ROUTE_DESTINATION.c.route == route.name))
            for position, ae_title in enumerate(dict.fromkeys(route.to_ae_titles)):
                connection.execute(ROUTE_DESTINATION.insert().values(route=route.name, position=position, ae_title=ae_title))

    def remove_route(self, name: str) -> None:
        """Remove a route. Raises StorageError if it is unknown."""
        with self._database.writing() as connection:
            if not connection.execute(delete(ROUTE).where(ROUTE.c.name == name)).rowcount:
                raise StorageError(f"there is no route {name}")

    def matching(self, callers: Collection[tuple[str, str]]) -> list[Route]:
        """Return the routes, by name, that take a study sent as one of these (calling, called) pairs of AE titles."""
        return matching(self.routes(), callers)

    def packages(self) -> list[PackageRecord]:
        """Return every version of every package, by name and age."""
        with self._database.reading() as connection:
            return [_package(row) for row in connection.execute(select(PACKAGE).order_by(PACKAGE.c.name, PACKAGE.c.id))]

    def package(self, name: str, version: str | None = None) -> PackageRecord | None:
        """Return one version; without `version` the enabled one, else the one added last."""
        statement = select(PACKAGE).where(PACKAGE.c.name == name).order_by((PACKAGE.c.state == "enabled").desc(), PACKAGE.c.id.desc())
        if version is not None:
            statement = statement.where(PACKAGE.c.version == version)
        with self._database.reading() as connection:
            row = connection.execute(statement.limit(1)).one_or_none()
        return _package(row) if row else None

    def add_package(self, name: str, version: str, digest: str) -> None:
        """Add a version. With a digest other than before it is a new thing: its check and its being enabled are forgotten."""
        self.package_folder(name, version)
        with self._database.writing() as connection:
            fresh = {"digest": digest, "state": "added", "check": None, "added_at": self._database.now(connection)}
            if self._database.insert_new(connection, PACKAGE, {"name": name, "version": version, **fresh}) is None:
                connection.execute(update(PACKAGE).where(_is(name, version), PACKAGE.c.digest != digest).values(**fresh))

    def set_check(self, name: str, version: str, digest: str, report: dict[str, Any], *, passed: bool) -> None:
        """Keep what the check of this digest reported. A failed one takes back "checked" and "enabled".

        Raises:
            StorageError: the version is unknown, or another digest than the one that was checked.
        """
        with self._database.writing() as connection:
            row = _locked(connection, name, version)
            if row.digest != digest:
                raise Conflict(f"package {name}@{version} changed while it was checked")
            state = "added" if not passed else "enabled" if row.state == "enabled" else "checked"
            connection.execute(update(PACKAGE).where(PACKAGE.c.id == row.id).values(check=report, state=state))

    def enable(self, name: str, version: str) -> None:
        """Let the node run this version, and no other of that name. Raises StorageError unless its check passed."""
        with self._database.writing() as connection:
            self._database.lock(connection, f"package {name}")  # two versions enabled at once would both stay enabled
            row = _locked(connection, name, version)
            if row.state == "added":
                raise Conflict(f"package {name}@{version} has not passed its check")
            others = update(PACKAGE).where(PACKAGE.c.name == name, PACKAGE.c.state == "enabled", PACKAGE.c.id != row.id)
            connection.execute(others.values(state="checked"))
            connection.execute(update(PACKAGE).where(PACKAGE.c.id == row.id).values(state="enabled"))

    def disable(self, name: str, version: str) -> None:
        """Stop the node from running this version. Raises StorageError if it is unknown; a disabled one stays so."""
        with self._database.writing() as connection:
            row = _locked(connection, name, version)
            if row.state == "enabled":
                connection.execute(update(PACKAGE).where(PACKAGE.c.id == row.id).values(state="checked"))

    def package_folder(self, name: str, version: str) -> Path:
        """Return where the node keeps its copy. Raises StorageError for names that could lead elsewhere."""
        for word in (name, version):
            if not _PACKAGE_WORD.fullmatch(word):
                raise StorageError(
                    f"{word!r} cannot name a package or version: 1 to 64 of a-z, 0-9, '.', '_', '-', the first a letter or digit"
                )
        return self._packages / name / version


def matching(routes: Iterable[Route], callers: Collection[tuple[str, str]]) -> list[Route]:
    """Return those of the routes that take a study sent as one of these (calling, called) pairs of AE titles."""
    return [
        route
        for route in routes
        if any(route.from_ae_title in {ANY, calling} and route.called_ae_title in {ANY, called} for calling, called in callers)
    ]


def _is(name: str, version: str) -> Any:  # SQLAlchemy's clause types say nothing to a reader here
    return (PACKAGE.c.name == name) & (PACKAGE.c.version == version)


def _locked(connection: Connection, name: str, version: str) -> Row[Any]:
    statement: Select[Any] = select(PACKAGE).where(_is(name, version)).with_for_update()
    row = connection.execute(statement).one_or_none()
    if row is None:
        raise StorageError(f"there is no package {name}@{version}")
    return row


def _peer(row: Row[Any]) -> Peer:
    return Peer(
        ae_title=row.ae_title,
        host=row.host,
        port=row.port,
        sends=row.sends,
        receives=row.receives,
        tls=row.tls,
        client_cert=row.client_cert,
        networks=tuple(row.networks),
        user=row.user,
        passcode_hash=row.passcode_hash,
        objects=tuple(row.objects),
        commits=row.commits,
        seg_per=row.seg_per,
        empty_frames=row.empty_frames,
        queries=row.queries,
        stow_url=row.stow_url,
        stow_credentials=row.stow_credentials,
        quirks=_quirks(row.quirks),
        retrieve_by=row.retrieve_by,
    )


def _quirks(kept: dict[str, Any] | None) -> Quirks | None:
    if kept is None or "refuses" not in kept:  # until 0.7 it was kept without the day, and read by nobody
        return None
    refuses = {sop_class: tuple(syntaxes) for sop_class, syntaxes in kept["refuses"].items()}
    return Quirks(**{**kept, "probed_at": datetime.fromisoformat(kept["probed_at"]), "refuses": refuses})


def _route(row: Row[Any], to_ae_titles: tuple[str, ...]) -> Route:
    return Route(
        name=row.name,
        from_ae_title=row.from_ae_title,
        called_ae_title=row.called_ae_title,
        package=row.package,
        version=row.version,
        to_ae_titles=to_ae_titles,
        priority=row.priority,
        quiet_seconds=row.quiet_seconds,
        report_refusals=row.report_refusals,
        priors=_prior_rule(row.priors),
        fetch_missing=row.fetch_missing,
        objects=None if row.objects is None else tuple(row.objects),
        early=row.early,
        longest_wait_seconds=row.longest_wait_seconds,
        completeness_peer=row.completeness_peer,
        first_series_seconds=row.first_series_seconds,
    )


def _prior_rule(kept: dict[str, Any] | None) -> PriorRule | None:
    if kept is None:
        return None
    return PriorRule(**{**kept, "modalities": tuple(kept["modalities"]), "body_parts": tuple(kept["body_parts"])})


def _package(row: Row[Any]) -> PackageRecord:
    return PackageRecord(name=row.name, version=row.version, digest=row.digest, state=row.state, check=row.check, added_at=row.added_at)
