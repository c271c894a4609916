"""Decoding in child processes: an image may cost a child, never the node or the next image."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from ct_series import write_series
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from dicomnode.analysis.decoding import Decoder, EncodedFrame
from dicomnode.errors import AnalysisFailed

SHAPE = (64, 48)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(processes=1, seconds=120) as children:
        yield children


def stored_values(slices: int = 3) -> NDArray[np.int16]:
    return np.random.default_rng(1).integers(-1000, 2000, (slices, *SHAPE)).astype(np.int16)


def compressed(folder: Path, syntax: str, stored: NDArray[Any]) -> list[EncodedFrame]:
    files = write_series(folder, stored)
    for file in files:
        image = pydicom.dcmread(file)
        if syntax == DeflatedExplicitVRLittleEndian:
            image.file_meta.TransferSyntaxUID = syntax
        else:
            image.compress(syntax, generate_instance_uid=False)
        image.save_as(file)
    return [frame_of(file) for file in files]


def frame_of(file: Path, index: int = 0, shape: tuple[int, int] = SHAPE) -> EncodedFrame:
    return EncodedFrame(file=file, index=index, shape=shape, sop_instance_uid=f"2.25.{file.stem}")


def decoded(decoder: Decoder, frames: list[EncodedFrame]) -> dict[int, NDArray[Any]]:
    values: dict[int, NDArray[Any]] = {}
    decoder.decode(frames, lambda i, stored: values.update({i: stored.copy()}))
    return values


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian])
def test_each_frame_arrives_once_with_its_own_values(tmp_path: Path, decoder: Decoder, syntax: str) -> None:
    stored = stored_values()
    values = decoded(decoder, compressed(tmp_path, syntax, stored))
    assert sorted(values) == [0, 1, 2]
    np.testing.assert_array_equal(np.stack([values[i] for i in range(3)]), stored)


def test_frames_of_one_file_are_told_apart(tmp_path: Path, decoder: Decoder) -> None:
    stored = stored_values(20)
    (file,) = write_series(tmp_path, stored[:1])
    image = pydicom.dcmread(file)
    image.NumberOfFrames, image.PixelData = 20, stored.tobytes()
    image.compress(RLELossless, generate_instance_uid=False)
    image.save_as(file)
    values = decoded(decoder, [frame_of(file, index) for index in range(20)])
    np.testing.assert_array_equal(np.stack([values[i] for i in range(20)]), stored)


def test_several_children_share_the_work(tmp_path: Path) -> None:
    stored = stored_values(6)
    with Decoder(processes=3) as children:
        values = decoded(children, compressed(tmp_path, RLELossless, stored))
    np.testing.assert_array_equal(np.stack([values[i] for i in range(6)]), stored)


def bomb(folder: Path, rows: int, columns: int) -> Path:
    """An RLE frame of a kilobyte that claims to be larger than any image."""
    (file,) = write_series(folder, stored_values(1), Rows=rows, Columns=columns, BitsAllocated=8, BitsStored=8, HighBit=7)
    image = pydicom.dcmread(file)
    image.file_meta.TransferSyntaxUID = RLELossless
    image.PixelData = encapsulate([struct.pack("<16I", 1, 64, *([0] * 14)) + b"\x81\x00" * 500])
    image["PixelData"].is_undefined_length = True
    image.save_as(file)
    return file


def test_a_child_without_memory_says_so_and_the_next_image_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    with Decoder(processes=1, memory_bytes=300 * 2**20) as small:
        with pytest.raises(AnalysisFailed, match=r"^The image 2\.25\.\S+ cannot be decoded: it needs more than 300 MiB of memory\.$"):
            decoded(small, [frame_of(bomb(tmp_path, 65535, 65535), shape=(65535, 65535))])
        (good,) = compressed(tmp_path / "good", RLELossless, stored_values(1))
        np.testing.assert_array_equal(decoded(small, [good])[0], stored_values(1)[0])


def test_a_child_that_hangs_is_ended_and_the_next_image_is_decoded(tmp_path: Path) -> None:
    (good,) = compressed(tmp_path, RLELossless, stored_values(1))
    pipe = tmp_path / "endless"
    os.mkfifo(pipe)  # whoever opens it waits for ever
    with Decoder(processes=1, seconds=1) as impatient:
        with pytest.raises(AnalysisFailed, match="cannot be decoded: it took longer than 1 s"):
            decoded(impatient, [frame_of(pipe)])
        with Decoder(processes=1) as patient:
            np.testing.assert_array_equal(decoded(patient, [good])[0], stored_values(1)[0])


def test_a_child_that_dies_is_replaced(tmp_path: Path, decoder: Decoder) -> None:
    (good,) = compressed(tmp_path, RLELossless, stored_values(1))
    decoded(decoder, [good])
    (child,) = decoder._idle
    child._process.kill()
    with pytest.raises(AnalysisFailed, match="its decoder died with signal 9"):
        decoded(decoder, [good])
    np.testing.assert_array_equal(decoded(decoder, [good])[0], stored_values(1)[0])


def test_a_file_that_is_no_image_costs_nothing_but_a_sentence(tmp_path: Path, decoder: Decoder) -> None:
    (tmp_path / "text").write_text("no DICOM")
    with pytest.raises(AnalysisFailed, match="cannot be decoded: its pixels are damaged or unsupported"):
        decoded(decoder, [frame_of(tmp_path / "text")])


def test_children_end_with_their_decoder(tmp_path: Path) -> None:
    with Decoder(processes=1) as children:
        decoded(children, compressed(tmp_path, RLELossless, stored_values(1)))
        (child,) = children._idle
    assert child._process.returncode is not None
