"""Each of the odd files decodes to the values that another decoder gives, or is refused with a reason; none takes the worker down.

The others: DCMTK for what is native, JPEG, JPEG-LS and RLE; GDCM, as SimpleITK has it built in, for JPEG 2000.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from dimse_cases import SHARED_DATA
from numpy.typing import NDArray
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    RLELossless,
)

from dicomnode.analysis.decoding import Decoder
from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import Frame, frames_of, read_headers
from dicomnode.analysis.volume import read_voxels
from dicomnode.errors import AnalysisFailed
from pacs import program

ROOT = Path(__file__).parents[2]
ODD = SHARED_DATA / "odd_files"

pytestmark = [pytest.mark.realdata, pytest.mark.system, pytest.mark.filterwarnings("ignore")]  # libraries warn of odd files

# Greyscale images whose header can be read, but not their pixels; nobody else reads them either.
CANNOT_BE_DECODED = {
    "fodicom/genFile.dcm",  # a JPEG without its beginning
    "fodicom/GH1339.dcm",  # the last fragment is cut off
    "pydicom/MR_truncated.dcm",  # cut off amid the pixels
}


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(processes=1, seconds=120) as children:
        yield children


def by_dcmtk(file: Path, folder: Path, syntax: str) -> NDArray[Any]:
    """Return stored values (frames, rows, columns) as DCMTK decodes them, without what stands above Bits Stored."""
    native = folder / "native.dcm"
    if syntax == RLELossless:
        command = [program("dcmdrle", "dcmtk")]
    elif syntax in JPEGLSTransferSyntaxes:
        command = [program("dcmdjpls", "dcmtk")]
    elif syntax.startswith("1.2.840.10008.1.2.4"):
        command = [program("dcmdjpeg", "dcmtk")]
    else:
        command = [program("dcmconv", "dcmtk"), "+te"]
    subprocess.run([*command, file, native], check=True, capture_output=True)
    image = pydicom.dcmread(native)
    assert image.file_meta.TransferSyntaxUID != DeflatedExplicitVRLittleEndian
    order = ">" if image.file_meta.TransferSyntaxUID == ExplicitVRBigEndian else "<"
    allocated, stored, signed = image.BitsAllocated, image.BitsStored, image.PixelRepresentation
    shape = int(image.get("NumberOfFrames") or 1), image.Rows, image.Columns
    values = np.frombuffer(image.PixelData, dtype=f"{order}u{allocated // 8}", count=int(np.prod(shape))).reshape(shape).astype(np.int64)
    values &= (1 << stored) - 1
    return np.where(values >> (stored - 1) & 1, values - (1 << stored), values) if signed else values


def by_gdcm(file: Path) -> NDArray[Any]:
    """Return rescaled values (frames, rows, columns) as SimpleITK reads them."""
    values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))
    return values if values.ndim == 3 else values[None]


def expected(file: Path, folder: Path, frames: list[Frame]) -> NDArray[np.float64]:
    """Return the values in units, from another decoder."""
    image = pydicom.dcmread(file, stop_before_pixels=True)
    syntax = str(image.file_meta.TransferSyntaxUID)
    if syntax in JPEG2000TransferSyntaxes:
        return by_gdcm(file).astype(np.float64)
    stored = by_dcmtk(file, folder, syntax).astype(np.float64)
    slopes = np.array([[float(frame.header.get(k) or d) for k, d in (("RescaleSlope", 1), ("RescaleIntercept", 0))] for frame in frames])
    return stored * slopes[:, :1, None] + slopes[:, 1:, None]


def outcome(file: Path, folder: Path, decoder: Decoder) -> str:
    """Decode the file and compare; say how it ended."""
    try:
        frames = frames_of(read_headers([file]))
        if not frames:
            return "no image"
        voxels = read_voxels(frames, projection=False, decoder=decoder)
    except NotEligible as refusal:
        return f"refused: {refusal.code}"
    except AnalysisFailed as failure:
        return f"failed: {failure}"
    theirs = expected(file, folder, frames)
    real = np.ones(voxels.shape, dtype=bool) if "PixelPaddingValue" not in frames[0].header else voxels != -1000
    np.testing.assert_array_equal(voxels[real], theirs.astype(np.float32)[real], err_msg=str(file))
    return "equal"


def test_each_odd_file_is_decoded_like_others_do_or_refused(tmp_path: Path, decoder: Decoder) -> None:
    if not ODD.is_dir():
        pytest.skip(f"{ODD} is absent")
    outcomes = {str(file.relative_to(ODD)): outcome(file, tmp_path, decoder) for file in sorted(ODD.rglob("*.dcm"))}
    table = "\n".join(f"{how:60.60} {name}" for name, how in outcomes.items())
    kinds = Counter(how.split(":")[0] for how in outcomes.values())
    assert kinds == {"equal": 55, "refused": 27, "failed": 15, "no image": 15}, table
    assert {how for how in outcomes.values() if how.startswith("refused")} == {"refused: pixel-format", "refused: transfer-syntax"}
    assert {name for name, how in outcomes.items() if "cannot be decoded" in how} == CANNOT_BE_DECODED, table


BOMBS = """
    import resource, sys
    from pathlib import Path
    from dicomnode.analysis.decoding import Decoder
    from dicomnode.analysis.eligibility import NotEligible
    from dicomnode.analysis.frames import frames_of, read_headers
    from dicomnode.analysis.volume import read_voxels
    from dicomnode.errors import AnalysisFailed

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    with Decoder(processes=1, memory_bytes=400 * 2**20) as decoder:
        before = peak()
        for name in sys.argv[1:]:
            try:
                read_voxels(frames_of(read_headers([Path(name)])), projection=False, decoder=decoder)
                print("decoded")
            except (AnalysisFailed, NotEligible) as refusal:
                print(refusal)
        print(peak() - before)
