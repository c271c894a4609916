"""The frames of a stored object, as they are encoded: found through a mapping of its file, never decoded.

Where a frame of one bit a pixel doesn't begin with a byte its bits are moved; what is big endian is turned (PS3.18 8.7.3.3.2).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydicom.encaps import generate_fragments, get_frame
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from dicomnode.analysis.attributes import value_of
from dicomnode.analysis.headers import Header
from dicomnode.dimse.encoding import inflate
from dicomnode.errors import NodeError
from storage.objects import meta_length

CHUNK_BYTES = 1 << 20
_MAXIMUM_INFLATED = 512 * 2**20


class NoSuchFrame(NodeError):
    """The object has no such frame, or what its header says of its pixels is contradictory."""


def frame_count(header: Header) -> int:
    """Return how many frames the object has; 0 without pixels."""
    if header.pixels is None:
        return 0
    number = value_of(header, "NumberOfFrames")
    return number if isinstance(number, int) and number > 0 else 1


def frame(file: Path, header: Header, number: int) -> bytes:
    """Return the n-th frame of an object, from 1.

    Raises:
        NoSuchFrame: there is none. OSError: the file can't be read. CannotUnderstand: what is deflated can't be inflated.
    """
    place, count = header.pixels, frame_count(header)
    if place is None or not 1 <= number <= count:
        raise NoSuchFrame("the object has no such frame")
    if place.length is None:
        offsets = tuple(value_of(header, keyword) for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"))
        with file.open("rb") as opened:
            opened.seek(place.offset)
            try:
                return get_frame(opened, number - 1, number_of_frames=count, extended_offsets=offsets if all(offsets) else None)
            except (ValueError, EOFError, IndexError, struct.error) as error:
                raise NoSuchFrame("the object's encapsulated frames can't be told apart") from error
    first, last = _frame_bits(header) * (number - 1), _frame_bits(header) * number
    if last > 8 * place.length:
        raise NoSuchFrame("the object's pixel data is shorter than its header says")
    with _mapped(file, header) as (data, offset):
        cut = data[offset + first // 8 : offset + (last + 7) // 8]
    if first % 8 == 0 and last % 8 == 0:
        return _turned(cut, header)
    bits = np.unpackbits(np.frombuffer(cut, np.uint8), bitorder="little")[first % 8 :][: last - first]
    return np.packbits(bits, bitorder="little").tobytes()


def pixel_chunks(file: Path, header: Header) -> Iterator[bytes]:
    """Give the whole native pixel data of an object, chunk by chunk. Raises what `frame` raises."""
    place = header.pixels
    if place is None or place.length is None:
        raise NoSuchFrame("the object has no native pixel data")
    with _mapped(file, header) as (data, offset):
        for start in range(offset, offset + place.length, CHUNK_BYTES):
            chunk = data[start : min(start + CHUNK_BYTES, offset + place.length)]
            yield _turned(chunk, header)


def fragments(file: Path, header: Header) -> Iterator[bytes]:
    """Give the fragments of encapsulated pixel data, without the Basic Offset Table."""
    place = header.pixels
    if place is None or place.length is not None:
        raise NoSuchFrame("the object has no encapsulated pixel data")
    with file.open("rb") as opened:
        opened.seek(place.offset)
        every = generate_fragments(opened)
        next(every, None)
        yield from every


@contextmanager
def _mapped(file: Path, header: Header) -> Iterator[tuple[mmap.mmap | bytes, int]]:
    """The bytes that hold the pixels, and where these begin."""
    assert header.pixels is not None  # noqa: S101  each caller has looked
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if header.pixels.transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
            yield inflate(mapped, meta_length(mapped[:144]), _MAXIMUM_INFLATED), header.pixels.offset
        else:
            yield mapped, header.pixels.offset


def _frame_bits(header: Header) -> int:
    rows, columns, bits = (value_of(header, keyword) for keyword in ("Rows", "Columns", "BitsAllocated"))
    samples = value_of(header, "SamplesPerPixel") or 1
    if bits is None and header.pixels is not None:
        bits = {0x7FE00008: 32, 0x7FE00009: 64}.get(header.pixels.tag)
    if not all(isinstance(value, int) and value > 0 for value in (rows, columns, bits, samples)):
        raise NoSuchFrame("the object's header doesn't say how large a frame is")
    whole = int(rows) * int(columns) * int(bits) * int(samples)
    photometric = str(value_of(header, "PhotometricInterpretation") or "")
    if photometric in {"YBR_FULL_422", "YBR_PARTIAL_422"}:
        return whole * 2 // 3
    return whole // 2 if photometric == "YBR_PARTIAL_420" else whole


def _turned(cut: bytes, header: Header) -> bytes:
    bits = value_of(header, "BitsAllocated")
    place = header.pixels
    if place is None or place.transfer_syntax_uid != ExplicitVRBigEndian or bits not in {16, 32, 64}:
        return cut
    return np.frombuffer(cut, f">u{bits // 8}").byteswap().tobytes()
