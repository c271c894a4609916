from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import storage.database
from storage.errors import Unavailable
from storage.turns import Turns

HOLDER = """
import sys, pathlib
from storage.turns import Turns
turns = Turns(pathlib.Path(sys.argv[1]))
turn = turns.take(30)
print("has it", flush=True)
sys.stdin.readline()
turns.give_back(turn)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that has the turn, and gives it back when it is sent a line."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "node.sqlite.queue"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "has it\n"
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def test_a_turn_is_had_when_the_other_process_gives_it_back(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    turns, had = Turns(tmp_path / "node.sqlite.queue"), threading.Event()

    def take() -> None:
        turn = turns.take(60)
        assert turn is not None
        had.set()
        turns.give_back(turn)

    thread = threading.Thread(target=take)
    thread.start()
    assert not had.wait(0.2)
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert had.wait(120)
    thread.join()
    end(holder)


def test_a_turn_ends_with_the_process_that_has_it(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    turns = Turns(tmp_path / "node.sqlite.queue")
    assert turns.take(0.1) is None
    end(holder)
    turn = turns.take(60)
    assert turn is not None
    turns.give_back(turn)


def test_whoever_gave_up_waiting_does_not_keep_the_turn_from_others(tmp_path: Path) -> None:
    turns = Turns(tmp_path / "queue")
    first = turns.take(1)
    assert first is not None
    assert [turns.take(0.01) for _ in range(3)] == [None] * 3
    turns.give_back(first)
    second = turns.take(60)
    assert second is not None
    turns.give_back(second)


def test_a_process_that_writes_for_too_long_makes_the_database_unavailable(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.database, "BUSY_SECONDS", 0.1)
    database = storage.database.Database(f"sqlite:///{tmp_path / 'node.sqlite'}")
    with pytest.raises(Unavailable, match="another process"), database.writing():
        pass
    end(holder)
    with database.writing() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
    database.close()
