"""Decoding of compressed pixels, which came from anywhere, by libraries written in C: in child processes, never in this one.

A child has no network, no files to write and limits on memory and time. It hands stored values over through shared memory, or dies
for one image, which becomes a sentence. Children are started when they are first needed and stay. Must never decode in the parent.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydicom import uid

from dicomnode.analysis.geometry import MAXIMUM_PROJECTION
from dicomnode.errors import AnalysisFailed

MEMORY_BYTES = 2**30  # of a child's private memory
SECONDS = 60.0  # for one image
LARGEST_IMAGE_BYTES = MAXIMUM_PROJECTION[1] * 4

# One decoder for each transfer syntax, so that the same file gives the same values wherever the node is installed.
DECODERS: Final[Mapping[str, str]] = {
    uid.DeflatedExplicitVRLittleEndian: "",  # no codec: the child inflates, for what it inflates to is anybody's guess
    uid.RLELossless: "pylibjpeg",  # pydicom's own goes on where segments are broken
    uid.JPEGBaseline8Bit: "gdcm",
    uid.JPEGExtended12Bit: "gdcm",
    uid.JPEGLossless: "gdcm",
    uid.JPEGLosslessSV1: "gdcm",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
}
NATIVE: Final = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)

_FRAMES_AT_ONCE = 16  # of one file to one child, which reads the file once
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")  # nothing secret goes along

Use = Callable[[int, NDArray[Any]], None]


@dataclass(frozen=True, kw_only=True)
class EncodedFrame:
    """One frame of a file: `index` counts from 0, `shape` is (rows, columns) as its header says."""

    file: Path
    index: int
    shape: tuple[int, int]
    sop_instance_uid: str


class _ChildFailed(Exception):
    """Why an image could not be decoded, as the end of a sentence."""


def is_decodable(transfer_syntax_uid: str) -> bool:
    """Whether pixels in this transfer syntax can be read, natively or by a child."""
    return transfer_syntax_uid in DECODERS or transfer_syntax_uid in NATIVE


class Decoder:
    """Child processes that decode, as many at a time as there are cores. Any number of threads may use one."""

    def __init__(self, *, processes: int = 0, memory_bytes: int = MEMORY_BYTES, seconds: float = SECONDS) -> None:
        """`processes` 0: one for each core. `seconds` limits the wall clock and the CPU time of each image."""
        self._processes = processes or len(os.sched_getaffinity(0))
        self._memory_bytes = memory_bytes
        self._seconds = seconds
        self._idle: list[_Child] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the children."""
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    def decode(self, frames: Sequence[EncodedFrame], use: Use) -> None:
        """Decode `frames` and call `use(i, stored)` for each, in any order and from any thread.

        `stored` is (rows, columns) of stored values, little endian integers, and lives as long as the call.

        Raises:
            AnalysisFailed: an image cannot be decoded; names its SOP Instance UID and the cause. What `use` raises.
        """
        stop = threading.Event()
        parts = list(_parts(frames))

        def decode_part(part: range) -> None:
            try:
                self._decode_part(frames, part, use, stop)
            except BaseException:
                stop.set()
                raise

        if self._processes == 1 or len(parts) == 1:
            for part in parts:
                decode_part(part)
            return
        with ThreadPoolExecutor(min(self._processes, len(parts))) as pool:
            list(pool.map(decode_part, parts))

    def _decode_part(self, frames: Sequence[EncodedFrame], part: range, use: Use, stop: threading.Event) -> None:
        for i in part:
            if stop.is_set():
                return
            child = self._take()
            try:
                use(i, child.decode(frames[i]))
            except _ChildFailed as failure:
                raise AnalysisFailed(f"The image {frames[i].sop_instance_uid} cannot be decoded: {failure}.") from failure
            finally:
                self._give_back(child)

    def _take(self) -> _Child:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return _Child(self._memory_bytes, self._seconds)

    def _give_back(self, child: _Child) -> None:
        if not child.is_alive:
            return
        with self._lock:
            if len(self._idle) < self._processes:
                self._idle.append(child)
                return
        child.end()


class _Child:
    """One child process with its socket and the memory it writes to."""

    def __init__(self, memory_bytes: int, seconds: float) -> None:
        self.is_alive = True
        self._memory_bytes, self._seconds = memory_bytes, seconds
        shared = os.memfd_create("dicomnode decoded")
        os.ftruncate(shared, LARGEST_IMAGE_BYTES)  # pages are there once they are written to
        self._shared = mmap.mmap(shared, LARGEST_IMAGE_BYTES, access=mmap.ACCESS_READ)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(seconds)
        words = [str(theirs.fileno()), str(shared), str(memory_bytes), str(seconds)]
        environment = {key: os.environ[key] for key in _INHERITED if key in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(p).absolute()) for p in sys.path)
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # unshare wants one thread
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and module; the words are numbers, no shell
            [sys.executable, "-m", "dicomnode.analysis.decoding_child", *words],
            cwd="/", env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), shared),
        )  # fmt: skip
        theirs.close()
        os.close(shared)

    def decode(self, frame: EncodedFrame) -> NDArray[Any]:
        """Return the stored values (rows, columns), which live until the next call.

        Raises:
            _ChildFailed: it can't be decoded; if that cost the child, `is_alive` is False.
        """
        request = {"file": str(frame.file.absolute()), "index": frame.index, "shape": frame.shape, "plugins": dict(DECODERS)}
        try:
            self._socket.send(json.dumps(request).encode())
            answer = self._socket.recv(4096)
        except TimeoutError:
            self.end()
            raise _ChildFailed(f"it took longer than {self._seconds:g} s") from None
        except OSError:
            answer = b""
        if not answer:
            raise _ChildFailed(self._how_it_died())
        try:
            said = json.loads(answer)
            if "reason" in said:
                raise _ChildFailed(str(said["reason"]))
            dtype = np.dtype(said["dtype"])
        except (ValueError, TypeError, KeyError) as error:  # a decoder that was taken over says anything
            self.end()
            raise _ChildFailed("its decoder gave no readable answer") from error
        count = frame.shape[0] * frame.shape[1]
        if dtype.kind not in "iu" or count * dtype.itemsize > LARGEST_IMAGE_BYTES:
            self.end()
            raise _ChildFailed("its decoder gave no whole numbers")
        return np.frombuffer(self._shared, dtype=dtype, count=count).reshape(frame.shape)

    def end(self) -> None:
        """Kill the process: it holds nothing that anybody misses."""
        self.is_alive = False
        self._process.kill()
        self._process.wait()
        self._socket.close()
        with contextlib.suppress(BufferError):  # somebody still looks at its last image
            self._shared.close()

    def _how_it_died(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)  # it is dying: the socket is closed
        code = self._process.poll()
        self.end()
        if code == -signal.SIGXCPU:
            return f"it took more than {self._seconds:g} s of CPU time"
        if code is not None and code < 0:
            return f"its decoder died with signal {-code}"
        return "its decoder died" if code is None else f"its decoder died with exit code {code}"


def _parts(frames: Sequence[EncodedFrame]) -> Iterator[range]:
    """Ranges of neighbouring frames of one file, none longer than _FRAMES_AT_ONCE."""
    start = 0
    for i in range(1, len(frames) + 1):
        if i == len(frames) or i - start == _FRAMES_AT_ONCE or frames[i].file != frames[start].file:
            yield range(start, i)
            start = i
