"""What can go wrong in storage. No SQLAlchemy or OSError leaves this package under its own name."""

from __future__ import annotations


class StorageError(Exception):
    """The disk or the database did not do what was asked; nothing of the request was kept."""


class OutOfSpace(StorageError):
    """The disk is full or below its reserve; the same request can work later."""


class Unavailable(StorageError):
    """The database cannot be reached, or is busy for longer than its time-out; the same request can work later."""


class Conflict(StorageError):
    """The request contradicts what is stored: a row that must exist is absent, or one that must not exist is there."""
