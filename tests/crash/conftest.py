"""One fork server for every crash test: whichever is first starts it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def fork_server() -> ForkServerContext:
    """A fork server that has the whole node imported.

    It is handed our import path by the environment: of its own it has none at the time of its preload, and keeps quiet about that.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crash_node"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(str(Path(path).absolute()) for path in sys.path))
        forkserver.ensure_running()
    return context
