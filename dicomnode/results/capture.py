"""Findings become Secondary Capture images (PS3.3 A.8.1), for viewers that show images alone: outline, numbers and warning are burned in.

An image is shown whole, so side markers in its pixels stay, with letters for the directions that its header or its geometry gives.
Must never decide what is a finding, read a clock or draw a random number: the same findings give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from highdicom.color import CIELabColor
from highdicom.sc import SCImage
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from dicomnode.findings import Finding, Findings, ResultObject, RunIdentity, Volume
from dicomnode.results import change, codes, identity as uids, provenance
from dicomnode.results.display import grey_slice
from dicomnode.results.drawing import LONG_SIDE, RESEARCH, Colour, broken, trace
from dicomnode.results.report import said
from dicomnode.results.segmentation import coded

MOST = 10  # pictures of one run; each says how many findings are on none of them

_WARNING: Colour = (255, 210, 0)
_TEXT: Colour = (235, 235, 235)
_MARK: Colour = (255, 255, 255)
_OUTLINE: Colour = (255, 210, 0)  # where a finding's own colour would be lost among the greys
_VIVID = 96  # difference between a colour's channels
_LINE = 26  # height of a line of text, pixels
_LINES = 16  # of text at most
_NARROWEST = 640  # so that words have room beside a narrow image
_LUNG = "39607008"
_LETTERS = (("R", "L"), ("A", "P"), ("F", "H"))  # PS3.3 C.7.6.1.1.1: against and along each axis of LPS
_SIDE = ("BodyPartExamined", "Laterality", "ImageLaterality")  # of a paired part the side is demanded (PS3.3 C.7.3.1, C.7.6.1)
_OPPOSITE = str.maketrans("RLAPFH", "LRPAHF")


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """What one Secondary Capture shows."""

    pixels: NDArray[np.uint8]  # (rows, columns, 3)
    source: Dataset | None  # the reduced header of the image it stands on
    frame: int | None
    orientation: tuple[str, str] | None  # where its rows and columns run (PS3.3 C.7.6.1.1.1)
    derivation: str


def encode_captures(findings: Findings, volume: Volume, headers: Sequence[Dataset], identity: RunIdentity) -> tuple[ResultObject, ...]:
    """Return a picture of each slice that a finding is measured on, most probable findings first; without any one of the middle slice.

    A picture outlines each finding that its slice crosses. Pixels are square: the longer side has 1024, whatever the image has, and
    words stand below.
    """
    origin = next(header for header in headers if header.SOPInstanceUID == volume.sop_instance_uids[0])
    full = {str(header.SOPInstanceUID): header for header in headers}
    images = provenance.source_images(volume, headers)
    shown = _slices(findings, volume)
    words = said(findings, volume)[1:]
    missing = sum(not any(_crosses(finding, k) for k in shown) for finding in findings.findings)
    if missing:
        words.append(f"{missing} further finding{' is' if missing == 1 else 's are'} on none of these pictures.")
    made_by = f"{findings.algorithm_name}, {identity.package} {identity.version}"
    pictures = []
    for number, k in enumerate(shown, start=1):
        header, frame = full[volume.sop_instance_uids[k]], provenance.frame_number(volume, k)
        here = [finding for finding in findings.findings if _crosses(finding, k)]
        lines = [_described(finding, volume) for finding in here] or ["No finding."]
        place = f"Image {header.get('InstanceNumber', '')}" + (f", frame {frame}" if frame is not None else "")
        lines = [*lines, *words, f"{made_by}. {place}, picture {number} of {len(shown)}."]
        orientation = _orientation(volume, images[k])
        canvas = _on_square_pixels(volume, k, header, here)
        pictures.append(
            _Picture(
                pixels=_with_words(_with_marks(canvas, here, volume, orientation), lines),
                source=images[k],
                frame=frame,
                orientation=orientation,
                derivation=f"Outlines of {len(here)} findings burned in by {made_by}, pixels windowed and resampled. {RESEARCH}",
            )
        )
    return _encoded(pictures, origin, identity, manufacturer=findings.manufacturer, model=findings.algorithm_name)


def encode_reason(
    code: str, reason: str, headers: Sequence[Dataset], identity: RunIdentity, *, manufacturer: str, algorithm_name: str
) -> tuple[ResultObject, ...]:
    """Return one picture that says why a study was not analysed, or that its analysis failed: words alone, and no image."""
    lines = [f"Not analysed ({code}): {reason}", f"{algorithm_name}, {identity.package} {identity.version}."]
    page = _Picture(
        pixels=_with_words(np.zeros((_LINE, LONG_SIDE, 3), dtype=np.uint8), lines),
        source=None,
        frame=None,
        orientation=None,
        derivation=f"Words alone, of {algorithm_name}, {identity.package} {identity.version}. {RESEARCH}",
    )
    return _encoded([page], headers[0], identity, manufacturer=manufacturer, model=algorithm_name)


def _slices(findings: Findings, volume: Volume) -> list[int]:
    """The slices to show: of each finding the one that the report draws on, as long as there are not too many."""
    return list(dict.fromkeys(finding.key_slice for finding in findings.findings))[:MOST] or [len(volume.sop_instance_uids) // 2]


def _crosses(finding: Finding, k: int) -> bool:
    first = finding.segment.origin[0]
    return 0 <= k - first < len(finding.segment.mask) and bool(finding.segment.mask[k - first].any())


def _described(finding: Finding, volume: Volume) -> str:
    """A finding in one line."""
    measurements = [*finding.measurements, *change.numbers(finding)]
    numbers = [(m.name.meaning.lower(), f"{m.value:.3g}", m.unit.value.strip("{}")) for m in measurements]
    if finding.long_axis is not None and not any(m.name.value == codes.LONG_AXIS.value for m in finding.measurements):
        numbers.append(("long axis", f"{finding.long_axis.length_mm:.3g}", "pixels" if volume.calibration == "none" else "mm"))
    text = f"{finding.number}: {finding.label}"
    text += f", {finding.side}" if finding.side else ""
    text += f" ({finding.shape})" if finding.shape != "outline" else ""
    return f"{text}: " + ", ".join([*(" ".join(number) for number in numbers), f"certainty {100 * finding.probability:.0f} %"])


def _size(volume: Volume) -> tuple[int, int]:
    """Rows and columns of a slice on square pixels."""
    _, row_mm, column_mm = volume.spacing_mm
    high, wide = volume.voxels.shape[1] * row_mm, volume.voxels.shape[2] * column_mm
    scale = LONG_SIDE / max(high, wide)
    return max(1, round(high * scale)), max(1, round(wide * scale))


def _on_square_pixels(volume: Volume, k: int, header: Dataset, here: Sequence[Finding]) -> NDArray[np.uint8]:
    """The slice with its outlines, (rows, columns, 3). A pixel that holds any part of a mask belongs to it."""
    rows, columns = _size(volume)
    lung = any(finding.site is not None and finding.site.value == _LUNG for finding in here) or (
        not here and str(header.get("BodyPartExamined", "")).upper() in ("CHEST", "LUNG")
    )
    grey = Image.fromarray(grey_slice(volume.voxels[k], header, lung=lung))
    smaller = rows < grey.height or columns < grey.width
    grey = grey.resize((columns, rows), Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
    canvas = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    masks = []
    for finding in here:
        first, row, column = finding.segment.origin
        part = finding.segment.mask[k - first]
        mask = np.zeros(volume.voxels.shape[1:], dtype=np.float32)
        mask[row : row + part.shape[0], column : column + part.shape[1]] = part
        masks.append((np.asarray(Image.fromarray(mask, mode="F").resize((columns, rows), Image.Resampling.BOX)) > 0, _colour(finding)))
    trace(canvas, masks)
    return canvas


def _colour(finding: Finding) -> Colour:
    red, green, blue = (int(v) for v in CIELabColor(*finding.colour_cielab).to_rgb(clip=True))
    return (red, green, blue) if max(red, green, blue) - min(red, green, blue) >= _VIVID else _OUTLINE


def _with_marks(
    canvas: NDArray[np.uint8], here: Sequence[Finding], volume: Volume, orientation: tuple[str, str] | None
) -> NDArray[np.uint8]:
    """Each finding's number beside it, and the letters of the directions at the edges: without colour, so that outlines alone have one."""
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    rows, columns = canvas.shape[:2]
    scale = rows / volume.voxels.shape[1], columns / volume.voxels.shape[2]
    font = ImageFont.load_default(size=22)
    for finding in here:
        _, top, right, _ = finding.bounds_px
        x, y = min((right + 0.5) * scale[1] + 6, columns - 30), max((top + 0.5) * scale[0] - 24, 0)
        draw.text((x, y), str(finding.number), fill=_MARK, font=font, stroke_width=2, stroke_fill=0)
    if orientation is not None:
        row, column = orientation
        for text, x, y, anchor in (
            (row, columns - 8, rows / 2, "rm"), (row.translate(_OPPOSITE), 8, rows / 2, "lm"),
            (column, columns / 2, rows - 6, "mb"), (column.translate(_OPPOSITE), columns / 2, 6, "mt"),
        ):  # fmt: skip
            draw.text((x, y), text, anchor=anchor, fill=_MARK, font=font, stroke_width=2, stroke_fill=0)
    return np.asarray(picture)


