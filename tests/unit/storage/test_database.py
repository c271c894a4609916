from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from storage import Storage, open_storage, prepare_storage
from storage.database import Database
from storage.errors import Conflict, OutOfSpace, StorageError, Unavailable
from storage.folders import make_folder
from storage.records import Peer, StoredObject
from storage.schema import LEASE, METADATA, PEER
from storage.upgrade import upgrade

LEASE_ROW = {"name": "n", "owner": "o", "expires_at": datetime(2026, 1, 1, tzinfo=UTC)}


def differences(database: Database) -> list[object]:
    """What the migrations made, against schema.py; tables that are not ours (the engine's) are left out."""

    def is_ours(_object: object, name: str | None, kind: str, _reflected: bool, _compared: object) -> bool:
        return kind != "table" or name in METADATA.tables

    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"include_object": is_ours, "compare_type": True})
        return list(compare_metadata(context, METADATA))


def test_the_migrated_tables_are_those_of_the_schema(storage: Storage) -> None:
    with storage.database.writing() as connection:
        connection.exec_driver_sql("CREATE TABLE workflow_status (workflow_uuid TEXT)")
    assert differences(storage.database) == []
    with storage.database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE lease ADD COLUMN stray TEXT")
    assert len(differences(storage.database)) == 1


RELEASE_0_1_0 = """
INSERT INTO peer (ae_title, host, port, sends, receives, tls, client_cert) VALUES ('PACS', 'pacs.example', 104, true, true, false, NULL);
INSERT INTO patient VALUES (1, 'P1', 'Doe^Jane');
INSERT INTO study VALUES (1, 1, '1.2', '20261122', 'Chest', 'A1', '2026-11-22 10:00:00', '2026-11-22 10:00:01', NULL, 1, 0, 0);
INSERT INTO series VALUES (1, 1, '1.2.1', 'CT', 1, 'Lung');
INSERT INTO instance VALUES (1, 1, 1, '1.2.1.1', '1.2.840.10008.5.1.4.1.1.2', '1.2.840.10008.1.2.1', 'the data set', 'image', false, 1,
  'routine', 'CT1', 'NODE', '', '2026-11-22 10:00:01', '0123456789ab4def8123456789abcdef', 'the file', 1000);
INSERT INTO quarantine VALUES (1, '1.2.1.1', '1.2', 'CT1', 49155, 'other content', '2026-11-22 10:00:02', 2,
  '1123456789ab4def8123456789abcdef', 'another file', 1001);
INSERT INTO route VALUES ('chest', '*', '*', 'lung', NULL, NULL, 30.0, true);
INSERT INTO route_destination VALUES ('chest', 0, 'PACS')
"""


def test_what_release_0_1_0_kept_is_there_after_the_upgrade(database_url: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "objects" / "incoming")
    database = Database(database_url)
    upgrade(database, "0001")
    with database.writing() as connection:
        for statement in RELEASE_0_1_0.split(";"):
            connection.exec_driver_sql(statement)
    database.close()
    prepare_storage(database_url, tmp_path)
    storage = open_storage(database_url, tmp_path)
    peer = Peer(ae_title="PACS", host="pacs.example", port=104, sends=True, receives=True, tls=False, client_cert=None)
    assert storage.registry.peers() == [peer]
    assert [route.to_ae_titles for route in storage.registry.routes()] == [("PACS",)]
    (instance,) = storage.index.instances("1.2")
    assert (instance.stored.sha256, instance.stored.size, instance.calling_ae_title) == ("the data set", 1000, "CT1")
    (kept,) = storage.index.quarantined()
    assert kept.stored == StoredObject(object_id="1123456789ab4def8123456789abcdef", sha256="another file", size=1001)
    assert differences(storage.database) == []
    assert storage.index.is_known([instance.stored.object_id, kept.stored.object_id]) == {instance.stored.object_id, kept.stored.object_id}
    with pytest.raises(Conflict, match="chest"):
        storage.registry.remove_peer("PACS")
    storage.database.close()


