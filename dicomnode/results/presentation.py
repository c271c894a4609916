"""Findings become Grayscale Softcopy Presentation States (PS3.3 A.33.1): outlines and words that a viewer draws over the original images.

Must never decide what is a finding, read a clock or draw a random number: the same findings give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from highdicom.color import CIELabColor
from highdicom.content import ReferencedImageSequence
from highdicom.pr import GraphicAnnotation, GraphicLayer, GraphicObject, GrayscaleSoftcopyPresentationState, TextObject
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, GrayscaleSoftcopyPresentationStateStorage

from dicomnode.findings import Finding, Findings, ResultObject, RunIdentity, Volume
from dicomnode.results import identity as uids, provenance
from dicomnode.results.outlines import outlines
from dicomnode.results.softcopy import Rescaling, Window, rescaling_of, window_of, window_over

MOST = 200  # images of one run; each says how many further ones with findings have no outline
_POINTS = 8000  # of one line: an element of VR FL holds 8191 pairs (PS3.5 7.1.2); a longer line goes on in the next one
_YELLOW = (86.0, 4.0, 84.0)  # CIELab, of the warning
_LUNG = "39607008"
_LETTER, _LINE = 8.0, 14.0  # pixels of the image for a letter and a line of a label: what a viewer does with them is its own


def encode_presentations(findings: Findings, volume: Volume, headers: Sequence[Dataset], identity: RunIdentity) -> tuple[ResultObject, ...]:
    """Return presentation states of the images with findings: none where nothing was found, and one for each way of rescaling.

    (A presentation state has one Modality LUT for all of its images.) Each finding is outlined on each of its slices, with its number
    and name beside it; of more than MOST images those nearest to where findings are measured.
    """
    if not findings.findings:
        return ()
    by_uid = {str(header.SOPInstanceUID): header for header in headers}
    shown = _slices(findings)
    states: dict[Rescaling, list[int]] = {}
    for k in shown:
        states.setdefault(rescaling_of(by_uid[volume.sop_instance_uids[k]], provenance.frame_number(volume, k)), []).append(k)
    left_out = len({k for finding in findings.findings for k in _crossed(finding)}) - len(shown)
    return tuple(
        _encoded(findings, volume, by_uid, identity, slices, rescaling, ordinal, left_out)
        for ordinal, (rescaling, slices) in enumerate(states.items(), start=1)
    )


def _crossed(finding: Finding) -> list[int]:
    """The slices in which a finding has a voxel."""
    return [finding.segment.origin[0] + k for k, plane in enumerate(finding.segment.mask) if plane.any()]


def _slices(findings: Findings) -> list[int]:
    crossed = {k for finding in findings.findings for k in _crossed(finding)}
    keys = {finding.key_slice for finding in findings.findings}
    return sorted(sorted(crossed, key=lambda k: (min(abs(k - key) for key in keys), k))[:MOST])


def _encoded(
    findings: Findings,
    volume: Volume,
    by_uid: dict[str, Dataset],
    identity: RunIdentity,
    slices: Sequence[int],
    rescaling: Rescaling,
    ordinal: int,
    left_out: int,
) -> ResultObject:
    """One presentation state of these slices, whose images are rescaled in the same way."""
    origin = by_uid[volume.sop_instance_uids[0]]
    images = {uid: _referenced(by_uid[uid]) for uid in dict.fromkeys(volume.sop_instance_uids[k] for k in slices)}
    made_by = {"manufacturer": findings.manufacturer, "model": findings.algorithm_name}
    arguments = provenance.common_arguments(origin, identity, "PR", **made_by)
    arguments["series_instance_uid"] = uids.series_uid(identity, "PR")
    arguments["instance_number"] = ordinal
    for keyword in ("content_date", "content_time"):
        del arguments[keyword]
    layers = _layers(findings.findings)
    result = GrayscaleSoftcopyPresentationState(
        referenced_images=list(images.values()),
        sop_instance_uid=uids.object_uid(identity, GrayscaleSoftcopyPresentationStateStorage, ExplicitVRLittleEndian, ordinal),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_label=provenance.content_label(identity.package),
        content_description=provenance.long_string(findings.algorithm_name, ending=provenance.RESEARCH),
        graphic_annotations=[
            annotation
            for k in slices
            for annotation in _annotations(findings, volume, k, images[volume.sop_instance_uids[k]], layers, identity, left_out)
        ],
        graphic_layers=list({layer.GraphicLayer: layer for layer in layers.values()}.values()),
        modality_lut_transformation=rescaling.modality_lut(),
        voi_lut_transformations=[
            window.voi_lut(_references(volume, planes, images) if len(planes) < len(slices) else None)
            for window, planes in _windows(findings, volume, by_uid, slices, rescaling).items()
        ],
        presentation_lut_transformation=rescaling.presentation_lut(),
        **arguments,
    )
    _display_whole(result, volume)
    if volume.frame_numbers is not None:
        for series in result.ReferencedSeriesSequence:
            series.ReferencedImageSequence = _references(volume, slices, images)
    provenance.stamp(result, origin, identity, **made_by)
    result.PresentationCreationDate, result.PresentationCreationTime = result.InstanceCreationDate, result.InstanceCreationTime
    provenance.copy_side(result, origin, ("BodyPartExamined", "Laterality"))
    del result.ContentDate, result.ContentTime  # of images and documents
    return provenance.encode(result)


def _referenced(header: Dataset) -> Dataset:
    """An image as the encoder wants to see it."""
    image = provenance.reduced_header(header)
    image.SamplesPerPixel = 1
    image.NumberOfFrames = int(header.get("NumberOfFrames") or 1)
    return image


def _layers(findings: Sequence[Finding]) -> dict[int, GraphicLayer]:
    """A layer for each name and colour, by the number of a finding; 0 is that of the warning."""
    words = GraphicLayer(layer_name="WORDS", order=1, description="Warning", display_color=CIELabColor(*_YELLOW))
    known: dict[tuple[str, tuple[float, float, float]], GraphicLayer] = {}
    for finding in findings:
        known.setdefault(
            (finding.label, finding.colour_cielab),
            GraphicLayer(
                layer_name=f"FINDINGS {len(known) + 1}",
                order=len(known) + 2,
                description=provenance.long_string(finding.label),
                display_color=CIELabColor(*finding.colour_cielab),
            ),
        )
    return {0: words, **{finding.number: known[finding.label, finding.colour_cielab] for finding in findings}}


def _annotations(
    findings: Findings,
    volume: Volume,
    k: int,
    image: Dataset,
    layers: dict[int, GraphicLayer],
    identity: RunIdentity,
    left_out: int,
) -> list[GraphicAnnotation]:
    """What is drawn on one image: the warning, and each finding with its label."""
    frame = provenance.frame_number(volume, k)
    warning = f"{provenance.RESEARCH}\r\n{provenance.ascii_text(findings.algorithm_name, 64)}, {identity.package} {identity.version}"
    if left_out:
        warning += f"\r\n{left_out} further image{' has' if left_out == 1 else 's have'} findings without an outline here"
    words = TextObject(warning, units="DISPLAY", bounding_box=(0.01, 0.01, 0.7, 0.1), text_justification="LEFT")
    drawn = [GraphicAnnotation([image], layers[0], referenced_frame_number=frame, text_objects=[words])]
    for finding in findings.findings:
        inside = k - finding.segment.origin[0]
        if not 0 <= inside < len(finding.segment.mask) or not finding.segment.mask[inside].any():
            continue
        tracking = {"tracking_id": uids.tracking_id(identity, finding.number), "tracking_uid": uids.tracking_uid(identity, finding.number)}
        _, row, column = finding.segment.origin
        lines = [
            GraphicObject("POLYLINE", (line + np.array([column, row]))[first : first + _POINTS + 1], units="PIXEL", **tracking)
            for line in outlines(finding.segment.mask[inside])
            for first in range(0, len(line) - 1, _POINTS)
        ]
        near = "LEFT" if _at_its_right(finding, volume.voxels.shape[2]) else "RIGHT"  # where the text begins or ends: at its finding
        label = TextObject(_label(finding), units="PIXEL", bounding_box=_beside(finding, volume), text_justification=near, **tracking)
        drawn.append(
            GraphicAnnotation([image], layers[finding.number], referenced_frame_number=frame, graphic_objects=lines, text_objects=[label])
        )
    return drawn


def _label(finding: Finding) -> str:
    text = f"{finding.number}: {finding.label}" + (f", {finding.side}" if finding.side else "")
    return provenance.ascii_text(text + (f" ({finding.shape})" if finding.shape != "outline" else ""), 200)


def _beside(finding: Finding, volume: Volume) -> tuple[float, float, float, float]:
    """Where a label stands, in the image: left, top, right and bottom."""
    rows, columns = volume.voxels.shape[1:]
    left, top, right, _ = (edge + 0.5 for edge in finding.bounds_px)
    width = len(_label(finding)) * _LETTER
    first, last = (right + 2, right + 2 + width) if _at_its_right(finding, columns) else (left - 2 - width, left - 2)
    first, last = max(0.0, min(first, columns - 1.0)), min(float(columns), max(last, 1.0))
    top = min(max(0.0, top - _LINE / 2), rows - 1.0)
    return first, top, last, min(float(rows), top + _LINE)


def _at_its_right(finding: Finding, columns: int) -> bool:
    """Whether a label stands at the right of its finding, and not at the left: it has room there, or more than on the other side."""
    left, _, right, _ = (edge + 0.5 for edge in finding.bounds_px)
    return columns - right >= min(left, len(_label(finding)) * _LETTER)


def _windows(
    findings: Findings, volume: Volume, by_uid: dict[str, Dataset], slices: Sequence[int], rescaling: Rescaling
) -> dict[Window, list[int]]:
    """Which slices have which window: that of their image, else one for all that have none, as pictures of them have it."""
    lung = any(finding.site is not None and finding.site.value == _LUNG for finding in findings.findings)
    said = {k: window_of(by_uid[volume.sop_instance_uids[k]], provenance.frame_number(volume, k)) for k in slices}
    silent = [k for k, window in said.items() if window is None]
    windows: dict[Window, list[int]] = {}
    other = None
    if silent:
        middle = silent[len(silent) // 2]
        other = window_over(by_uid[volume.sop_instance_uids[middle]], volume.voxels[middle], rescaling, lung=lung)
    for k, window in said.items():
        if (one := window or other) is not None:
            windows.setdefault(one, []).append(k)
    return windows


def _references(volume: Volume, slices: Sequence[int], images: dict[str, Dataset]) -> ReferencedImageSequence:
    """References to the images of these slices, to no other frames of them."""
    frames: dict[str, list[int]] = {}
    for k in slices:
        number = provenance.frame_number(volume, k)
        frames.setdefault(volume.sop_instance_uids[k], []).extend([] if number is None else [number])
    every = [ReferencedImageSequence([images[uid]], referenced_frame_number=sorted(numbers) or None) for uid, numbers in frames.items()]
    first = every[0]
    for further in every[1:]:
        first.extend(further)
    return first


def _display_whole(result: Dataset, volume: Volume) -> None:
    """The whole image, its pixels as long and wide as they are (PS3.3 C.10.4)."""
    (area,) = result.DisplayedAreaSelectionSequence
    del area.PixelOriginInterpretation  # of tiled images
    _, row_mm, column_mm = volume.spacing_mm
    if volume.calibration == "patient":
        del area.PresentationPixelAspectRatio
        area.PresentationPixelSpacing = [f"{row_mm:.10g}", f"{column_mm:.10g}"]
    else:
        ratio = Fraction(row_mm / column_mm).limit_denominator(1000)
        area.PresentationPixelAspectRatio = [ratio.numerator, ratio.denominator]
