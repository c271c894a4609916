"""Structured logs with allow-listed keys: no patient data ever reaches a log line.

A key that is not on the list is dropped and its name is logged instead, so a mistake is seen and tells nothing.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import MutableMapping
from typing import Any

import structlog

ALLOWED_KEYS = frozenset(
    {
        "event", "level", "timestamp", "module", "exception", "exc_info", "dropped",
        "role", "worker", "pid", "host", "port", "ae_title", "calling_ae_title", "called_ae_title", "peer",
        "study_instance_uid", "series_instance_uid", "sop_instance_uid", "sop_class_uid", "transfer_syntax_uid",
        "revision", "run", "job", "key", "kind", "package", "version", "digest", "device", "state", "outcome",
        "status", "reason", "reason_code", "seconds", "count", "bytes", "attempt", "point", "path", "signal", "evidence",
    }
)  # fmt: skip


def _allow_listed(_logger: object, _method: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    dropped = sorted(set(entry) - ALLOWED_KEYS)
    for key in dropped:
        del entry[key]
    if dropped:
        entry["dropped"] = dropped
    return entry


def configure_logs(level: str, *, json_lines: bool) -> None:
    """Send structlog from `level` on, and the standard library's logs from warnings on, to standard error, one line an event."""
    renderer = structlog.processors.JSONRenderer() if json_lines else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _allow_listed,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    others = max(logging.WARNING, getattr(logging, level.upper()))
    logging.basicConfig(level=others, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s", force=True)
    # pydicom warns of malformed values and quotes them, on both ways: they may be the patient's.
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", UserWarning)


def printable(text: str) -> str:
    """Return `text` as a terminal may show it: control characters, of which escape sequences are made, become U+FFFD."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def get_logger(name: str) -> Any:  # structlog's BoundLogger is typed per configuration, so Any is what it offers
    """Return a logger; its keywords must be in ALLOWED_KEYS."""
    return structlog.get_logger(module=name)  # "logger" is the name of a parameter of structlog