def _with_words(canvas: NDArray[np.uint8], lines: Sequence[str]) -> NDArray[np.uint8]:
    """The picture with the warning and the lines below it, on black."""
    width = max(canvas.shape[1], _NARROWEST)
    large, small = ImageFont.load_default(size=26), ImageFont.load_default(size=18)
    wrapped = [part for line in lines for part in broken(provenance.ascii_text(line, 2000), small, width - 16, most=4)]
    if len(wrapped) > _LINES:
        wrapped = [*wrapped[: _LINES - 2], "...", wrapped[-1]]
    band = Image.new("RGB", (width, 44 + len(wrapped) * _LINE))
    draw = ImageDraw.Draw(band)
    draw.text((8, 6), RESEARCH, fill=_WARNING, font=large)
    for number, line in enumerate(wrapped):
        draw.text((8, 42 + number * _LINE), line, fill=_TEXT, font=small)
    whole = np.zeros((canvas.shape[0] + band.height, width, 3), dtype=np.uint8)
    whole[: canvas.shape[0], : canvas.shape[1]] = canvas
    whole[canvas.shape[0] :] = np.asarray(band)
    return whole


def _orientation(volume: Volume, image: Dataset) -> tuple[str, str] | None:
    """Where rows and columns run, as letters; None where nothing says it."""
    if not volume.is_projection:
        return _direction(volume.affine[:3, 2]), _direction(volume.affine[:3, 1])
    stated = image.get("PatientOrientation")
    if stated is None or len(stated) != 2 or not all(text and set(str(text)) <= set("RLAPFH") for text in stated):
        return None
    return str(stated[0]), str(stated[1])


