"""Fixtures that more than one room's tests use."""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import sqlalchemy
from dimse_cases import closing_connections

from pacs import Node, Orthanc, logs_kept, orthanc as run_orthanc
from postgres import postgres_cluster, postgres_programs

# How long an example takes says something of the machine alone: of its own accord Hypothesis fails one that takes 0.2 s.
hypothesis.settings.register_profile("dicomnode", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("dicomnode")

# Whose single tests take up to a minute. They come first, so that no worker ends with one of them while the others are done.
LONG_FIRST = ("e2e", "crash", "conformance", "integration")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by their folder; within it they keep the order that the seed gave them."""
    rank = {folder: number for number, folder in enumerate(LONG_FIRST)}
    here = Path(__file__).parent
    items.sort(key=lambda item: rank.get(item.path.relative_to(here).parts[0], len(rank)))


@pytest.fixture(autouse=True)
def logs_restored() -> Iterator[None]:
    """Undo what a command that ran in this process did to the logs: it sends them to a standard error that is only the test's."""
    with logs_kept():
        yield


@pytest.fixture
def calm_network_library() -> Iterator[None]:
    """For tests that want refusals and broken connections: pynetdicom logs them as errors and leaves sockets open after them."""
    logger = logging.getLogger("pynetdicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    with closing_connections():
        yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of the database "postgres" in a cluster that lives as long as the test session."""
    if postgres_programs() is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder, postgres_cluster(Path(folder)) as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.system)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a fresh, empty database for one test, once on SQLite and once on PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'node.sqlite'}"
        return
    server = sqlalchemy.make_url(request.getfixturevalue("postgres_url"))
    name = f"test_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    yield server.set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def node(tmp_path: Path, database_url: str) -> Iterator[Node]:
    """A node with a fresh data folder and database, not started; what a failing test leaves running is ended."""
    node = Node(tmp_path / "node", database_url)
    yield node
    node.close()


@pytest.fixture
def orthanc(tmp_path: Path, node: Node) -> Iterator[Orthanc]:
    """A running Orthanc with an empty store that sends each stable CT series to `node`."""
    with run_orthanc(tmp_path / "orthanc", node_port=node.port) as server:
        yield server
