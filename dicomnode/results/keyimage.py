"""Pictures for people: a finding's outline on its image, read from the SEG as a PACS would get it.

Must never fill the outline, or crop the image: what lies under and beside a finding is what the reader must judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset

from dicomnode.results.decoding import frame_pixels

RESEARCH = "RESEARCH USE ONLY - NOT FOR DIAGNOSIS"
LUNG_WINDOW = (-600.0, 1500.0)  # centre and width, HU

_OUTLINE = (255, 210, 0)
_TEXT = (235, 235, 235)
_SHORT_SIDE = 768  # an image is enlarged by a whole factor to at least this many pixels, so that outline and text are readable
_BAND = 26  # height of a line of text


def draw_outline(
    image: NDArray[np.float32],
    mask: NDArray[np.bool_],
    *,
    caption: str,
    window: tuple[float, float] = LUNG_WINDOW,
    inset: bool = False,
) -> bytes:
    """Return a PNG of the image with the mask's outline and a caption below.

    Args:
        image: (rows, columns) in the modality's units, CT: HU.
        mask: (rows, columns); all False draws no outline.
        caption: a line of text; a second line always says RESEARCH USE ONLY.
        window: centre and width in the image's units.
        inset: also show the mask's surroundings, enlarged, over the corner farthest from it.
    """
    grey = _windowed(image, window)
    factor = max(1, -(-_SHORT_SIDE // min(grey.shape)))
    canvas = _outlined(grey, mask, factor, thickness=2)
    if inset and mask.any():
        _paste_inset(canvas, grey, mask)
    picture = Image.new("RGB", (canvas.shape[1], canvas.shape[0] + 2 * _BAND))
    picture.paste(Image.fromarray(canvas), (0, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=_BAND * 0.6)
    draw.text((8, canvas.shape[0] + 3), caption, fill=_TEXT, font=font)
    draw.text((8, canvas.shape[0] + _BAND + 3), RESEARCH, fill=_OUTLINE, font=font)
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def draw_result(source_files: Sequence[Path], segmentation: Path) -> list[bytes]:
    """Return one PNG for each segment of a SEG file: its slice of largest area, on the source image that the SEG names.

    Raises:
        KeyError: the SEG names a source image that is not among `source_files`.
    """
    seg = pydicom.dcmread(segmentation)
    files = _by_uid(source_files)
    shared = seg.SharedFunctionalGroupsSequence[0]
    numbers = [_segment_number(frame, shared) for frame in seg.PerFrameFunctionalGroupsSequence]
    pictures = []
    for item in seg.SegmentSequence:
        mine = [i for i, number in enumerate(numbers) if number == item.SegmentNumber]
        largest = max(mine, key=lambda i: int(frame_pixels(seg, i).sum()))
        uid = str(seg.PerFrameFunctionalGroupsSequence[largest].DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        source = pydicom.dcmread(files[uid])
        caption = f"{item.SegmentLabel}  |  {seg.SeriesDescription}  |  image {source.get('InstanceNumber', '')}"
        image, window = _image(source)
        pictures.append(draw_outline(image, frame_pixels(seg, largest), caption=caption, window=window, inset=True))
    return pictures


def draw_plain(source_files: Sequence[Path], caption: str = "no finding") -> bytes:
    """Return a PNG of the middle image of a series (by position along the slice normal) with a caption and no outline.

    Raises:
        ValueError: there is no file.
    """
    if not source_files:
        raise ValueError("there is no image to draw")
    headers = [(_position(pydicom.dcmread(f, stop_before_pixels=True)), i) for i, f in enumerate(source_files)]
    image, window = _image(pydicom.dcmread(source_files[sorted(headers)[len(headers) // 2][1]]))
    return draw_outline(image, np.zeros(image.shape, dtype=np.bool_), caption=caption, window=window)


def _image(source: Dataset) -> tuple[NDArray[np.float32], tuple[float, float]]:
    """Pixels in the modality's units, and how to show them: CT in the lung window, else the image's own window or its range."""
    slope, intercept = float(source.get("RescaleSlope", 1)), float(source.get("RescaleIntercept", 0))
    image = (source.pixel_array * slope + intercept).astype(np.float32)
    if image.ndim == 3:  # several frames
        image = image[len(image) // 2]
    if source.get("Modality") == "CT":
        return image, LUNG_WINDOW
    low, high = (float(v) for v in np.percentile(image, (1, 99)))
    return image, ((low + high) / 2, max(high - low, 1.0))


def _windowed(image: NDArray[np.float32], window: tuple[float, float]) -> NDArray[np.uint8]:
    centre, width = window
    grey: NDArray[np.uint8] = np.clip((image - (centre - width / 2)) * (255.0 / width), 0, 255).astype(np.uint8)
    return grey


def _outlined(grey: NDArray[np.uint8], mask: NDArray[np.bool_], factor: int, *, thickness: int) -> NDArray[np.uint8]:
    """Enlarge by a whole factor and colour the pixels just outside of the mask: what is marked stays visible."""
    canvas = np.repeat(np.asarray(_enlarged(grey, factor))[..., None], 3, axis=2)
    large = mask.repeat(factor, axis=0).repeat(factor, axis=1)
    grown = np.pad(large, thickness)
    for _ in range(thickness):
        grown = grown | np.roll(grown, 1, 0) | np.roll(grown, -1, 0) | np.roll(grown, 1, 1) | np.roll(grown, -1, 1)
    canvas[grown[thickness:-thickness, thickness:-thickness] & ~large] = _OUTLINE
    return canvas


def _enlarged(grey: NDArray[np.uint8], factor: int) -> Image.Image:
    return Image.fromarray(grey).resize((grey.shape[1] * factor, grey.shape[0] * factor), Image.Resampling.BICUBIC)


def _paste_inset(canvas: NDArray[np.uint8], grey: NDArray[np.uint8], mask: NDArray[np.bool_]) -> None:
    """Draw the mask's surroundings, about a third of the picture wide, into the corner of `canvas` opposite to the mask."""
    rows, columns = np.nonzero(mask)
    centre_row, centre_column = int((rows[0] + rows[-1]) // 2), int((columns.min() + columns.max()) // 2)
    half = min(max(24, int(max(np.ptp(rows), np.ptp(columns)))), min(grey.shape) // 2)
    top, left = (min(max(0, c - half), n - 2 * half) for c, n in zip((centre_row, centre_column), grey.shape, strict=True))
    part = (slice(top, top + 2 * half), slice(left, left + 2 * half))
    factor = max(1, min(canvas.shape[:2]) // 3 // (2 * half))
    small = np.pad(_outlined(grey[part], mask[part], factor, thickness=2), ((2, 2), (2, 2), (0, 0)), constant_values=200)
    size = small.shape[0]
    low = slice(0, size) if centre_row > grey.shape[0] / 2 else slice(canvas.shape[0] - size, None)
    far = slice(0, size) if centre_column > grey.shape[1] / 2 else slice(canvas.shape[1] - size, None)
    canvas[low, far] = small


def _segment_number(frame: Dataset, shared: Dataset) -> int:
    holder = frame if "SegmentIdentificationSequence" in frame else shared
    return int(holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber)


def _by_uid(files: Sequence[Path]) -> dict[str, Path]:
    return {str(pydicom.dcmread(file, specific_tags=["SOPInstanceUID"]).SOPInstanceUID): file for file in files}


def _position(header: Dataset) -> float:
    """Where an image lies along its normal, mm; 0 without geometry."""
    if "ImageOrientationPatient" not in header or "ImagePositionPatient" not in header:
        return 0.0
    cosines = np.array(header.ImageOrientationPatient, dtype=np.float64)
    return float(np.cross(cosines[:3], cosines[3:]) @ np.array(header.ImagePositionPatient, dtype=np.float64))
