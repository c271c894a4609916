"""An archive is unpacked into its folder and nowhere else, and only as large as it may be."""

import gzip
import io
import os
import resource
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dicomnode.analysis import archive
from dicomnode.analysis.archive import unpack
from dicomnode.errors import PackageError


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    return folder


def zipped(file: Path, entries: dict[str, bytes], *, mode: int | None = None) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if mode is not None:
                info.external_attr = mode << 16
            opened.writestr(info, content)
    return file


def tarred(file: Path, members: list[tarfile.TarInfo], content: bytes = b"x") -> Path:
    with tarfile.open(file, "w:gz" if file.name.endswith("gz") else "w") as opened:
        for member in members:
            if member.isreg():
                member.size = len(content)
            opened.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return file


def member(name: str, kind: bytes = tarfile.REGTYPE, **more: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def everything_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_files_come_out_of_a_zip_as_they_went_in(tmp_path: Path, into: Path) -> None:
    unpack(zipped(tmp_path / "a.zip", {"b/configs/metadata.json": b"{}", "b/models/": b"", "b/models/model.pt": b"\0" * 5000}), into)
    assert everything_below(into) == {"b/configs/metadata.json", "b/models/model.pt"}
    assert (into / "b/models/model.pt").read_bytes() == b"\0" * 5000


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_files_come_out_of_a_tar_as_they_went_in(tmp_path: Path, into: Path, name: str) -> None:
    unpack(tarred(tmp_path / name, [member("b", tarfile.DIRTYPE), member("b/" + "long" * 50), member("./c")], b"weights"), into)
    assert everything_below(into) == {"b/" + "long" * 50, "c"}
    assert (into / "c").read_bytes() == b"weights"


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "..\\evil", "C:/evil", "a\nb", "a/" + "b" * 300])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, into: Path, name: str, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    hostile = zipped(file, {name: b"x"}) if kind == "zip" else tarred(file, [member(name)])
    before = everything_below(tmp_path)
    with pytest.raises(PackageError, match="refused"):
        unpack(hostile, into)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize(
    "kind",
    [stat.S_IFLNK | 0o777, stat.S_IFCHR | 0o666, stat.S_IFIFO | 0o666, stat.S_IFSOCK | 0o666],
)
def test_a_link_or_a_device_in_a_zip_is_refused(tmp_path: Path, into: Path, kind: int) -> None:
    with pytest.raises(PackageError, match=r"symbolic link|no plain file"):
        unpack(zipped(tmp_path / "a.zip", {"a": b"/etc/passwd"}, mode=kind), into)
    assert everything_below(into) == set()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (member("a", tarfile.SYMTYPE, linkname="/etc/passwd"), "symbolic link"),
        (member("a", tarfile.LNKTYPE, linkname="../../b"), "hard link"),
        (member("a", tarfile.CHRTYPE), "no plain file"),
        (member("a", tarfile.BLKTYPE), "no plain file"),
        (member("a", tarfile.FIFOTYPE), "no plain file"),
    ],
)
def test_a_link_or_a_device_in_a_tar_is_refused(tmp_path: Path, into: Path, made: tarfile.TarInfo, said: str) -> None:
    with pytest.raises(PackageError, match=said):
        unpack(tarred(tmp_path / "a.tar", [made]), into)
    assert everything_below(into) == set()


def test_a_file_below_a_link_never_reaches_what_the_link_names(tmp_path: Path, into: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    hostile = tarred(tmp_path / "a.tar", [member("d", tarfile.SYMTYPE, linkname=str(outside)), member("d/evil")])
    with pytest.raises(PackageError, match="symbolic link"):
        unpack(hostile, into)
    assert not any(outside.iterdir())


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [["a", "a"], ["a", "./a"], ["a", "a/b"], ["a/b", "a"]])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_two_files_of_one_name_are_refused(tmp_path: Path, into: Path, names: list[str], kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    if kind == "tar":
        tarred(file, [member(name) for name in names])
    else:
        with zipfile.ZipFile(file, "w") as opened:
            for name in names:
                opened.writestr(name, b"x")
    with pytest.raises(PackageError, match=r"twice|as a file and as a folder"):
        unpack(file, into)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_what_would_unpack_to_much_more_than_it_is_is_refused(
    tmp_path: Path, into: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "FREE_BYTES", 2**20)
    file = tmp_path / f"a.{kind}"
    zeros = bytes(16 * 2**20)
    bomb = zipped(file, {"a": zeros}) if kind == "zip" else tarred(file, [member("a")], zeros)
    with pytest.raises(PackageError, match="would unpack to more than"):
        unpack(bomb, into)
    assert sum(path.stat().st_size for path in into.rglob("*")) <= 8 * 2**20


def test_too_many_files_are_refused(tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAXIMUM_FILES", 10)
    with pytest.raises(PackageError, match="more than 10 files"):
        unpack(zipped(tmp_path / "a.zip", {str(n): b"" for n in range(11)}), into)


def test_a_zip_that_lies_about_a_size_gives_no_more_than_it_said(tmp_path: Path, into: Path) -> None:
    file = zipped(tmp_path / "a.zip", {"a": bytes(100_000)})
    content = bytearray(file.read_bytes())
    at = content.rfind(b"PK\x01\x02")
    struct.pack_into("<I", content, at + 24, 10)  # the size in the central directory
    file.write_bytes(content)
    with pytest.raises(PackageError, match="cannot be read"):
        unpack(file, into)
    assert sum(path.stat().st_size for path in into.rglob("*")) <= 10


def test_an_extended_header_of_a_gigabyte_is_not_read(tmp_path: Path, into: Path) -> None:
    header = member("pax", tarfile.XHDTYPE)
    header.size = 2**30
    file = tmp_path / "a.tar.gz"
    with gzip.open(file, "wb", compresslevel=1) as packed:
        packed.write(header.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(8):
            packed.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PackageError, match="header of more than 1 MiB"):
        unpack(file, into)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_a_sparse_file_is_refused(tmp_path: Path, into: Path) -> None:
    sparse = member("a", tarfile.GNUTYPE_SPARSE)
    buffer = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    buffer[386:410] = b"00000000000\0" + b"00000000001\0"  # one byte at the beginning
    buffer[483:495] = b"77777777777\0"  # of a file of 8 GiB
    buffer[148:156] = b"        "
    buffer[148:156] = b"%06o\0 " % sum(buffer)
    (tmp_path / "a.tar").write_bytes(bytes(buffer) + bytes(1024))
    with pytest.raises(PackageError, match="no plain file"):
        unpack(tmp_path / "a.tar", into)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: os.urandom(2000), lambda content: content[: len(content) // 2]])
def test_what_is_no_archive_is_one_sentence(tmp_path: Path, into: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    file = tmp_path / name
    whole = zipped(file, {"a": os.urandom(30_000)}) if name.endswith("zip") else tarred(file, [member("a")], os.urandom(30_000))
    file.write_bytes(damage(whole.read_bytes()))
    with pytest.raises(PackageError, match="cannot be read"):
        unpack(file, into)


def test_an_encrypted_zip_is_refused(tmp_path: Path, into: Path) -> None:
    file = zipped(tmp_path / "a.zip", {"a": b"x"})
    content = bytearray(file.read_bytes())
    content[content.rfind(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(content)
    with pytest.raises(PackageError, match="encrypted"):
        unpack(file, into)
