"""Fixtures of the tests that talk to a part of the node over a real connection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dicomweb_site import Site, serving


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Site]:
    """A web role on SQLite, for what doesn't differ between the databases."""
    with serving(tmp_path, f"sqlite:///{tmp_path / 'node.sqlite'}") as made:
        yield made
