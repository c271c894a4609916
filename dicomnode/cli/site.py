"""`registry export|import`: peers and routes as a file, to move them between sites. Packages are files and travel by themselves.

Everything is checked before anything is changed, and every mistake is named at once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dicomnode.admission import check_passcode_hash, check_user_name, network
from dicomnode.cli.terminal import ConfigOption, opened
from dicomnode.config import check_ae_title, check_dicomweb_address, toml_value
from dicomnode.errors import UsageError
from dicomnode.results.profile import check_objects
from storage import Storage
from storage.records import STANDARD_OBJECTS, Peer, PriorRule, RetrieveBy, Route, SegmentationPer

registry = typer.Typer(no_args_is_help=True, help="Peers and routes as a file.")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(registry, name="registry")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PeerEntry(_Entry):
    """A [[peers]] table."""

    ae_title: str
    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)]
    sends: bool = False
    receives: bool = False
    networks: tuple[str, ...] = ()
    tls: bool = False
    client_cert: Annotated[str | None, Field(pattern="^[0-9a-f]{64}$")] = None
    user: str | None = None
    passcode_hash: str | None = None
    objects: tuple[str, ...] = STANDARD_OBJECTS
    commits: bool = False
    seg_per: SegmentationPer = "model"
    empty_frames: bool = False
    queries: bool = True
    stow_url: str | None = None
    stow_credentials: str | None = None  # a path
    retrieve_by: RetrieveBy | None = None

    @field_validator("stow_url")
    @classmethod
    def _stow_url(cls, value: str | None) -> str | None:
        return None if value is None else check_dicomweb_address(value)[0]

    @field_validator("ae_title")
    @classmethod
    def _ae_title(cls, value: str) -> str:
        return check_ae_title(value)

    @field_validator("networks")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(network(text)) for text in value)

    @field_validator("user")
    @classmethod
    def _user(cls, value: str | None) -> str | None:
        return None if value is None else check_user_name(value)

    @field_validator("passcode_hash")
    @classmethod
    def _passcode_hash(cls, value: str | None) -> str | None:
        return None if value is None else check_passcode_hash(value)

    @field_validator("objects")
    @classmethod
    def _objects(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return check_objects(value)

    @model_validator(mode="after")
    def _in_full(self) -> PeerEntry:
        if self.client_cert is not None and not self.tls:
            raise ValueError("client_cert needs tls")
        if self.passcode_hash is not None and self.user is None:
            raise ValueError("passcode_hash needs user")
        if self.commits and not self.receives:
            raise ValueError("commits needs receives")
        if self.stow_url is not None and not self.receives:
            raise ValueError("stow_url needs receives")
        if self.stow_credentials is not None and self.stow_url is None:
            raise ValueError("stow_credentials needs stow_url")
        return self


class PriorEntry(_Entry):
    """A route's `priors`."""

    ae_title: str
    count: Annotated[int, Field(ge=1, le=20)] = 1
    days: Annotated[int, Field(ge=1, le=36500)] = 1095
    modalities: tuple[str, ...] = ()
    body_parts: tuple[str, ...] = ()


class RouteEntry(_Entry):
    """A [[routes]] table."""

    name: Annotated[str, Field(min_length=1)]
    from_ae_title: str = "*"
    called_ae_title: str = "*"
    package: Annotated[str, Field(min_length=1)]
    version: str | None = None
    to_ae_titles: Annotated[tuple[str, ...], Field(min_length=1)]
    priority: Literal["stat", "routine"] | None = None
    quiet_seconds: Annotated[float, Field(ge=0)]
    report_refusals: bool = False
    priors: PriorEntry | None = None
    objects: tuple[str, ...] | None = None
    early: bool = False
    longest_wait_seconds: Annotated[float | None, Field(ge=0)] = None
    completeness_peer: str | None = None
    fetch_missing: bool = False
    first_series_seconds: Annotated[float | None, Field(ge=0)] = None

    @field_validator("objects")
    @classmethod
    def _objects(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else check_objects(value)


class Site(_Entry):
    """The whole file."""

    peers: tuple[PeerEntry, ...] = ()
    routes: tuple[RouteEntry, ...] = ()


@registry.command("export")
def registry_export(file: Annotated[Path, typer.Argument(help="site.toml")], config: ConfigOption = None) -> None:
    """Write peers and routes to a file; an existing one is left as it is."""
    if file.exists():
        raise UsageError(f"{file} exists already and is left as it is")
    with opened(config) as (_, storage):
        file.touch(mode=0o600)  # it holds hashes of passcodes
        file.write_text(_as_toml(storage), encoding="utf-8")


@registry.command("import")
def registry_import(file: Annotated[Path, typer.Argument(help="site.toml")], config: ConfigOption = None) -> None:
    """Add the peers and routes of a file, changing those with the same names; nothing is removed."""
    site = _read(file)
    with opened(config) as (_, storage):
        receiving = {p.ae_title for p in storage.registry.peers() if p.receives} - {p.ae_title for p in site.peers}
        receiving |= {p.ae_title for p in site.peers if p.receives}
        mistakes = [
            f"route {route.name}: {title} is no peer that receives"
            for route in site.routes
            for title in route.to_ae_titles
            if title not in receiving
        ]
        known = {p.ae_title for p in storage.registry.peers()} | {p.ae_title for p in site.peers}
        mistakes += [
            f"route {route.name}: {route.completeness_peer} is no peer"
            for route in site.routes
            if route.completeness_peer is not None and route.completeness_peer not in known
        ]
        sending = {p.ae_title for p in storage.registry.peers() if p.sends} - {p.ae_title for p in site.peers}
        sending |= {p.ae_title for p in site.peers if p.sends}
        mistakes += [
            f"route {route.name}: missing images can't be fetched from {route.completeness_peer}, which is no peer that sends"
            for route in site.routes
            if route.fetch_missing and route.completeness_peer not in sending
        ]
        mistakes += [
            f"route {route.name}: there is no package {route.package}"
            for route in site.routes
            if storage.registry.package(route.package, route.version) is None
        ]
        if mistakes:
            raise UsageError(f"{file} has {len(mistakes)} mistake(s): " + "; ".join(mistakes))
        for peer in site.peers:
            storage.registry.add_peer(Peer(**peer.model_dump()))
        for entry in site.routes:
            storage.registry.add_route(_route(entry))
        typer.echo(f"{len(site.peers)} peer(s) and {len(site.routes)} route(s) imported")


def _route(entry: RouteEntry) -> Route:
    priors = None if entry.priors is None else PriorRule(**entry.priors.model_dump())
    return Route(**{**entry.model_dump(), "priors": priors})


def _read(file: Path) -> Site:
    try:
        return Site.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not TOML: {error}") from error
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise UsageError(f"{file} has {len(mistakes)} mistake(s): " + "; ".join(mistakes)) from error


def _as_toml(storage: Storage) -> str:
    lines = ["# Peers and routes of a dicomnode; read it with `dicomnode registry import`."]
    tables: list[tuple[str, type[PeerEntry | RouteEntry], Sequence[Peer | Route]]] = [
        ("peers", PeerEntry, storage.registry.peers()),
        ("routes", RouteEntry, storage.registry.routes()),
    ]
    for table, entry, records in tables:
        for record in records:
            lines += ["", f"[[{table}]]"]
            values = {key: getattr(record, key) for key in entry.model_fields}
            values |= {key: asdict(value) for key, value in values.items() if isinstance(value, PriorRule)}
            lines += [f"{key} = {toml_value(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"
