"""Settings: `dicomnode.toml` and the environment become one frozen value. The only reader of settings.

What stands here is what the installer sets and a restart applies; peers, routes and packages live in the registry.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dicomnode.errors import ConfigError

ENVIRONMENT_PREFIX = "DICOMNODE_"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NodeSection(_Section):
    """Who the node is, and the folder that holds what it must never lose."""

    ae_title: str = Field("DICOMNODE", description="the node's own AE title; peers call it")
    more_ae_titles: tuple[str, ...] = Field((), description="further AE titles that peers may call; routes can tell them apart")
    data: Path = Field(Path("data"), description="folder of objects, packages and the default database; relative to this file")

    @field_validator("ae_title")
    @classmethod
    def _ae_title(cls, value: str) -> str:
        return check_ae_title(value)

    @field_validator("more_ae_titles")
    @classmethod
    def _more_ae_titles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_ae_title, value))

    @property
    def ae_titles(self) -> tuple[str, ...]:
        """Every AE title that the node answers to, its own first."""
        return (self.ae_title, *self.more_ae_titles)


class ListenerSection(_Section):
    """Where the Storage SCP listens, what it takes and how long it waits. Counts hold for each listener process."""

    host: str = Field("127.0.0.1", description="address to bind; 0.0.0.0 for all")
    port: int = Field(11112, ge=0, le=65535, description="TCP port; 0 takes a free one")
    processes: int = Field(1, ge=1, le=32, description="listener processes that share the port")
    maximum_associations: int = Field(64, ge=1, description="associations at a time")
    maximum_associations_per_ae: int = Field(32, ge=1, description="associations at a time of one calling AE title")
    maximum_queries: int = Field(8, ge=1, description="queries and retrievals that run at a time; more are refused")
    maximum_half_open: int = Field(32, ge=1, description="connections without an association yet, of all addresses that are no peer's")
    maximum_half_open_per_address: int = Field(4, ge=1, description="the same, of one address that is no peer's")
    maximum_half_open_per_peer: int = Field(64, ge=1, description="the same, of one address of a peer")
    association_seconds: float = Field(10, gt=0, description="deadline for the association request, and for the peer to close at the end")
    pdu_seconds: float = Field(30, gt=0, description="deadline for the rest of a PDU that has begun, and for a response to be taken")
    dimse_timeout_seconds: float = Field(30, gt=0, description="wait for a DIMSE message to go on")
    network_timeout_seconds: float = Field(60, gt=0, description="close an association that is idle for this long")
    least_bytes_per_second: int = Field(1024, ge=0, description="a message slower than this, pdu_seconds after its begin, is aborted")
    maximum_pdu_bytes: int = Field(131072, ge=4096, le=1048576, description="largest PDU we ask peers to send")
    accepted_pdu_bytes: int = Field(1048576, ge=4096, le=16777216, description="largest PDU taken from a peer that doesn't listen to that")
    maximum_association_request_bytes: int = Field(65536, ge=1024, description="largest association request")
    maximum_message_bytes: int = Field(4294967296, ge=1024, description="largest data set")
    maximum_commitment_bytes: int = Field(16777216, ge=1024, description="largest message of storage commitment; it is held in memory")
    maximum_association_bytes: int = Field(1099511627776, ge=1024, description="most that one association may send")
    maximum_nesting: int = Field(64, ge=1, le=64, description="deepest sequence in a data set")
    accept_deflated: bool = Field(False, description="take Deflated Explicit VR Little Endian")
    maximum_inflated_bytes: int = Field(536870912, ge=1024, description="largest deflated data set, inflated; it is held in memory")

    @model_validator(mode="after")
    def _one_port(self) -> ListenerSection:
        if self.processes > 1 and self.port == 0:
            raise ValueError("several processes need a port to share: port 0 gives each its own")
        return self


class TlsSection(_Section):
    """A second port for DICOM over TLS (PS3.15 B.12). Without a certificate there is none."""

    port: int = Field(2762, ge=0, le=65535, description="TCP port; 0 takes a free one")
    certificate: Path | None = Field(None, description="the node's certificate with its chain, PEM; relative to this file")
    key: Path | None = Field(None, description="its private key, PEM, not encrypted; relative to this file")
    ca: Path | None = Field(
        None, description="the site's certification authorities, PEM: only what they signed is let in; relative to this file"
    )
    handshake_seconds: float = Field(5, gt=0, description="deadline for the TLS handshake")

    @field_validator("certificate", "key", "ca", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return value or None

    @model_validator(mode="after")
    def _all_or_none(self) -> TlsSection:
        if len({file is None for file in (self.certificate, self.key, self.ca)}) > 1:
            raise ValueError("certificate, key and ca are needed together")
        return self


class StorageSection(_Section):
    """The database and the disk."""

    database_url: str | None = Field(None, description="postgresql+psycopg://…; without it SQLite in the data folder")
    reserve_bytes: int = Field(1_000_000_000, ge=0, description="free disk below which images are refused with A700")
    resume_bytes: int = Field(0, ge=0, description="free disk from which they are taken again; 0: a tenth more than the reserve")


class EngineSection(_Section):
    """Leases, attempts and the back-off of deliveries."""

    lease_seconds: float = Field(
        15, gt=0, description="a worker silent for this long, and for most of it again, is dead and its jobs move on"
    )
    poll_seconds: float = Field(0.5, gt=0, description="how often workers look for work")
    analyse_attempts: int = Field(3, ge=1, description="a study that kills its worker this often is dead-lettered")
    retry_schedule_seconds: tuple[float, ...] = Field(
        (30, 60, 300, 900, 1800, *[3600] * 25), description="waits between the tries of a delivery; after the last it has failed"
    )


class CommitmentSection(_Section):
    """Storage commitment: peers that are asked whether they hold what they were sent, and peers that ask us."""

    response_seconds: float = Field(30, gt=0, description="a peer that doesn't answer a request or a report within this is told it again")
    report_seconds: float = Field(3, ge=0, description="an association stays open for so long after a request, for a report on it")
    answer_seconds: float = Field(3600, gt=0, description="a peer that hasn't reported after this is asked again")
    rounds: int = Field(5, ge=0, description="how often an object is sent again that its peer says it doesn't hold; then it has failed")
    maximum_references: int = Field(20000, ge=1, description="instances that one request of a peer may name")
    maximum_waiting: int = Field(1000, ge=1, description="requests of one peer that may wait for our report")


class RetentionSection(_Section):
    """How long objects are kept: for ever, unless days, quota_bytes or disk_share is set. `dicomnode retention` shows what would go."""

    days: float = Field(0, ge=0, description="a study to which nothing happened for so long goes; 0: none goes for its age")
    quota_bytes: int = Field(0, ge=0, description="the oldest studies go while all objects together are larger; 0: no quota")
    disk_share: float = Field(0, ge=0, lt=1, description="the oldest studies go while more of the disk is full, e.g. 0.85; 0: no quota")
    minimum_days: float = Field(1, ge=0, description="a study to which something happened within so long stays, whatever the quota")
    until_committed: bool = Field(True, description="a study stays until each peer that commits has committed to its results")
    undelivered_days: float = Field(0, ge=0, description="a study whose results a peer hasn't, stays for so long; 0: until it has")
    unanalysed_days: float = Field(0, ge=0, description="a study of which no analysis ended with a result or reason stays so long; 0: ever")
    keep_stat: bool = Field(True, description="a study that was urgent (STAT) stays")
    priors: int = Field(
        1, ge=0, description="so many last analysed studies of a patient stay to be compared with; for a quota they go last"
    )
    prior_days: float = Field(365, ge=0, description="for so long")
    commitment_days: float = Field(365, ge=0, description="requests of storage commitment are remembered for so long; 0: for ever")
    interval_seconds: float = Field(600, gt=0, description="between two looks at what may go")


class PriorsSection(_Section):
    """Earlier studies that routes have fetched from a peer while a study is analysed."""

    seconds: float = Field(120, gt=0, description="a comparison waits for them no longer than this after its analysis began")
    maximum_instances: int = Field(3000, ge=1, description="a study with more is not fetched")
    maximum_bytes: int = Field(4_000_000_000, ge=1, description="a study that grows larger is not fetched to its end")


class MissingSection(_Section):
    """Images that a peer holds and that did not come: routes have them fetched before a study is closed."""

    tries: int = Field(3, ge=1, description="how often a peer is asked for them; then the study goes on with what is there")
    again_seconds: float = Field(20, ge=0, description="between two of these")
    seconds: float = Field(120, gt=0, description="one of them takes no longer than this; the study waits for it")
    maximum_instances: int = Field(2000, ge=1, description="if more are missing they are not fetched")
    maximum_bytes: int = Field(4_000_000_000, ge=1, description="by C-GET no more than this comes for one series")


class AnalysisSection(_Section):
    """Where networks run."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU if there is one")
    threads: int = Field(0, ge=0, description="CPU threads for inference; 0: all cores")
    backend: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="what computes on a CPU: auto is the fastest that agreed with torch when the package was checked"
    )
    deadline_seconds: float = Field(3600, gt=0, description="a study that takes longer has failed; time for urgent ones doesn't count")
    prefetch_bytes: int = Field(
        2_000_000_000, ge=0, description="memory for volumes of studies about to be analysed; 0: none is read ahead"
    )
    warm_memory_mb: int = Field(4096, ge=0, description="memory for models that stay loaded; the one in use stays whatever it takes")