def test_tables_have_singular_names(storage: Storage) -> None:
    with storage.database.reading() as connection:
        tables = set(sqlalchemy.inspect(connection).get_table_names()) - {"sqlite_sequence", "alembic_version"}
    assert tables == set(METADATA.tables)
    assert {name for name in tables if name.endswith("s")} == {"series"}


def test_preparing_again_keeps_what_is_there(storage: Storage, database_url: str, tmp_path: Path) -> None:
    assert storage.leases.hold("n", "o", 60)
    stored = storage.objects.put(b"x")
    prepare_storage(database_url, tmp_path)
    assert storage.leases.holder("n") == "o"
    assert storage.objects.read(stored.object_id) == b"x"


def test_several_processes_may_prepare_at_once(database_url: str, tmp_path: Path) -> None:
    script = "import sys, pathlib, storage; input(); storage.prepare_storage(sys.argv[1], pathlib.Path(sys.argv[2]))"
    folder = tmp_path / "new" / "data"
    command = [sys.executable, "-W", "error", "-c", script, database_url, folder]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    errors = [child.communicate()[1] for child in children]
    assert (errors, [child.returncode for child in children]) == (["", "", ""], [0, 0, 0])
    opened = open_storage(database_url, folder)
    assert differences(opened.database) == []
    opened.database.close()


def test_what_was_never_prepared_is_not_opened(database_url: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="prepared first"):
        open_storage(database_url, tmp_path)
    assert not (tmp_path / "node.sqlite").exists()
    prepare_storage(database_url, tmp_path)
    with pytest.raises(StorageError, match="prepared first"):
        open_storage(database_url, tmp_path / "elsewhere")


def test_a_database_of_another_version_of_the_program_is_left_alone(storage: Storage, database_url: str, tmp_path: Path) -> None:
    with storage.database.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StorageError, match="prepared first"):
        open_storage(database_url, tmp_path)
    with pytest.raises(StorageError, match="9999"):
        prepare_storage(database_url, tmp_path)


