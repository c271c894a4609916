from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from storage.errors import OutOfSpace, StorageError, Unavailable
from storage.folders import make_folder
from storage.objects import ObjectStore
from storage.records import StoredObject


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    make_folder(tmp_path / "objects" / "incoming")
    return ObjectStore(tmp_path / "objects")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Every sync and rename in order, with the path it went to."""
    seen: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def noted_rename(source: str, target: str) -> None:
        seen.append(("rename", Path(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    return seen


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_file_holds_the_chunks_one_after_the_other(objects: ObjectStore) -> None:
    stored = objects.put(b"DICM", memoryview(b"pixels"), b"")
    assert objects.read(stored.object_id) == objects.path(stored.object_id).read_bytes() == b"DICMpixels"
    assert (stored.size, stored.sha256) == (10, hashlib.sha256(b"DICMpixels").hexdigest())


def test_a_file_may_come_in_any_number_of_pieces(objects: ObjectStore) -> None:
    """As a large segmentation does: few bytes, many zeros, and so on."""
    pieces = [b"begin", *(piece for n in range(3000) for piece in (memoryview(bytes(1000)), bytes([n % 251])))]
    for some in (pieces, [*pieces, bytes(2**20)], [*pieces, bytes(2**20), b""]):
        assert objects.read(objects.put(*some).object_id) == b"".join(some)


def test_the_digest_of_a_dicom_file_is_that_of_its_data_set(objects: ObjectStore) -> None:
    prefix = bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00" + (6).to_bytes(4, "little") + b"meta.."
    in_two, in_one = objects.put(prefix, b"pixels"), objects.put(prefix + b"pixels")
    assert in_two.sha256 == in_one.sha256 == hashlib.sha256(b"pixels").hexdigest()
    assert in_two.size == len(prefix) + 6
    assert objects.put(b"pixels").sha256 == in_two.sha256


def test_the_path_is_made_from_the_id_alone(objects: ObjectStore, tmp_path: Path) -> None:
    object_id = objects.put(b"x").object_id
    assert re.fullmatch("[0-9a-f]{32}", object_id)
    assert objects.path(object_id) == tmp_path / "objects" / object_id[:5] / object_id[5:8] / f"{object_id}.dcm"


def test_an_id_tells_the_time_and_ids_of_one_store_sort_as_they_were_given(objects: ObjectStore) -> None:
    before = time.time_ns() // 1_000_000
    ids = [objects.put(b"x").object_id for _ in range(20)]
    assert before <= int(ids[0][:12], 16) <= int(ids[-1][:12], 16) <= time.time_ns() // 1_000_000
    assert ids == sorted(set(ids))
    assert {object_id[12] for object_id in ids} == {"7"}


def test_an_object_of_release_0_1_0_stays_where_it_is(objects: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "objects" / "01" / "23" / "0123456789ab4def8123456789abcdef.dcm"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    assert objects.read(path.stem) == b"old"
    assert objects.sweep(lambda _ids: set()) == 0
    objects.remove(path.stem)
    assert not path.exists()


@given(st.text())
def test_what_is_no_id_of_ours_never_becomes_a_path(text: str) -> None:
    if re.fullmatch(r"[0-9a-f]{32}", text) and len(text) == 32:
        return
    with pytest.raises(StorageError, match="32 hexadecimal"):
        ObjectStore(Path("/nowhere")).path(text)


@pytest.mark.parametrize("text", ["../" * 10 + "ab", "0" * 31, "0" * 33, "A" * 32, "0" * 32 + "\n", "٣" * 32])
def test_near_misses_are_no_ids(text: str) -> None:
    with pytest.raises(StorageError):
        ObjectStore(Path("/nowhere")).path(text)


def test_the_file_is_synced_before_it_gets_its_name_and_every_new_name_is_synced_after(
    objects: ObjectStore, calls: list[tuple[str, Path]], tmp_path: Path
) -> None:
    object_id = objects.put(b"x").object_id
    final = objects.path(object_id)
    root = tmp_path / "objects"
    assert calls == [
        ("sync", root / "incoming"),
        ("sync", root / "incoming" / object_id[-12:] / "0.part"),
        ("rename", final),
        ("sync", final.parent),
        ("sync", final.parent.parent),
        ("sync", root),
    ]


def test_a_folder_that_another_process_made_is_not_taken_for_durable(
    objects: ObjectStore, calls: list[tuple[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_800_000_000_000_000_000)  # so that all go to one folder
    first = objects.path(objects.put(b"x").object_id)
    again = len(calls)
    objects.put(b"x")
    assert [path for what, path in calls[again:] if what == "sync"][1:] == [first.parent]  # this process has synced the rest
    again = len(calls)
    ObjectStore(tmp_path / "objects").put(b"x")  # another process has not
    assert [path for what, path in calls[again:] if what == "sync"][2:] == [first.parent, first.parent.parent, tmp_path / "objects"]


def test_new_parent_folders_are_synced_too(tmp_path: Path, calls: list[tuple[str, Path]]) -> None:
    make_folder(tmp_path / "a" / "b")
    assert calls == [("sync", tmp_path), ("sync", tmp_path / "a")]


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, OutOfSpace), (errno.EDQUOT, OutOfSpace), (errno.EIO, StorageError)])
@pytest.mark.parametrize(
    ("name", "call"),
    [("fsync", 1), ("fsync", 2), ("fsync", 3), ("write", 1), ("write", 2), ("open", 1), ("rename", 1), ("makedirs", 1)],
)
def test_a_disk_that_fails_leaves_nothing_behind(
    objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], name: str, call: int
) -> None:
    objects.remove(objects.put(b"the first makes this writer's folder").object_id)
    objects._durable.clear()
    before, opened = files_below(tmp_path), open_below(tmp_path)
    count = iter(range(1, 10))
    original = getattr(os, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(count) == call:  # of fsync 1: the file, 2: its folder, 3: the folder's parent
            raise OSError(number, os.strerror(number))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        with pytest.raises(error) as raised:
            objects.put(b"x")
    assert raised.type is error
    assert files_below(tmp_path) == before
    assert open_below(tmp_path) == opened
    assert objects.put(b"x").size == 1


def open_below(folder: Path) -> list[str]:
    """The files below the folder that this process has open."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of this very listing
            links.append(str(link.readlink()))
    return sorted(path for path in links if path.startswith(str(folder)))


