"""Pictures for people: a finding's outline on its image, read from the SEG as a PACS would get it.

Must never fill the outline, or crop the image: what lies under and beside a finding is what the reader must judge. An image that
cannot be decoded is a note, never a crash.
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
from dicomnode.results.display import LUNG_WINDOW, UNREADABLE, frame_count, grey_values
from dicomnode.results.drawing import LONG_SIDE, RESEARCH, Colour, Outlines, broken, trace

MOST = 20  # pictures of one SEG; the caption of the last says how many segments aren't drawn
UNDECODED = "the image cannot be decoded here"

_COLOURS = {"": (255, 210, 0), "box": (0, 200, 255), "heat map": (255, 140, 0)}  # by the ending of a segment's label
_OUTLINE = _COLOURS[""]
_REFERENCE = (0, 220, 160)
_TEXT = (235, 235, 235)
_SHORT_SIDE = 768  # an image is enlarged by a whole factor to at least this many pixels, so that outline and text are readable
_BAND = 26  # height of a line of text
_LINES = 5  # of a caption
_LUNG = "39607008"


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
        caption: a line of text, broken where it is too long; the last line always says RESEARCH USE ONLY.
        window: centre and width in the image's units.
        inset: also show the mask's surroundings, enlarged, over the corner farthest from it.
    """
    centre, width = window
    grey: NDArray[np.uint8] = np.clip((image - (centre - width / 2)) * (255.0 / width), 0, 255).astype(np.uint8)
    return _picture(grey, mask, caption, inset=inset)


def draw_comparison(grey: NDArray[np.uint8], marked: NDArray[np.bool_], reference: NDArray[np.bool_], *, caption: str) -> bytes:
    """Return a PNG of an image with the outline of a reference (green) and, over it, of what was marked (yellow), and a caption below.

    Args:
        grey: (rows, columns), 0 to 255.
        marked: (rows, columns); all False draws no outline.
        reference: the same.
        caption: a line of text, broken where it is too long; the last line always says RESEARCH USE ONLY.
    """
    return _picture(grey, marked, caption, inset=True, reference=reference)


def draw_result(source_files: Sequence[Path], segmentation: Path) -> list[bytes]:
    """Return one PNG for each of the first segments of a SEG file: its slice of largest area, on the source image that the SEG names.

    Raises:
        KeyError: the SEG names a source image that is not among `source_files`.
    """
    seg = pydicom.dcmread(segmentation)
    files = _by_uid(source_files)
    shared = seg.SharedFunctionalGroupsSequence[0]
    mine: dict[int, list[int]] = {int(item.SegmentNumber): [] for item in seg.SegmentSequence}
    for i, frame in enumerate(seg.PerFrameFunctionalGroupsSequence):
        mine[_segment_number(frame, shared)].append(i)
    pictures = []
    drawn = list(seg.SegmentSequence)[:MOST]
    for number, item in enumerate(drawn, start=1):
        largest = max(mine[int(item.SegmentNumber)], key=lambda i: int(np.count_nonzero(frame_pixels(seg, i))))
        source = seg.PerFrameFunctionalGroupsSequence[largest].DerivationImageSequence[0].SourceImageSequence[0]
        frame = source.get("ReferencedFrameNumber")
        file = files[str(source.ReferencedSOPInstanceUID)]
        where = f"image {_instance_number(file)}" + (f", frame {frame}" if frame is not None else "")
        caption = f"{item.SegmentLabel}  |  {seg.SeriesDescription}  |  {where}"
        if number == MOST and len(seg.SegmentSequence) > MOST:
            caption += f"  |  {len(seg.SegmentSequence) - MOST} more segments are not drawn"
        mask = frame_pixels(seg, largest)
        lung = any(region.get("CodeValue") == _LUNG for region in item.get("AnatomicRegionSequence", []))
        grey = grey_values(file, frame=int(frame or 1), lung=lung)
        if grey is None or grey.shape != mask.shape:
            grey, caption = np.zeros(mask.shape, dtype=np.uint8), f"{caption}  |  {UNDECODED}"
        ending = str(item.SegmentLabel).rpartition(", ")[2]
        pictures.append(_picture(grey, mask, caption, inset=True, colour=_COLOURS.get(ending, _OUTLINE)))
    return pictures