@pytest.mark.parametrize("url", ["mysql://host/database", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(StorageError):
        Database(url)


def test_a_database_that_is_not_there_is_unavailable() -> None:
    database = Database("postgresql+psycopg://postgres@127.0.0.1:1/nothing?connect_timeout=2")
    with pytest.raises(Unavailable), database.reading():
        pass
    database.close()


def test_every_connection_syncs_its_commits(storage: Storage, database_url: str) -> None:
    if database_url.startswith("postgresql"):
        with storage.database.writing() as connection:
            name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
        storage.database.close()
        settings, expected = ["SHOW synchronous_commit"], ["on"]
    else:
        settings = [f"PRAGMA {name}" for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")]
        expected = ["wal", 2, 1, 30000]
    barrier = threading.Barrier(4)

    def ask(_thread: int) -> list[object]:
        with storage.database.reading() as connection:
            barrier.wait(120)  # so that each thread has a connection of its own
            return [connection.exec_driver_sql(setting).scalar_one() for setting in settings]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [expected] * 4
    with storage.database.writing() as connection:
        assert [connection.exec_driver_sql(setting).scalar_one() for setting in settings] == expected


def test_a_block_that_raises_writes_nothing(storage: Storage) -> None:
    def fail() -> None:
        with storage.database.writing() as connection:
            connection.execute(LEASE.insert().values(LEASE_ROW))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert storage.leases.expired("") == []


def test_readers_go_on_while_a_writer_writes_and_see_only_what_is_committed(storage: Storage) -> None:
    with storage.database.writing() as connection:
        connection.execute(LEASE.insert().values(LEASE_ROW))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(storage.leases.expired, "").result(120) == []
    assert storage.leases.expired("") == [("n", "o")]


def test_threads_and_processes_that_increment_one_number_lose_none(storage: Storage, database_url: str) -> None:
    """Read, then write, in one transaction: on SQLite this fails half-way unless the write lock is taken first."""
    table = storage.database
    add = "UPDATE lease SET owner = :owner WHERE name = 'n'"
    script = (
        "import sys; from storage.database import Database; import sqlalchemy\n"
        "database = Database(sys.argv[1])\n"
        "for _ in range(20):\n"
        "  with database.writing() as connection:\n"
        "    database.lock(connection, 'n')\n"
        "    owner = connection.exec_driver_sql(\"SELECT owner FROM lease WHERE name = 'n'\").scalar_one()\n"
        f"    connection.execute(sqlalchemy.text({add!r}), {{'owner': str(int(owner) + 1)}})\n"
        "database.close()\n"
    )
    with table.writing() as connection:
        connection.execute(LEASE.insert().values(LEASE_ROW | {"owner": "0"}))
    child = subprocess.Popen([sys.executable, "-W", "error", "-c", script, database_url], stderr=subprocess.PIPE, text=True)

    def increment(_thread: int) -> None:
        for _ in range(20):
            with table.writing() as connection:
                table.lock(connection, "n")
                owner = connection.execute(sqlalchemy.select(LEASE.c.owner)).scalar_one()
                connection.execute(LEASE.update().values(owner=str(int(owner) + 1)))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(increment, range(3)))
    assert (child.communicate()[1], child.returncode) == ("", 0)
    with table.reading() as connection:
        assert connection.execute(sqlalchemy.select(LEASE.c.owner)).scalar_one() == "80"


def test_a_broken_constraint_is_a_conflict(storage: Storage) -> None:
    def insert() -> None:
        with storage.database.writing() as connection:
            connection.execute(LEASE.insert().values(LEASE_ROW))

    insert()
    with pytest.raises(Conflict):
        insert()


def test_a_full_disk_under_the_database_is_out_of_space(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'node.sqlite'}"
    prepare_storage(url, tmp_path)
    storage = open_storage(url, tmp_path)
    with storage.database.reading() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")  # of the one pooled connection: no page more than there are

    def fill() -> None:
        with storage.database.writing() as connection:
            connection.execute(LEASE.insert().values(LEASE_ROW | {"owner": "o" * 1_000_000}))

    with pytest.raises(OutOfSpace):
        fill()
    storage.database.close()


def test_times_come_back_as_utc_whatever_zone_they_went_in(storage: Storage) -> None:
    written = datetime(2026, 3, 29, 2, 30, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    with storage.database.writing() as connection:
        connection.execute(LEASE.insert().values(LEASE_ROW | {"expires_at": written}))
    with storage.database.reading() as connection:
        read = connection.execute(sqlalchemy.select(LEASE.c.expires_at)).scalar_one()
    assert (read, read.utcoffset()) == (written, timedelta(0))


def test_a_time_without_a_zone_is_refused(storage: Storage) -> None:
    def write() -> None:
        with storage.database.writing() as connection:
            connection.execute(LEASE.insert().values(LEASE_ROW | {"expires_at": datetime(2026, 1, 1)}))  # noqa: DTZ001 (the point)

    with pytest.raises(StorageError, match="aware"):
        write()


@pytest.fixture
def insert_peer(storage: Storage) -> Callable[[], str | None]:
    row = {"ae_title": "A", "host": "h", "port": 104, "sends": True, "receives": True, "tls": False, "client_cert": None}

    def insert() -> str | None:
        with storage.database.writing() as connection:
            return storage.database.insert_new(connection, PEER, row)

    return insert


def test_inserting_what_is_there_changes_nothing(insert_peer: Callable[[], str | None]) -> None:
    assert insert_peer() == "A"
    assert insert_peer() is None


def test_the_readme_names_every_table_and_module() -> None:
    folder = Path(__file__).parents[3] / "storage"
    text = (folder / "README.md").read_text(encoding="utf-8")
    modules = {path.name for path in folder.glob("*.py")} - {"__init__.py", "errors.py"}
    assert [name for name in (*METADATA.tables, *sorted(modules)) if f"`{name}`" not in text] == []
