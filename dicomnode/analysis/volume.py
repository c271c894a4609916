"""One selected series as a Volume: values in the modality's units on an orthogonal grid in patient space.

Must never guess geometry, trust a size before it is checked, or die of a file that cannot be decoded. Must never import torch.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import JPEG2000, JPEG2000Lossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless, RLELossless

from dicomnode.analysis.eligibility import check_pixels
from dicomnode.analysis.geometry import MAXIMUM_EDGE, stack_of
from dicomnode.analysis.select import SelectedSeries
from dicomnode.errors import AnalysisFailed
from dicomnode.findings import Volume

AIR_HU = -1000.0

# One decoder for each syntax that CT comes in, so that the same file gives the same voxels wherever the node is installed.
DECODERS: Mapping[str, str] = {
    RLELossless: "pylibjpeg",  # pydicom's own goes on where segments are broken
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
}

# What pydicom and the decoders behind it raise on malformed, truncated or unsupported data.
_DECODING_FAILS = (
    InvalidDicomError, ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, struct.error,
)  # fmt: skip


def read_volume(selected: SelectedSeries) -> Volume:
    """Read a CT series into Hounsfield units, slices sorted by position.

    Pixel Padding Value (0028,0120) becomes air: it marks what lies outside the reconstructed circle, holds no measurement, and
    as it stands (often -3024 HU) would bleed into its neighbours when the volume is resampled.

    Raises:
        NotEligible: the series is no even stack of slices in Hounsfield units.
        AnalysisFailed: an image cannot be decoded, or its pixels contradict its header; names its SOP Instance UID.
    """
    stack = stack_of([frame.header for frame in selected.frames])
    headers = [selected.frames[i].header for i in stack.order]
    files = [selected.frames[i].file for i in stack.order]
    for header in headers:
        check_pixels(header)
    rows, columns = int(headers[0].Rows), int(headers[0].Columns)
    voxels = np.empty((len(files), rows, columns), dtype=np.float32)
    for slice_, file, header in zip(voxels, files, headers, strict=True):
        _read_hounsfield(file, header, slice_)
    first = headers[0]
    return Volume(
        voxels=voxels,
        affine=stack.affine,
        sop_instance_uids=tuple(str(header.SOPInstanceUID) for header in headers),
        series_instance_uid=selected.series_instance_uid,
        study_instance_uid=str(first.StudyInstanceUID),
        frame_of_reference_uid=str(first.FrameOfReferenceUID),
        modality=str(first.Modality),
    )


def _read_hounsfield(file: Path, header: Dataset, out: NDArray[np.float32]) -> None:
    """Decode one image into `out` (rows, columns)."""
    uid = str(header.get("SOPInstanceUID", "?"))
    try:
        image = pydicom.dcmread(file)
        _check_codestream(image, out.shape)
        syntax = image.file_meta.TransferSyntaxUID
        stored, _ = get_decoder(syntax).as_array(image, raw=True, decoding_plugin=DECODERS.get(syntax, ""))
    except _DECODING_FAILS as error:
        raise AnalysisFailed(f"The image {uid} cannot be decoded ({type(error).__name__}).") from error
    if stored.shape != out.shape:
        raise AnalysisFailed(f"The image {uid} holds pixels of another size than its header says.")
    np.multiply(stored, np.float32(header.RescaleSlope), out=out, casting="unsafe")
    out += np.float32(header.RescaleIntercept)
    padding = _padding(header)
    if padding is not None:
        out[(stored >= padding[0]) & (stored <= padding[1])] = AIR_HU


def _padding(header: Dataset) -> tuple[int, int] | None:
    """Return the smallest and largest padding value (PS3.3 C.7.5.1.1.2) as stored: many writers encode signed ones as unsigned."""
    values = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = header.get(keyword)
        if isinstance(value, int):
            bits = int(header.BitsAllocated)
            wrapped = value % 2**bits
            values.append(wrapped - 2**bits if header.PixelRepresentation == 1 and wrapped >= 2 ** (bits - 1) else wrapped)
    return (min(values), max(values)) if values and isinstance(header.get("PixelPaddingValue"), int) else None


def _check_codestream(image: Dataset, shape: tuple[int, ...]) -> None:
    """Compare the size that a JPEG, JPEG-LS or JPEG 2000 stream claims with the header's, before a decoder allocates it.

    Raises:
        ValueError: they differ, or Rows or Columns is beyond the limit.
    """
    if (image.Rows, image.Columns) != shape or max(shape) > MAXIMUM_EDGE:
        raise ValueError("the image's size is not that of its series")
    if not image.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    claimed = _claimed_size(get_frame(image.PixelData, 0, number_of_frames=1))
    if claimed is not None and claimed != shape:
        raise ValueError("the stream's size is not the header's")


def _claimed_size(stream: bytes) -> tuple[int, int] | None:
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
