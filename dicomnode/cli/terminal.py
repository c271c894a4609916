"""What every command shares: the options --config and --json, opening the node, and how records are shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dicomnode.config import Settings, check_ae_title, load_settings
from dicomnode.errors import UsageError
from dicomnode.logs import printable
from storage import Storage, open_storage, prepare_storage

ConfigOption = Annotated[Path | None, typer.Option("--config", help="dicomnode.toml; else $DICOMNODE_CONFIG, else ./dicomnode.toml")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON array of objects")]


@contextmanager
def opened(config: Path | None) -> Iterator[tuple[Settings, Storage]]:
    """Yield the settings and the node's storage, made and migrated if need be, and close it after the command."""
    settings = load_settings(config)
    prepare_storage(settings.database_url, settings.data_folder)
    disk = settings.storage
    storage = open_storage(settings.database_url, settings.data_folder, reserve_bytes=disk.reserve_bytes, resume_bytes=disk.resume_bytes)
    try:
        yield settings, storage
    finally:
        storage.database.close()


def show(records: Sequence[Any], columns: Sequence[str], *, as_json: bool) -> None:
    """Print records (frozen dataclasses or dicts): as JSON with all their fields, else the columns as a table."""
    rows = [record if isinstance(record, dict) else dataclasses.asdict(record) for record in records]
    if as_json:
        typer.echo(json.dumps(rows, default=_json_value, ensure_ascii=False, indent=1))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(_cell(row[column])) for column in columns))  # Text: words from the wire are no markup
    Console(width=None if Console().is_terminal else 400).print(table)  # a file or a pipe has no width: cells stay whole


def ae_title(value: str) -> str:
    """Return the AE title or raise UsageError."""
    try:
        return check_ae_title(value)
    except ValueError as error:
        raise UsageError(str(error)) from error


def name_and_version(value: str) -> tuple[str, str | None]:
    """Split NAME[@VERSION]."""
    name, _, version = value.partition("@")
    return name, version or None


def _json_value(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return printable(str(value))
