"""Settings: `dicomnode.toml` and the environment become one frozen value. The only reader of settings.

What stands here is what the installer sets and a restart applies; peers, routes and packages live in the registry.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dicomnode.errors import ConfigError

ENVIRONMENT_PREFIX = "DICOMNODE_"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NodeSection(_Section):
    """Who the node is, and the folder that holds what it must never lose."""

    ae_title: str = Field("DICOMNODE", description="the node's own AE title; peers call it")
    data: Path = Field(Path("data"), description="folder of objects, packages and the default database; relative to this file")

    @field_validator("ae_title")
    @classmethod
    def _ae_title(cls, value: str) -> str:
        return check_ae_title(value)


class ListenerSection(_Section):
    """Where the Storage SCP listens and how long it waits."""

    host: str = Field("127.0.0.1", description="address to bind; 0.0.0.0 for all")
    port: int = Field(11112, ge=0, le=65535, description="TCP port; 0 takes a free one")
    maximum_associations: int = Field(64, ge=1, description="associations at a time")
    acse_timeout_seconds: float = Field(30, gt=0, description="wait for an association message")
    dimse_timeout_seconds: float = Field(30, gt=0, description="wait for a DIMSE message to go on")
    network_timeout_seconds: float = Field(60, gt=0, description="close an association that is idle for this long")
    maximum_pdu_bytes: int = Field(131072, ge=4096, le=1048576, description="largest PDU we ask peers to send")


class StorageSection(_Section):
    """The database and the disk."""

    database_url: str | None = Field(None, description="postgresql+psycopg://…; without it SQLite in the data folder")
    reserve_bytes: int = Field(1_000_000_000, ge=0, description="free disk below which images are refused with A700")


class EngineSection(_Section):
    """Leases, attempts and the back-off of deliveries."""

    lease_seconds: float = Field(15, gt=0, description="a worker silent for this long is dead and its jobs move on")
    poll_seconds: float = Field(0.5, gt=0, description="how often workers look for work")
    analyse_attempts: int = Field(3, ge=1, description="a study that kills its worker this often is dead-lettered")
    retry_schedule_seconds: tuple[float, ...] = Field(
        (30, 60, 300, 900, 1800, *[3600] * 25), description="waits between the tries of a delivery; after the last it has failed"
    )


class AnalysisSection(_Section):
    """Where networks run."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU if there is one")
    threads: int = Field(0, ge=0, description="CPU threads for inference; 0: all cores")


class LogSection(_Section):
    """The log on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="debug, info, warning or error")
    json_lines: bool = Field(True, description="one JSON object a line; false: for people")


class Settings(_Section):
    """All settings of one process. Frozen; handed down from the command line, never global."""

    node: NodeSection = NodeSection()
    listener: ListenerSection = ListenerSection()
    storage: StorageSection = StorageSection()
    engine: EngineSection = EngineSection()
    analysis: AnalysisSection = AnalysisSection()
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
    return settings.model_copy(update={"node": settings.node.model_copy(update={"data": folder})})


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
    """Write a string, number, boolean or tuple of them as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, int | float):
        return str(value)
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