class WebSection(_Section):
    """DICOMweb: QIDO-RS, WADO-RS and STOW-RS over HTTP. Who isn't on this machine must show a peer's passcode or certificate."""

    enabled: bool = Field(False, description="`serve` runs the web role too; `run web` runs it in any case")
    host: str = Field("127.0.0.1", description="address to bind; beyond loopback callers must be known peers")
    port: int = Field(8080, ge=0, le=65535, description="TCP port; 0 takes a free one")
    tls: Literal["off", "on", "mutual"] = Field(
        "off", description="on: HTTPS with the certificate of [tls]; mutual: callers must show one that the site's CA signed"
    )
    credentials: bool = Field(False, description="ask callers on loopback for credentials, too")
    ae_title: str = Field("DICOMWEB", description="calling AE title of what comes by STOW-RS from loopback without credentials")
    hosts: tuple[str, ...] = Field(
        ("127.0.0.1", "localhost", "[::1]"),
        description="names by which the node may be called without credentials, so that no web page can call it by a name of its own",
    )
    origins: tuple[str, ...] = Field((), description="origins of web pages that may call it, e.g. https://ohif.hospital.example")
    address: str = Field("", description="URL that callers know it by, e.g. behind a reverse proxy; else what they called")
    maximum_connections: int = Field(64, ge=1, description="requests at a time; what is more is answered 503")
    header_seconds: float = Field(10, gt=0, description="deadline for a request's header")
    network_timeout_seconds: float = Field(60, gt=0, description="wait for the next bytes of a request, or for a response to be taken")
    maximum_request_bytes: int = Field(68719476736, ge=1024, description="largest request; an instance: listener.maximum_message_bytes")
    maximum_matches: int = Field(1000, ge=1, le=100000, description="matches of one search; callers ask for the next ones by offset")

    @field_validator("ae_title")
    @classmethod
    def _ae_title(cls, value: str) -> str:
        return check_ae_title(value)

    @field_validator("address")
    @classmethod
    def _address(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("an address begins with http:// or https://")
        return value.rstrip("/")


class LogSection(_Section):
    """The log on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="debug, info, warning or error")
    json_lines: bool = Field(True, description="one JSON object a line; false: for people")


class Settings(_Section):
    """All settings of one process. Frozen; handed down from the command line, never global."""

    node: NodeSection = NodeSection()
    listener: ListenerSection = ListenerSection()
    tls: TlsSection = TlsSection()
    storage: StorageSection = StorageSection()
    engine: EngineSection = EngineSection()
    commitment: CommitmentSection = CommitmentSection()
    retention: RetentionSection = RetentionSection()
    priors: PriorsSection = PriorsSection()
    missing: MissingSection = MissingSection()
    analysis: AnalysisSection = AnalysisSection()
    web: WebSection = WebSection()
    log: LogSection = LogSection()

    @property
    def data_folder(self) -> Path:
        """The absolute data folder."""
        return self.node.data

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL of the one database."""
        return self.storage.database_url or f"sqlite:///{self.data_folder / 'dicomnode.sqlite'}"


def check_ae_title(value: str) -> str:
    """Return `value` stripped of surrounding spaces if it is an AE title (PS3.5 6.2 VR AE), else raise ValueError.

    1 to 16 characters of the default repertoire without backslash and control characters, not only spaces.
    """
    title = value.strip(" ")
    if not title:
        raise ValueError("an AE title needs at least one character that is not a space")
    if len(title) > 16:
        raise ValueError(f"the AE title {title!r} is longer than 16 characters")
    if any(not 0x20 <= ord(c) <= 0x7E or c == "\\" for c in title):
        raise ValueError(f"the AE title {title!r} has a character that VR AE does not allow")
    return title


def check_dicomweb_address(value: str) -> tuple[str, str, int]:
    """Return the address of a DICOMweb service without a slash at its end, its host and its port, else raise ValueError."""
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{value!r} is no URL") from error
    plain = value.isascii() and value.isprintable() and " " not in value
    if not plain or parts.scheme not in {"http", "https"} or not host or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("a DICOMweb address is http://HOST/… or https://HOST/…, without a user, a query or a fragment")
    return value.rstrip("/"), host, port or (443 if parts.scheme == "https" else 80)


def load_settings(file: Path | None, environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings from `file`, `$DICOMNODE_CONFIG` or `./dicomnode.toml`, and `DICOMNODE_<SECTION>__<KEY>`.

    Raises:
        ConfigError: the file is absent, no TOML, or has mistakes; the message names every mistake at once.
    """
    path = (file or Path(environment.get("DICOMNODE_CONFIG", "dicomnode.toml"))).absolute()
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); `dicomnode init` writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for name, value in environment.items():
        section, separator, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
        if name.startswith(ENVIRONMENT_PREFIX) and separator:
            content.setdefault(section, {})[key] = value
    try:
        settings = Settings.model_validate(content)
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ConfigError(f"{path} has {len(mistakes)} mistake(s): " + "; ".join(mistakes)) from error
    folder = (path.parent / settings.node.data).resolve()
    files = {
        key: (path.parent / file).resolve() for key in ("certificate", "key", "ca") if (file := getattr(settings.tls, key)) is not None
    }
    return settings.model_copy(
        update={"node": settings.node.model_copy(update={"data": folder}), "tls": settings.tls.model_copy(update=files)}
    )


def commented_toml() -> str:
    """Return a `dicomnode.toml` that names every setting with its default, commented out but for the AE title."""
    lines = [
        "# dicomnode: what the installer sets; a restart applies it. Peers, routes and packages: see `dicomnode peer|route|package`.",
        "",
    ]
    for name, section in Settings.model_fields.items():
        defaults = section.default
        lines.append(f"[{name}]  # {(type(defaults).__doc__ or '').strip()}")
        for key, field in type(defaults).model_fields.items():
            value = getattr(defaults, key)
            text = toml_value(value) if value is not None else '""'
            comment = f"  # {field.description}" if field.description else ""
            lines.append(f"{'' if key == 'ae_title' else '# '}{key} = {text}{comment}")
        lines.append("")
    return "\n".join(lines)


def toml_value(value: object) -> str:
    """Write a string, number, boolean, tuple of them or mapping to them as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, int | float):
        return str(value)
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