def draw_plain(source_files: Sequence[Path], caption: str = "no finding") -> bytes:
    """Return a PNG of the middle image of a series (by position along the slice normal) with a caption and no outline.

    Where that image can't be decoded the picture is black and its caption says so.

    Raises:
        ValueError: there is no file, or none that is a DICOM image.
    """
    images = []
    for file in source_files:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True)
            if "Rows" in header and "Columns" in header:
                images.append((_position(header), str(file), header))
        except UNREADABLE:
            continue
    if not images:
        raise ValueError("there is no image to draw")
    _, middle, header = sorted(images, key=lambda entry: entry[:2])[len(images) // 2]
    frame = frame_count(header) // 2 + 1
    grey = grey_values(Path(middle), frame=frame, lung=str(header.get("BodyPartExamined", "")).upper() in ("CHEST", "LUNG"))
    if grey is None:
        grey, caption = np.zeros((_SHORT_SIDE // 2, _SHORT_SIDE), dtype=np.uint8), f"{caption}  |  {UNDECODED}"
    return _picture(grey, np.zeros(grey.shape, dtype=np.bool_), caption)


def _picture(
    grey: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    caption: str,
    *,
    inset: bool = False,
    colour: Colour = _OUTLINE,
    reference: NDArray[np.bool_] | None = None,
) -> bytes:
    outlines = [(mask, colour)] if reference is None else [(reference, _REFERENCE), (mask, colour)]
    whole = grey
    grey = _reduced(whole, mask)[0]
    outlines = [(_reduced(whole, outline)[1], its_colour) for outline, its_colour in outlines]
    factor = max(1, min(-(-_SHORT_SIDE // min(grey.shape)), LONG_SIDE // max(grey.shape)))
    canvas = _outlined(grey, outlines, factor)
    if inset and any(outline.any() for outline, _ in outlines):
        _paste_inset(canvas, grey, outlines)
    font = ImageFont.load_default(size=_BAND * 0.6)
    width = max(canvas.shape[1], _SHORT_SIDE)  # a narrow image leaves room for its caption
    lines = broken(caption, font, width - 16, most=_LINES)
    picture = Image.new("RGB", (width, canvas.shape[0] + (len(lines) + 1) * _BAND))
    picture.paste(Image.fromarray(canvas), (0, 0))
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((8, canvas.shape[0] + number * _BAND + 3), line, fill=_TEXT, font=font)
    draw.text((8, canvas.shape[0] + len(lines) * _BAND + 3), RESEARCH, fill=_OUTLINE, font=font)
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _reduced(grey: NDArray[np.uint8], mask: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A large image made smaller; a pixel that holds any part of the mask belongs to it."""
    if max(grey.shape) <= LONG_SIDE:
        return grey, mask
    scale = LONG_SIDE / max(grey.shape)
    size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    small = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BOX))
    return small, np.asarray(Image.fromarray(mask.astype(np.float32), mode="F").resize(size, Image.Resampling.BOX)) > 0


def _outlined(grey: NDArray[np.uint8], outlines: Outlines, factor: int) -> NDArray[np.uint8]:
    """Enlarge by a whole factor, and trace the masks."""
    large = Image.fromarray(grey).resize((grey.shape[1] * factor, grey.shape[0] * factor), Image.Resampling.BICUBIC)
    canvas = np.repeat(np.asarray(large)[..., None], 3, axis=2)
    trace(canvas, [(mask.repeat(factor, axis=0).repeat(factor, axis=1), colour) for mask, colour in outlines])
    return canvas


def _paste_inset(canvas: NDArray[np.uint8], grey: NDArray[np.uint8], outlines: Outlines) -> None:
    """Draw the masks' surroundings, about a third of the picture wide, into the corner of `canvas` opposite to them.

    A finding that would not be larger there than in the picture itself gets none.
    """
    rows, columns = np.nonzero(np.logical_or.reduce([mask for mask, _ in outlines]))
    centre_row, centre_column = int((rows[0] + rows[-1]) // 2), int((columns.min() + columns.max()) // 2)
    half = min(max(24, int(max(np.ptp(rows), np.ptp(columns)))), min(grey.shape) // 2)
    top, left = (min(max(0, c - half), n - 2 * half) for c, n in zip((centre_row, centre_column), grey.shape, strict=True))
    part = (slice(top, top + 2 * half), slice(left, left + 2 * half))
    factor = min(canvas.shape[:2]) // 3 // (2 * half)
    if factor <= canvas.shape[0] // grey.shape[0]:
        return
    near = [(mask[part], colour) for mask, colour in outlines]
    small = np.pad(_outlined(grey[part], near, factor), ((2, 2), (2, 2), (0, 0)), constant_values=200)
    size = small.shape[0]
    low = slice(0, size) if centre_row > grey.shape[0] / 2 else slice(canvas.shape[0] - size, None)
    far = slice(0, size) if centre_column > grey.shape[1] / 2 else slice(canvas.shape[1] - size, None)
    canvas[low, far] = small


def _segment_number(frame: Dataset, shared: Dataset) -> int:
    holder = frame if "SegmentIdentificationSequence" in frame else shared
    return int(holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber)


def _by_uid(files: Sequence[Path]) -> dict[str, Path]:
    found = {}
    for file in files:
        try:
            found[str(pydicom.dcmread(file, specific_tags=["SOPInstanceUID"]).SOPInstanceUID)] = file
        except UNREADABLE:
            continue
    return found


def _instance_number(file: Path) -> str:
    return str(pydicom.dcmread(file, specific_tags=["InstanceNumber"]).get("InstanceNumber", ""))


def _position(header: Dataset) -> float:
    """Where an image lies along its normal, mm; 0 without geometry."""
    try:
        cosines = np.array(header.ImageOrientationPatient, dtype=np.float64)
        return float(np.cross(cosines[:3], cosines[3:]) @ np.array(header.ImagePositionPatient, dtype=np.float64))
    except UNREADABLE:
        return 0.0
