from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from storage.errors import OutOfSpace, StorageError
from storage.objects import ObjectStore, make_folder


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    make_folder(tmp_path / "objects" / "incoming")
    return ObjectStore(tmp_path / "objects")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Every sync and rename in order, with the path it went to."""
    seen: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def noted_rename(self: Path, target: Path) -> Path:
        seen.append(("rename", target))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    return seen


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def age(path: Path, seconds: float) -> None:
    at = path.stat().st_mtime - seconds
    os.utime(path, (at, at))


def test_the_file_holds_the_chunks_one_after_the_other(objects: ObjectStore) -> None:
    stored = objects.put(b"DICM", memoryview(b"pixels"), b"")
    assert objects.read(stored.object_id) == objects.path(stored.object_id).read_bytes() == b"DICMpixels"
    assert (stored.size, stored.sha256) == (10, hashlib.sha256(b"DICMpixels").hexdigest())


def test_the_digest_of_a_dicom_file_is_that_of_its_data_set(objects: ObjectStore) -> None:
    prefix = bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00" + (6).to_bytes(4, "little") + b"meta.."
    in_two, in_one = objects.put(prefix, b"pixels"), objects.put(prefix + b"pixels")
    assert in_two.sha256 == in_one.sha256 == hashlib.sha256(b"pixels").hexdigest()
    assert in_two.size == len(prefix) + 6
    assert objects.put(b"pixels").sha256 == in_two.sha256


def test_the_path_is_made_from_the_id_alone(objects: ObjectStore, tmp_path: Path) -> None:
    object_id = objects.put(b"x").object_id
    assert re.fullmatch("[0-9a-f]{32}", object_id)
    assert objects.path(object_id) == tmp_path / "objects" / object_id[:2] / object_id[2:4] / f"{object_id}.dcm"


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
        ("sync", root / "incoming" / f"{object_id}.part"),
        ("rename", final),
        ("sync", final.parent),
        ("sync", final.parent.parent),
        ("sync", root),
    ]


def test_a_folder_that_another_process_made_is_not_taken_for_durable(
    objects: ObjectStore, calls: list[tuple[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.objects.uuid.uuid4", iter_uuids())
    first = objects.path(objects.put(b"x").object_id)
    again = len(calls)
    objects.put(b"x")
    assert [path for what, path in calls[again:] if what == "sync"][1:] == [first.parent]  # this process has synced the rest
    again = len(calls)
    ObjectStore(tmp_path / "objects").put(b"x")  # another process has not
    assert [path for what, path in calls[again:] if what == "sync"][1:] == [first.parent, first.parent.parent, tmp_path / "objects"]


def iter_uuids() -> Callable[[], object]:
    numbers = iter(range(1, 100))

    class Id:
        def __init__(self) -> None:
            self.hex = f"abcd{next(numbers):028x}"

    return Id


def test_new_parent_folders_are_synced_too(tmp_path: Path, calls: list[tuple[str, Path]]) -> None:
    make_folder(tmp_path / "a" / "b")
    assert calls == [("sync", tmp_path), ("sync", tmp_path / "a")]


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, OutOfSpace), (errno.EDQUOT, OutOfSpace), (errno.EIO, StorageError)])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_disk_that_fails_leaves_nothing_behind(
    objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], which: int
) -> None:
    count = iter(range(10))
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if next(count) == which:  # 0: the file, 1: its folder, 2: the folder's parent
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(error) as raised:
        objects.put(b"x")
    assert raised.type is error
    assert files_below(tmp_path) == []


def test_below_the_reserve_nothing_is_written(tmp_path: Path) -> None:
    make_folder(tmp_path / "incoming")
    free = ObjectStore(tmp_path).free_bytes()
    with pytest.raises(OutOfSpace, match="reserve"):
        ObjectStore(tmp_path, reserve_bytes=2 * free).put(b"x")
    assert files_below(tmp_path) == []
    assert ObjectStore(tmp_path, reserve_bytes=free // 2).put(b"x").size == 1


def test_removing_twice_is_no_error_and_reading_what_is_gone_is(objects: ObjectStore) -> None:
    object_id = objects.put(b"x").object_id
    objects.remove(object_id)
    objects.remove(object_id)
    with pytest.raises(StorageError, match=object_id):
        objects.read(object_id)


def test_the_sweep_removes_what_is_old_and_unknown_and_nothing_else(objects: ObjectStore, tmp_path: Path) -> None:
    known, orphan, young = (objects.put(b"x").object_id for _ in range(3))
    partial, fresh = (tmp_path / "objects" / "incoming" / name for name in ("1.part", "2.part"))
    partial.write_bytes(b"half")
    fresh.write_bytes(b"half")
    for path in (objects.path(known), objects.path(orphan), partial):
        age(path, 7200)
    assert objects.sweep(lambda ids: {known} & set(ids), older_than_seconds=3600) == 2
    assert set(files_below(tmp_path)) == {objects.path(known), objects.path(young), fresh}


def test_the_sweep_asks_in_batches_and_misses_none(objects: ObjectStore) -> None:
    ids = {objects.put(b"x").object_id for _ in range(20)}
    for object_id in ids:
        age(objects.path(object_id), 7200)
    import storage.objects as module

    asked: list[int] = []

    def is_known(batch: object) -> set[str]:
        asked.append(len(list(batch)))  # type: ignore[call-overload]
        return set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCH", 8)
        assert objects.sweep(is_known, older_than_seconds=60) == 20
    assert asked == [8, 8, 4]


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