"""


def test_bombs_cost_the_parent_next_to_nothing(tmp_path: Path) -> None:
    bombs = [deflated_zeros(tmp_path), deflated_pixels(tmp_path), nested_sequences(tmp_path), run_lengths(tmp_path)]
    command = [sys.executable, "-c", textwrap.dedent(BOMBS), *map(str, bombs)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    *said, grown = ended.stdout.splitlines()
    expected_words = ["header is too large", "400 MiB of memory", "nest deeper than 64", "400 MiB of memory"]
    for sentence, words in zip(said, expected_words, strict=True):
        assert words in sentence, ended.stdout
    assert int(grown) < 64, ended.stdout


def bomb(folder: Path, name: str, syntax: bytes, data: bytes) -> Path:
    meta = b"\0" * 128 + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(syntax)) + syntax
    (folder / name).write_bytes(meta + data)
    return folder / name


def image_header(edge: int) -> bytes:
    """The elements of a greyscale image of 8 bits, up to its pixels."""
    texts = struct.pack("<HH2sH", 8, 0x16, b"UI", 26) + b"1.2.840.10008.5.1.4.1.1.2\0"
    texts += struct.pack("<HH2sH", 8, 0x60, b"CS", 2) + b"MR"
    numbers = {0x02: 1, 0x10: edge, 0x11: edge, 0x100: 8, 0x101: 8, 0x102: 7, 0x103: 0}
    elements = [struct.pack("<HH2sHH", 0x28, tag, b"US", 2, value) for tag, value in numbers.items()]
    elements.insert(1, struct.pack("<HH2sH", 0x28, 4, b"CS", 12) + b"MONOCHROME2 ")
    return texts + b"".join(elements)


def deflated(*parts: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join(deflater.compress(part) for part in parts) + deflater.flush()


def deflated_zeros(folder: Path) -> Path:
    """A gigabyte of zeros in an element before the pixels."""
    private = struct.pack("<HH2sHI", 9, 0x1001, b"OB", 0, 2**30)
    return bomb(folder, "zeros", b"1.2.840.10008.1.2.1.99", deflated(private, *[bytes(2**20)] * 1024))


def deflated_pixels(folder: Path) -> Path:
    """An image that inflates to a gigabyte."""
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, 2**30)
    return bomb(folder, "pixels", b"1.2.840.10008.1.2.1.99", deflated(image_header(4096) + pixels, *[bytes(2**20)] * 1024))


def nested_sequences(folder: Path) -> Path:
    """400 sequences, one in the other."""
    opening = struct.pack("<HH2sHI", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    closing = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return bomb(folder, "nested", b"1.2.840.10008.1.2.1\0", opening * 400 + closing * 400)


def run_lengths(folder: Path) -> Path:
    """A kilobyte of RLE that claims to be 65535 x 65535 pixels."""
    frame = struct.pack("<16I", 1, 64, *([0] * 14)) + b"\x81\x00" * 500
    items = struct.pack("<HHI", 0xFFFE, 0xE000, 0) + struct.pack("<HHI", 0xFFFE, 0xE000, len(frame)) + frame
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF) + items + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return bomb(folder, "rle", b"1.2.840.10008.1.2.5\0", image_header(65535) + pixels)
