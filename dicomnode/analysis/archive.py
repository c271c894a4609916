"""A .zip or .tar(.gz) that somebody brings, unpacked into a folder of our own.

Must never write outside that folder, follow or make a link, or unpack more than its limits: what breaks them is refused in one sentence.
"""

from __future__ import annotations

import gzip
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from dicomnode.errors import PackageError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
MAXIMUM_FILES = 10_000
MAXIMUM_BYTES = 16 * 2**30
MAXIMUM_RATIO = 100  # of what comes out to the archive's own size
FREE_BYTES = 64 * 2**20  # so much may come out of however small an archive
DIRECTORY_BYTES = 16 * 2**20  # a zip's own list of its files, read whole
HEADER_BYTES = 2**20  # an extended header of a tar, read whole
CHUNK = 2**20


def is_archive(file: Path) -> bool:
    """Whether a file's name says that it is an archive; a file of weights may be a zip inside, too, and is none."""
    return file.name.lower().endswith(SUFFIXES)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into `folder`, which must be empty; what was written before a refusal stays for the caller to remove.

    Raises:
        PackageError: it is no archive, or holds what is never unpacked: absolute or climbing names, links, devices, two files of
            one name, encryption, or more than the limits of this module.
    """
    try:
        if archive.name.lower().endswith(".zip"):
            _unpack_zip(archive, folder)
        else:
            _unpack_tar(archive, folder)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, NotImplementedError, struct.error) as error:
        raise PackageError(f"The archive {archive.name} cannot be read: {' '.join(str(error).split()) or 'it is cut off'}.") from error
    except UnicodeError as error:
        raise PackageError(f"The archive {archive.name} holds a name that is no text.") from error


class _Place:
    """The folder that is filled, and what has come out so far."""

    def __init__(self, archive: Path, folder: Path):
        self._name = archive.name
        self._folder = folder
        self._allowed = min(MAXIMUM_BYTES, max(FREE_BYTES, MAXIMUM_RATIO * archive.stat().st_size))
        self._bytes = 0
        self._entries = 0
        self._files: set[str] = set()

    def refuse(self, what: str) -> PackageError:
        return PackageError(f"The archive {self._name} {what}: it is refused.")

    def name(self, stored: str) -> str:
        """The name of an entry below the folder, "" for the folder itself."""
        self._entries += 1
        if self._entries > MAXIMUM_FILES:
            raise self.refuse(f"holds more than {MAXIMUM_FILES} files")
        path = PurePosixPath(stored)
        if path.is_absolute() or "\\" in stored or (len(stored) > 1 and stored[1] == ":"):
            raise self.refuse(f"holds an absolute path ({_shown(stored)})")
        if ".." in path.parts:
            raise self.refuse(f"holds a path that leaves its folder ({_shown(stored)})")
        if any(not character.isprintable() for character in stored) or any(len(part.encode()) > 255 for part in path.parts):
            raise self.refuse(f"holds a name that is no file name ({_shown(stored)})")
        return "" if str(path) == "." else str(path)

    def announce(self, size: int) -> None:
        """Refuse a size before anything of it is unpacked."""
        if self._bytes + size > self._allowed:
            raise self.refuse(f"would unpack to more than {self._allowed // 2**20} MiB")

    def make_folder(self, name: str) -> None:
        try:
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise self.refuse(f"holds {_shown(name)} as a file and as a folder") from error

    def write(self, name: str, content: IO[bytes]) -> None:
        if not name or name in self._files:
            raise self.refuse(f"holds {_shown(name)} twice")
        self._files.add(name)
        self.make_folder(str(PurePosixPath(name).parent))
        try:
            with (self._folder / name).open("xb") as file:
                while chunk := content.read(CHUNK):
                    self.announce(len(chunk))
                    self._bytes += len(chunk)
                    file.write(chunk)
        except (FileExistsError, IsADirectoryError) as error:
            raise self.refuse(f"holds {_shown(name)} as a file and as a folder") from error


def _unpack_zip(archive: Path, folder: Path) -> None:
    place = _Place(archive, folder)
    with archive.open("rb") as file:
        if _directory_bytes(file) > DIRECTORY_BYTES:
            raise place.refuse(f"holds more than {MAXIMUM_FILES} files")
        with zipfile.ZipFile(file) as opened:
            for info in opened.infolist():
                name = place.name(info.orig_filename)
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind == stat.S_IFLNK:
                    raise place.refuse(f"holds a symbolic link ({_shown(name)})")
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise place.refuse(f"holds something that is no plain file ({_shown(name)})")
                if info.flag_bits & 1:
                    raise place.refuse("is encrypted")
                if info.is_dir():
                    place.make_folder(name)
                    continue
                place.announce(info.file_size)
                with opened.open(info) as content:
                    place.write(name, content)


def _directory_bytes(file: BinaryIO) -> int:
    """The size of a zip's central directory, as the record at its end says (APPNOTE 4.3.16); large where a 64-bit one follows."""
    file.seek(0, 2)
    file.seek(max(0, file.tell() - 65557))  # the record is 22 bytes and a comment of at most 65535
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise zipfile.BadZipFile("it is no zip file")
    (size,) = struct.unpack_from("<I", tail, at + 12)
    return int(size)


def _unpack_tar(archive: Path, folder: Path) -> None:
    place = _Place(archive, folder)
    with archive.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]  # it reads like one
        with stream, tarfile.open(fileobj=_Bounded(stream, place), mode="r:") as opened:  # type: ignore[call-overload]  # reads like a file
            while (member := opened.next()) is not None:
                name = place.name(member.name)
                if member.issym() or member.islnk():
                    raise place.refuse(f"holds a {'symbolic' if member.issym() else 'hard'} link ({_shown(name)})")
                if member.isdir():
                    place.make_folder(name)
                    continue
                if not member.isfile() or member.issparse():
                    raise place.refuse(f"holds something that is no plain file ({_shown(name)})")
                place.announce(member.size)
                content = opened.extractfile(member)
                if content is not None:
                    place.write(name, content)


class _Bounded:
    """A tar's bytes: whatever is asked for at once is short, since tarfile reads an extended header of any size whole."""

    def __init__(self, stream: IO[bytes], place: _Place):
        self._stream = stream
        self._place = place

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= HEADER_BYTES + 512:
            raise self._place.refuse("has a header of more than 1 MiB")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0:
            self._place.announce(max(0, offset - self._stream.tell() - 2**20))
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def _shown(name: str) -> str:
    return ascii(name[:80])
