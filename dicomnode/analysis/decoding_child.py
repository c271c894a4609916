"""The child process of `decoding`: reads one file after another, decodes what it is asked for, and may die of it.

Runs without network, under limits, and with nothing to lose. Must never be imported by the node itself.
"""

from __future__ import annotations

import json
import mmap
import resource
import socket
import struct
import sys
import warnings
from typing import Any

import gdcm
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileDataset
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import JPEGExtended12Bit, JPEGLSLossless, JPEGLSNearLossless

from dicomnode.analysis.isolation import leave_network  # and nothing that is slow to import

_READ_BY_GDCM = {JPEGExtended12Bit, JPEGLSLossless, JPEGLSNearLossless}  # where pydicom's way ends
# What pydicom and the decoders behind it raise on malformed, truncated or unsupported data.
_DECODING_FAILS = (
    InvalidDicomError, ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError,
    TypeError, ValueError, struct.error,
)  # fmt: skip


def serve(connection: socket.socket, shared: mmap.mmap, seconds: float, memory_bytes: int) -> None:
    """Answer requests until the parent closes the connection or ends."""
    files = _LastFile()
    while request := connection.recv(65536):
        _allow_cpu(seconds)
        try:
            answer = _decode(json.loads(request), files, shared)
        except MemoryError:
            answer = {"reason": f"it needs more than {memory_bytes // 2**20} MiB of memory"}
        except _DECODING_FAILS as error:
            answer = {"reason": f"its pixels are damaged or unsupported ({type(error).__name__})"}
        connection.send(json.dumps(answer).encode())


class _LastFile:
    """The file that was read last: frames of one file are asked for one after another."""

    def __init__(self) -> None:
        self._name = ""
        self._image: FileDataset | None = None

    def read(self, name: str) -> FileDataset:
        if self._image is None or name != self._name:
            self._image = None  # frees it before the next is read
            self._image, self._name = pydicom.dcmread(name), name
        return self._image


def _decode(request: dict[str, Any], files: _LastFile, shared: mmap.mmap) -> dict[str, str]:
    """Decode one frame into the shared memory; say of which type the values are."""
    image, index, shape = files.read(request["file"]), int(request["index"]), tuple(request["shape"])
    syntax = image.file_meta.TransferSyntaxUID
    if (image.Rows, image.Columns) != shape or image.get("SamplesPerPixel") != 1:
        raise ValueError("the image's size is not that of its series")
    if syntax.is_encapsulated:
        stream = get_frame(image.PixelData, index, number_of_frames=int(image.get("NumberOfFrames") or 1))
        claimed = claimed_size(stream)
        if claimed is not None and claimed != shape:
            raise ValueError("the stream's size is not the header's")
    try:
        if syntax == JPEGExtended12Bit:  # of 12 bits; pydicom hands it to libraries that aren't here
            raise RuntimeError
        stored, _ = get_decoder(syntax).as_array(image, raw=True, index=index, decoding_plugin=request["plugins"][syntax])
    except RuntimeError:
        if syntax not in _READ_BY_GDCM:
            raise
        stored = _by_gdcm(request["file"], image)[index]
    if stored.shape != shape:
        raise ValueError("the pixels have another size than the header says")
    little: NDArray[Any] = np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("<"))
    if little.nbytes > len(shared):
        raise ValueError("the pixels are too large")
    shared[: little.nbytes] = little.tobytes()
    return {"dtype": little.dtype.str}


def _by_gdcm(name: str, image: FileDataset) -> NDArray[Any]:
    """Return all frames of a file as GDCM's own reader decodes them."""
    reader = gdcm.ImageReader()
    reader.SetFileName(name)
    if not reader.Read():
        raise ValueError("GDCM cannot read it")
    kind = "i" if image.PixelRepresentation == 1 else "u"
    values = np.frombuffer(reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape"), dtype=f"<{kind}{image.BitsAllocated // 8}")
    return values.reshape(-1, image.Rows, image.Columns)


def claimed_size(stream: bytes) -> tuple[int, int] | None:
    """Return (rows, columns) from the SIZ marker (ISO 15444-1 A.5.1) or frame header (ISO 10918-1 B.2.2); None if there is none."""
    start = stream.find(b"\xff\x4f\xff\x51", 0, 4096)  # SOC SIZ; a JP2 box may come before it
    if start >= 0 and (start == 0 or not stream.startswith(b"\xff\xd8")):
        width, height, left, top = struct.unpack_from(">4I", stream, start + 8)
        return height - top, width - left
    if not stream.startswith(b"\xff\xd8"):
        return None
    position = 2
    while position + 9 <= len(stream):
        marker, length = struct.unpack_from(">HH", stream, position)
        if (0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC)) or marker == 0xFFF7:  # SOFn, and SOF55 of JPEG-LS
            height, width = struct.unpack_from(">HH", stream, position + 5)
            return height, width
        position += 2 + length
    return None


def _allow_cpu(seconds: float) -> None:
    """Let this process have so many seconds of CPU time from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 1, resource.RLIM_INFINITY))


def main(connection: str, shared: str, memory_bytes: str, seconds: str) -> None:
    """Give up what isn't needed, then serve."""
    leave_network()
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")  # nobody reads what pydicom says here
    with socket.socket(fileno=int(connection)) as opened, mmap.mmap(int(shared), 0) as mapped:
        serve(opened, mapped, float(seconds), int(memory_bytes))


if __name__ == "__main__":
    main(*sys.argv[1:])