def _direction(step: NDArray[np.float64]) -> str:
    """The letters of a direction in LPS, the largest part first; parts below a quarter aren't named."""
    cosines = step / np.linalg.norm(step)
    return "".join(_LETTERS[axis][int(cosines[axis] > 0)] for axis in np.argsort(-np.abs(cosines)) if abs(cosines[axis]) > 0.25)


def _encoded(
    pictures: Sequence[_Picture], origin: Dataset, identity: RunIdentity, *, manufacturer: str, model: str
) -> tuple[ResultObject, ...]:
    """The objects of one series, its instances in the order of the pictures."""
    made_by = {"manufacturer": manufacturer, "model": model}
    arguments = provenance.common_arguments(origin, identity, "OT", **made_by)
    arguments["series_instance_uid"] = uids.series_uid(identity, "OT")
    created = provenance.created_at(origin, identity)
    objects = []
    for number, picture in enumerate(pictures, start=1):
        result = SCImage.from_ref_dataset(
            ref_dataset=provenance.reduced_header(origin),
            pixel_array=picture.pixels,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),  # what the encoder wants; the true one follows
            sop_instance_uid=uids.object_uid(identity, SecondaryCaptureImageStorage, ExplicitVRLittleEndian, number),
            transfer_syntax_uid=ExplicitVRLittleEndian,
            **{**arguments, "instance_number": number},
        )
        result.PatientOrientation = list(picture.orientation) if picture.orientation else ""
        provenance.copy_side(result, origin, _SIDE)
        result.ImageType = ["DERIVED", "SECONDARY"]
        result.ConversionType = "WSD"
        result.DateOfSecondaryCapture, result.TimeOfSecondaryCapture = created.strftime("%Y%m%d"), created.strftime("%H%M%S")
        result.BurnedInAnnotation = "YES"
        result.DerivationDescription = provenance.ascii_text(picture.derivation, 1024)
        result.ImageComments = f"{RESEARCH}. {identity.package} {identity.version}, weights sha256:{identity.digest}"
        if picture.source is not None:
            result.SourceImageSequence = [_reference(picture.source, picture.frame)]
            for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
                if keyword in picture.source:
                    result[keyword] = picture.source[keyword]
        provenance.stamp(result, origin, identity, **made_by)
        objects.append(provenance.encode(result))
    return tuple(objects)


def _reference(image: Dataset, frame: int | None) -> Dataset:
    """The image that a picture was derived from (PS3.3 C.7.6.1.1.4)."""
    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    if frame is not None:
        source.ReferencedFrameNumber = frame
    source.PurposeOfReferenceCodeSequence = [coded(codes.SOURCE_IMAGE)]
    return source
