"""One selected series as a Volume: values in the modality's units, in patient space or in the plane of a projection.

Native pixels are read from the file straight to their place; compressed ones come from child processes. Must never guess geometry,
trust a size before it is checked, or die of a file that cannot be decoded. Must never import torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import ExplicitVRBigEndian

from dicomnode.analysis.attributes import once_for_shared, value_of
from dicomnode.analysis.decoding import NATIVE, Decoder, EncodedFrame, is_decodable
from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import Frame
from dicomnode.analysis.geometry import plane_of, stack_of
from dicomnode.analysis.select import SelectedSeries
from dicomnode.analysis.stored import PixelPlace, Unreadable, pixels_of
from dicomnode.analysis.units import FORMAT_ATTRIBUTES, UNITS_ATTRIBUTES, PixelFormat, Units, clean, convert, format_of, units_of
from dicomnode.errors import AnalysisFailed
from dicomnode.findings import Volume, Voxels

PROJECTIONS = frozenset({"CR", "DX", "IO", "MG", "PX", "RF", "RG", "XA"})  # modalities whose images have no place in the patient
MAXIMUM_THREADS = 4  # that read: more wait for memory
WORTH_A_THREAD = 16 * 2**20  # bytes


@dataclass(frozen=True, kw_only=True)
class _Plane:
    """One slice of the volume: where its pixels lie, how they are stored, and what makes units of them."""

    file: Path
    index: int  # of the frame in the file, from 0
    place: PixelPlace
    pixels: PixelFormat
    units: Units
    sop_instance_uid: str


class _DoesNotFit(Exception):
    """A value is beyond int16."""


def read_volume(selected: SelectedSeries, decoder: Decoder | None = None) -> Volume:
    """Read a series into the modality's units (CT: HU), slices sorted by position; or one projection.

    int16 where each value is exact in it, else float32, rounded once. Pixel Padding Value (0028,0120) becomes air in CT and the image's
    smallest value elsewhere: it marks what lies outside the image, holds no measurement, and as it stands (often -3024 HU) would
    bleed into its neighbours when the volume is resampled. A projection in MONOCHROME1 is turned round, so that air is dark.

    Compressed images are decoded by `decoder`, without one by children started for this call.

    Raises:
        NotEligible: the series is no even stack of slices, or its pixels are of a kind that the node doesn't read.
        AnalysisFailed: an image cannot be decoded, or its pixels contradict its header; names its SOP Instance UID.
    """
    frames, projection = list(selected.frames), is_projection(selected.frames)
    if projection:
        plane = plane_of(frames[0])
        affine, calibration = plane.affine, plane.calibration
    else:
        stack = stack_of([frame.header for frame in frames])
        affine, calibration = stack.affine, "patient"
        frames = [frames[i] for i in stack.order]
    voxels = read_voxels(frames, projection=projection, decoder=decoder)
    first = frames[0].header
    numbers = [frame.number for frame in frames]
    return Volume(
        voxels=voxels,
        affine=affine,
        sop_instance_uids=tuple(_uid(frame) for frame in frames),
        series_instance_uid=selected.series_instance_uid,
        study_instance_uid=str(first.StudyInstanceUID),
        frame_of_reference_uid=None if projection else str(first.FrameOfReferenceUID),
        modality=str(first.Modality),
        frame_numbers=None if all(number is None for number in numbers) else tuple(number or 1 for number in numbers),
        calibration=calibration,
    )


def read_voxels(frames: Sequence[Frame], *, projection: bool, decoder: Decoder | None = None) -> Voxels:
    """Return the frames' values in the modality's units, (frames, rows, columns) in their order, as `read_volume` does.

    The frames have Rows and Columns in common, and their product has been checked. Raises what `read_volume` raises of pixels.
    """
    planes = _planes(frames, projection=projection)
    try:
        return _read(planes, np.dtype(np.int16), decoder)
    except _DoesNotFit:
        return _read(planes, np.dtype(np.float32), decoder)


def is_projection(frames: Sequence[Frame]) -> bool:
    """Whether this is one image of a modality that projects."""
    return len(frames) == 1 and frames[0].header.get("Modality") in PROJECTIONS


def _planes(frames: Sequence[Frame], *, projection: bool) -> list[_Plane]:
    """Find the pixels of all slices, and check that they are there before anything is allocated for them."""
    format_by_header = once_for_shared(FORMAT_ATTRIBUTES, format_of)
    units_by_header = once_for_shared(UNITS_ATTRIBUTES, partial(units_of, projection=projection))
    formats = [format_by_header(frame.header) for frame in frames]
    places: dict[Path, PixelPlace] = {}
    planes = []
    for frame, pixels in zip(frames, formats, strict=True):
        uid = _uid(frame)
        if frame.file not in places:
            places[frame.file] = _place(frame, uid)
        place = places[frame.file]
        index = (frame.number or 1) - 1
        if place.transfer_syntax_uid in NATIVE:
            _check_native(place, pixels, index, uid)
        units = units_by_header(frame.header)
        planes.append(_Plane(file=frame.file, index=index, place=place, pixels=pixels, units=units, sop_instance_uid=uid))
    return planes


def _uid(frame: Frame) -> str:
    uid = value_of(frame.image, "SOPInstanceUID")
    return "?" if uid is None else str(uid)


def _place(frame: Frame, uid: str) -> PixelPlace:
    """Return where the pixels are: as was seen when the header was read, if the file has not changed its size since."""
    place: PixelPlace | None = getattr(frame.image, "pixels", None)
    try:
        if place is None or frame.file.stat().st_size != place.file_bytes:
            place = pixels_of(frame.file)
    except (Unreadable, OSError) as error:
        raise AnalysisFailed(f"The image {uid} cannot be read ({type(error).__name__}).") from error
    if place is None:
        raise AnalysisFailed(f"The image {uid} has no pixel data.")
    if not is_decodable(place.transfer_syntax_uid):
        name = place.transfer_syntax_uid.name
        raise NotEligible("transfer-syntax", f"The pixels are encoded as {name}, which the node doesn't decode.")
    return place


def _check_native(place: PixelPlace, pixels: PixelFormat, index: int, uid: str) -> None:
    end = (index + 1) * pixels.frame_bytes
    if place.length is None or place.length < end or place.offset + end > place.file_bytes:
        raise AnalysisFailed(f"The image {uid} cannot be decoded: it has fewer pixels than its header says.")


def _read(planes: Sequence[_Plane], dtype: np.dtype[Any], decoder: Decoder | None) -> Voxels:
    """Return the planes' values in units as one array of this type.

    Raises:
        _DoesNotFit: the type is int16, and a value is not exact in it.
    """
    kinds = {id(plane.units): plane for plane in planes}.values()
    if dtype == np.int16 and any(plane.units.fits_int16(plane.pixels) is False for plane in kinds):
        raise _DoesNotFit
    pixels = planes[0].pixels
    voxels: Voxels = np.empty((len(planes), pixels.rows, pixels.columns), dtype=dtype)
    native = [k for k, plane in enumerate(planes) if plane.place.transfer_syntax_uid in NATIVE]
    _read_native(planes, native, voxels)
    encoded = [k for k, plane in enumerate(planes) if plane.place.transfer_syntax_uid not in NATIVE]
    if encoded and decoder is None:
        with Decoder() as own:
            _read_encoded(planes, encoded, voxels, own)
    elif encoded and decoder is not None:
        _read_encoded(planes, encoded, voxels, decoder)
    return voxels


def _read_native(planes: Sequence[_Plane], wanted: Sequence[int], voxels: Voxels) -> None:
    threads = min(MAXIMUM_THREADS, len(os.sched_getaffinity(0)), 1 + voxels.nbytes // WORTH_A_THREAD, len(wanted))
    if threads < 2:
        _read_native_part(planes, wanted, voxels)
        return
    parts = [wanted[i * len(wanted) // threads : (i + 1) * len(wanted) // threads] for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: _read_native_part(planes, part, voxels), parts))


def _read_native_part(planes: Sequence[_Plane], wanted: Sequence[int], voxels: Voxels) -> None:
    """Read some planes, one after another; neighbours of one file through one descriptor."""
    opened: Path | None = None
    descriptor = -1
    try:
        for k in wanted:
            plane = planes[k]
            if plane.file != opened:
                if descriptor >= 0:
                    os.close(descriptor)
                descriptor, opened = os.open(plane.file, os.O_RDONLY), plane.file
            _read_native_plane(descriptor, plane, voxels[k])
    except OSError as error:
        raise AnalysisFailed(f"The image {plane.sop_instance_uid} cannot be read ({type(error).__name__}).") from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _read_native_plane(descriptor: int, plane: _Plane, out: Voxels) -> None:
    pixels = plane.pixels
    in_place = out.dtype == np.int16 and pixels.bits_allocated == 16 and plane.units.lookup is None
    stored: NDArray[Any] = out.view(pixels.dtype) if in_place else np.empty((pixels.rows, pixels.columns), dtype=pixels.dtype)
    _read_bytes(descriptor, plane, stored.reshape(-1).view(np.uint8).data)
    if plane.place.transfer_syntax_uid == ExplicitVRBigEndian:
        _swap(stored, plane)
    _convert(stored, plane, out)


def _read_bytes(descriptor: int, plane: _Plane, target: memoryview) -> None:
    offset, done = plane.place.offset + plane.index * plane.pixels.frame_bytes, 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if not count:
            raise AnalysisFailed(f"The image {plane.sop_instance_uid} cannot be decoded: its file is cut off.")
        done += count


def _swap(stored: NDArray[Any], plane: _Plane) -> None:
    """Bring big endian values to little endian; bytes too lie in words of 16 bits where the VR is OW (PS3.5 8.1.1)."""
    if plane.pixels.bits_allocated > 8:
        stored.byteswap(inplace=True)
    elif plane.place.vr == "OW" and stored.size % 2 == 0:
        stored.reshape(-1).view(np.uint16).byteswap(inplace=True)


def _read_encoded(planes: Sequence[_Plane], wanted: Sequence[int], voxels: Voxels, decoder: Decoder) -> None:
    encoded = [
        EncodedFrame(
            file=planes[k].file, index=planes[k].index, shape=(planes[k].pixels.rows, planes[k].pixels.columns),
            sop_instance_uid=planes[k].sop_instance_uid,
        )
        for k in wanted
    ]  # fmt: skip

    def use(i: int, decoded: NDArray[Any]) -> None:
        plane = planes[wanted[i]]
        if decoded.dtype != plane.pixels.dtype:
            raise AnalysisFailed(f"The image {plane.sop_instance_uid} holds pixels of another format than its header says.")
        _convert(decoded.copy(), plane, voxels[wanted[i]])

    decoder.decode(encoded, use)


def _convert(stored: NDArray[Any], plane: _Plane, out: Voxels) -> None:
    clean(stored, plane.pixels)
    if not convert(stored, plane.pixels, plane.units, out):
        raise _DoesNotFit