def test_a_disk_that_takes_less_than_it_is_given_gets_the_rest(objects: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
        stored = objects.put(b"0123456789", memoryview(b"abcd"))
    assert objects.read(stored.object_id) == b"0123456789abcd"


def test_what_is_written_can_be_read_before_it_is_whole_and_is_nowhere_to_be_seen(objects: ObjectStore, tmp_path: Path) -> None:
    incoming = objects.create(b"the meta")
    for chunk in (b"pix", memoryview(b"els")):
        incoming.write(chunk)
    with incoming.dataset() as mapped:
        assert mapped[: incoming.start] == b"the meta"
        assert mapped[incoming.start :] == b"pixels"
    assert (incoming.start, incoming.size, incoming.sha256) == (8, 14, hashlib.sha256(b"pixels").hexdigest())
    assert list(tmp_path.rglob("*.dcm")) == []
    incoming.sync()
    (stored,) = objects.keep([incoming])
    assert isinstance(stored, StoredObject)
    incoming.discard()
    assert objects.read(stored.object_id) == b"the metapixels"
    assert (stored.size, stored.sha256) == (14, hashlib.sha256(b"pixels").hexdigest())


def test_what_is_discarded_is_gone(objects: ObjectStore, tmp_path: Path) -> None:
    with objects.create(b"").dataset() as nothing:
        assert nothing == b""
    incoming = objects.create(b"the meta")
    incoming.write(b"pixels")
    for _ in range(2):
        incoming.discard()
    assert [Path(path).suffix for path in open_below(tmp_path)] == [".lock", ".part"]  # our lock, and the first one's file
    assert [path.suffix for path in files_below(tmp_path)].count(".part") == 1


def test_files_kept_together_share_one_sync_of_their_folder(
    objects: ObjectStore, calls: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_800_000_000_000_000_000)
    objects.put(b"x")
    group = [objects.create(bytes([number])) for number in range(3)]
    calls.clear()
    kept = objects.keep(group)
    assert [what for what, _ in calls] == ["rename"] * 3 + ["sync"]
    assert [objects.read(stored.object_id) for stored in kept if isinstance(stored, StoredObject)] == [b"\0", b"\1", b"\2"]


def test_one_file_of_a_group_that_cannot_be_renamed_fails_alone(objects: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    group = [objects.create(bytes([number])) for number in range(3)]
    rename = os.rename

    def failing(source: str, target: str) -> None:
        if source.endswith("/1.part"):
            raise OSError(errno.ENOSPC, "full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    assert [type(outcome) for outcome in objects.keep(group)] == [StoredObject, OutOfSpace, StoredObject]


def test_below_the_reserve_nothing_is_written(tmp_path: Path) -> None:
    make_folder(tmp_path / "incoming")
    free = ObjectStore(tmp_path).free_bytes()
    with pytest.raises(OutOfSpace, match="reserve"):
        ObjectStore(tmp_path, reserve_bytes=2 * free).put(b"x")
    assert files_below(tmp_path) == []
    assert ObjectStore(tmp_path, reserve_bytes=free // 2).put(b"x").size == 1


def test_intake_that_stopped_goes_on_when_enough_is_free_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of one node agree, and a restart between changes nothing."""
    make_folder(tmp_path / "incoming")
    free, told = 1000, list[tuple[str, bool]]()
    monkeypatch.setattr(ObjectStore, "free_bytes", lambda _self: free)
    one, other = (ObjectStore(tmp_path, reserve_bytes=100) for _ in range(2))
    one.watch_intake(lambda stopped, _free: told.append(("one", stopped)))
    other.watch_intake(lambda stopped, _free: told.append(("other", stopped)))
    for free, begins in ((200, True), (101, True), (99, False), (100, False), (109, False), (116, True), (101, True), (99, False)):  # noqa: B007
        for objects in (other, one, ObjectStore(tmp_path, reserve_bytes=100)):
            if begins:
                objects.create(b"x").discard()
            else:
                with pytest.raises(OutOfSpace, match="the reserve"):
                    objects.create(b"x")
    assert told == [("other", True), ("other", False), ("other", True)]
    assert one.intake_stopped
    free = 400
    assert not one.look()
    assert told[3:] == [("one", False)]
    assert ObjectStore(tmp_path, reserve_bytes=100, resume_bytes=300).resume_bytes == 300
    assert ObjectStore(tmp_path, reserve_bytes=100, resume_bytes=50).resume_bytes == 100


def test_results_may_take_half_of_the_reserve_while_intake_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "incoming")
    free = 80
    monkeypatch.setattr(ObjectStore, "free_bytes", lambda _self: free)
    objects = ObjectStore(tmp_path, reserve_bytes=100)
    assert objects.look()
    assert objects.put(b"x" * 30).size == 30
    with pytest.raises(OutOfSpace, match="half of the reserve"):
        objects.put(b"x" * 31)


def test_a_file_that_grows_into_the_reserve_is_taken_back(objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    incoming = objects.create(b"prefix")
    free = iter([10, -1])
    monkeypatch.setattr(objects, "free_bytes", lambda: next(free))
    megabytes = bytes(9 * 2**20)
    incoming.write(megabytes)  # no look at the disk yet
    incoming.write(megabytes)
    incoming.write(megabytes)
    with pytest.raises(OutOfSpace, match="reserve"):
        incoming.write(megabytes)
    assert [path.suffix for path in files_below(tmp_path)] == [".lock"]


def test_removing_twice_is_no_error_and_reading_what_is_gone_is(objects: ObjectStore) -> None:
    object_id = objects.put(b"x").object_id
    objects.remove(object_id)
    objects.remove(object_id)
    with pytest.raises(StorageError, match=object_id):
        objects.read(object_id)


def test_the_sweep_removes_what_a_dead_writer_left_and_no_row_knows(objects: ObjectStore, tmp_path: Path) -> None:
    known, orphan, partial = a_killed_writer(tmp_path / "objects", objects_made=2)
    first_release = tmp_path / "objects" / "incoming" / "0123.part"
    first_release.write_bytes(b"half")
    own = objects.put(b"not in a row yet").object_id
    unfinished = objects.create(b"prefix")
    everything = set(files_below(tmp_path))
    assert len(everything) == 8  # two objects, a part and a lock of the dead writer; an object, a part and a lock of ours; an old part
    assert objects.sweep(lambda ids: {known} & set(ids)) == 3
    left = everything - set(files_below(tmp_path))
    assert {path.name for path in left} == {f"{orphan}.dcm", Path(partial).name, f"{orphan[-12:]}.lock", "0123.part"}
    assert objects.read(known) == b"x1"
    assert objects.read(own) == b"not in a row yet"
    unfinished.write(b"more")
    unfinished.discard()
    assert objects.sweep(lambda _ids: set()) == 0


def test_what_a_living_process_is_at_is_left_alone_however_often_others_sweep(objects: ObjectStore, tmp_path: Path) -> None:
    with running_writer(tmp_path / "objects", objects_made=1) as (_child, said):
        before = files_below(tmp_path)
        for _ in range(3):
            assert ObjectStore(tmp_path / "objects").sweep(lambda _ids: set()) == 0
        assert files_below(tmp_path) == before
        assert objects.read(said[0]) == b"x0"


def test_a_sweep_that_cannot_ask_removes_nothing_and_the_next_one_does(objects: ObjectStore, tmp_path: Path) -> None:
    a_killed_writer(tmp_path / "objects", objects_made=1)
    before = files_below(tmp_path)

    def fail(_ids: object) -> set[str]:
        raise Unavailable("the database is down")

    with pytest.raises(Unavailable):
        objects.sweep(fail)
    assert files_below(tmp_path) == before
    assert objects.sweep(lambda _ids: set()) == 2
    assert files_below(tmp_path) == []
    assert list((tmp_path / "objects" / "incoming").iterdir()) == []


def test_two_processes_that_sweep_at_once_remove_everything_once(tmp_path: Path) -> None:
    make_folder(tmp_path / "objects" / "incoming")
    for _ in range(3):
        a_killed_writer(tmp_path / "objects", objects_made=2)
    barrier = threading.Barrier(4)

    def sweep(_thread: int) -> int:
        barrier.wait(120)
        return ObjectStore(tmp_path / "objects").sweep(lambda _ids: set())

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(sweep, range(4))) == 9
    assert files_below(tmp_path) == []


def test_a_forked_child_writes_under_a_tag_of_its_own_and_does_not_keep_its_parent_alive(tmp_path: Path) -> None:
    """The parent forks amid its work and is killed; the child lives on, and is what the sweep leaves alone."""
    make_folder(tmp_path / "objects" / "incoming")
    script = (
        "import os, sys, pathlib; from storage.objects import ObjectStore\n"
        "store = ObjectStore(pathlib.Path(sys.argv[1]))\n"
        "print(store.put(b'parent').object_id, flush=True)\n"
        "if os.fork() == 0:\n"
        "    print(store.put(b'child').object_id, flush=True)\n"
        "    sys.stdin.read()\n"
        "    os._exit(0)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, tmp_path / "objects"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    parents, childs = (child.stdout.readline().strip() for _ in range(2))
    child.wait(120)
    objects = ObjectStore(tmp_path / "objects")
    assert parents[-12:] != childs[-12:]
    assert objects.sweep(lambda _ids: set()) == 1
    assert not objects.path(parents).exists()
    assert objects.read(childs) == b"child"
    child.stdin.close()
    assert child.stdout.read() == ""  # both are gone
    child.stdout.close()
    assert objects.sweep(lambda _ids: set()) == 1


WRITER = """
import sys, pathlib
from storage.objects import ObjectStore
store = ObjectStore(pathlib.Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    print(store.put(b"x%d" % number).object_id, flush=True)
unfinished = store.create(b"half")
print(unfinished._path, flush=True)
sys.stdin.read()
"""


@contextmanager
def running_writer(folder: Path, *, objects_made: int) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process that has written so many objects and is at the next: yields it, the ids and the unfinished file's path."""
    command = [sys.executable, "-c", WRITER, folder, str(objects_made)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        yield child, [child.stdout.readline().strip() for _ in range(objects_made + 1)]


def a_killed_writer(folder: Path, *, objects_made: int) -> list[str]:
    """Return the objects' ids, last the one made first, and the path of the file that was never finished."""
    with running_writer(folder, objects_made=objects_made) as (child, said):
        child.kill()
    return [*said[-2::-1], said[-1]]


def test_a_kill_at_any_moment_leaves_whole_objects_only(objects: ObjectStore, tmp_path: Path) -> None:
    """The child says each id after `put` returned; SIGKILL comes while it writes."""
    script = (
        "import sys, pathlib; from storage.objects import ObjectStore\n"
        "store = ObjectStore(pathlib.Path(sys.argv[1]))\n"
        "while True: print(store.put(b'x' * 3_000_000, b'y').object_id, flush=True)\n"
    )
    said: list[str] = []
    for rounds in (1, 2, 3):
        child = subprocess.Popen([sys.executable, "-c", script, tmp_path / "objects"], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        said += [child.stdout.readline().strip() for _ in range(rounds)]
        child.kill()
        said += child.stdout.read().split()
        child.stdout.close()
        child.wait()
    for object_id in said:
        assert objects.read(object_id) == b"x" * 3_000_000 + b"y"
    visible = [path for path in files_below(tmp_path) if path.suffix == ".dcm"]
    assert {path.stat().st_size for path in visible} == {3_000_001}
