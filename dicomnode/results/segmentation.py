"""Findings become one Segmentation object (PS3.3 A.51): BINARY, FRACTIONAL or LABELMAP, a segment per finding, empty frames left out.

Must never decide what is a finding, read a clock or draw a random number: the same findings give the same bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

import highdicom
import numpy as np
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from dicomnode.findings import Code, Finding, Findings, ResultObject, RunIdentity, Volume
from dicomnode.results import codes, frame_bytes, identity as uids, label_map, provenance
from dicomnode.results.profile import Form
from dicomnode.results.provenance import Plane

Parts = Sequence[bytes | memoryview]  # of a file

_BLOCK_BYTES = 2**18  # of bits, a byte each, that are packed at once: they stay in the processor's cache
_NOTHING = memoryview(bytes(2**16))
_ENDINGS = {"outline": "{}", "box": "{}, box", "heat map": "{}, heat map"}
_EXPLANATIONS = {
    "box": "A box around what was found, filled: not an outline, and its extent is no measurement.",
    "heat map": "Where the heat map is above half of its maximum: not an outline, and its extent is no measurement.",
}


def encode_segmentations(
    findings: Findings, volume: Volume, headers: Sequence[Dataset], identity: RunIdentity, form: Form
) -> tuple[ResultObject, ...]:
    """Return the SEG of all findings, or one SEG for each of them in their order; none where nothing was found."""
    if form.per == "model":
        made = encode_segmentation(findings, volume, headers, identity, kind=form.kind, empty_frames=form.empty_frames)
        return () if made is None else (made,)
    alone = [replace(findings, findings=(finding,)) for finding in findings.findings]
    return tuple(_encoded(one, volume, headers, identity, form, ordinal) for ordinal, one in enumerate(alone, start=1))


def encode_segmentation(
    findings: Findings,
    volume: Volume,
    headers: Sequence[Dataset],
    identity: RunIdentity,
    *,
    kind: str = "seg",
    empty_frames: bool = False,
) -> ResultObject | None:
    """Return the SEG of all findings, or None where there are none: a study without a finding gets no SEG.

    A segment has a frame for each slice in which it has a voxel, a label map one for each slice with a finding; with `empty_frames` for
    each slice of the volume. A box or a heat map is called so in its label: neither may pass for an outline. Of a projection the SEG
    has neither frame of reference nor plane positions nor pixel measures (PS3.3 A.51.5.1), and is always BINARY; so it is where
    findings overlap or are more than a byte can number.

    Args:
        findings: what to encode; `finding.number` counts from 1 without a gap and becomes the segment number.
        volume: the voxels' geometry; its pixels aren't looked at.
        headers: the source images' headers, in any order; more than the volume's are ignored.
        identity: everything UIDs and dates derive from.
        kind: "seg" for BINARY, "seg-labelmap" for LABELMAP and "seg-fractional" for FRACTIONAL, both in RLE Lossless. FRACTIONAL holds
            each voxel's probability, 255 for 1, where all findings have it, and else is BINARY.
        empty_frames: whether slices without a finding have frames, too.

    Segments may overlap. Memory is that of the object's packed bits as far as they aren't zero, and of the groups of its frames.
    """
    if not findings.findings:
        return None
    return _encoded(findings, volume, headers, identity, Form(kind=kind, empty_frames=empty_frames), 1)


def coded(code: Code) -> CodedConcept:
    """Return a code as the encoder wants it, its meaning in ASCII (VR LO)."""
    return CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=provenance.ascii_text(code.meaning, 64))


def _encoded(
    findings: Findings, volume: Volume, headers: Sequence[Dataset], identity: RunIdentity, form: Form, ordinal: int
) -> ResultObject:
    """One SEG, whose segments count from 1 whatever the findings' numbers are."""
    overlapping = _overlap(findings.findings)
    as_labels = form.kind == "seg-labelmap" and not (overlapping or volume.is_projection or len(findings.findings) > label_map.MOST)
    as_shares = form.kind == "seg-fractional" and all(finding.segment.probability is not None for finding in findings.findings)
    sop_class, syntax = label_map.SOP_CLASS if as_labels else SegmentationStorage, ExplicitVRLittleEndian
    if as_labels or as_shares:
        syntax = RLELossless
    planes = provenance.planes(volume, headers)
    image = provenance.source_images(volume, headers, [findings.findings[0].segment.origin[0]])[0]
    origin = next(header for header in headers if header.SOPInstanceUID == volume.sop_instance_uids[0])
    made_by = {"manufacturer": findings.manufacturer, "model": findings.algorithm_name}
    arguments = provenance.common_arguments(origin, identity, "SEG", **made_by)
    arguments["series_instance_uid"] = uids.series_uid(identity, ("SEG LABELMAP" if as_labels else "SEG") + form.variant)
    arguments["instance_number"] = ordinal
    algorithm = _algorithm(findings, identity)
    segments = [replace(finding, number=number) for number, finding in enumerate(findings.findings, start=1)]
    result = Segmentation(
        source_images=[_plain(image, volume)],
        pixel_array=_one_pixel(volume.voxels.shape[1:]),
        segmentation_type="LABELMAP" if as_labels else "FRACTIONAL" if as_shares else "BINARY",
        fractional_type="PROBABILITY",  # of a FRACTIONAL one, as is its maximum
        max_fractional_value=255,
        segment_descriptions=[_describe(findings.findings[0], 1, algorithm, identity)],  # the true ones are put in their place, too
        sop_instance_uid=uids.object_uid(identity, sop_class, syntax + form.variant, ordinal),
        transfer_syntax_uid=syntax,
        omit_empty_frames=True,
        content_label=provenance.content_label(identity.package),
        content_description=provenance.long_string(findings.algorithm_name, ending=provenance.RESEARCH),
        **arguments,
    )
    result.ImageComments = f"{provenance.RESEARCH}. {identity.package} {identity.version}, weights sha256:{identity.digest}"
    result.ContentCreatorName = ""  # type 2: no person made this
    every = range(len(planes)) if form.empty_frames else None
    if as_labels:
        result.NumberOfFrames, ending = _label_frames(segments, planes, volume, every)
    else:
        result.NumberOfFrames, ending = _frames(segments, planes, volume, every, as_shares=as_shares)
    result.SegmentsOverlap = "YES" if overlapping else "NO"
    del result.PerFrameFunctionalGroupsSequence, result.PixelData  # `ending` is in their place
    if volume.is_projection:  # type 2C (PS3.3 C.7.6.1): without a place in space an image says which way its rows and columns run
        result.PatientOrientation = image.get("PatientOrientation", "")
    images = frame_bytes.references(planes)  # each that was analysed, not only those under a frame (PS3.3 C.12.2, C.7.6.1.1)
    sequences = {0x00082112: images, 0x00081115: frame_bytes.referenced_series(volume.series_instance_uid, images)}
    background = [provenance.encoded_elements(item) for item in result.SegmentSequence if item.SegmentNumber == 0]  # of a label map
    sequences[0x00620002] = frame_bytes.items(
        b"".join(elements.values()) for elements in [*background, *_descriptions(findings.findings, algorithm, identity)]
    )
    if len(segments) > 1:  # the encoder saw one, to which then all frames belonged
        result.SharedFunctionalGroupsSequence[0].pop("SegmentIdentificationSequence", None)
    _derive_dimension_uid(result, uids.derive_uid(identity, "dimension organization"))
    provenance.stamp(result, origin, identity, **made_by)
    return provenance.encode(result, sequences=sequences, ending=ending)


def _plain(image: Dataset, volume: Volume) -> Dataset:
    """A plane as a classic image, whatever object it is a frame of: the encoder takes a frame's geometry from no other kind.

    It looks at each attribute of the kind's IOD several times, and a secondary capture has few.
    """
    plain = provenance.copied(image)
    plain.SOPClassUID = ComputedRadiographyImageStorage if volume.is_projection else SecondaryCaptureImageStorage
    return plain


def _one_pixel(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Pixels for the encoder to begin with; the true ones are put in their place."""
    pixels = np.zeros((1, *shape), dtype=np.uint8)
    pixels[0, 0, 0] = 1
    return pixels


def _frames(
    findings: Sequence[Finding], planes: Sequence[Plane], volume: Volume, every: Sequence[int] | None, *, as_shares: bool
) -> tuple[int, Parts]:
    """Each segment's non-empty slices, or `every` one, as frames, with their pixels (PS3.5 8.1.1): how many, and their bytes.

    highdicom would hold every slice of every segment at once where segments overlap: 50 on 300 slices are 4 GB.
    """
    frames = [(finding, k) for finding in findings for k in every or _slices(finding)]
    ranks = {k: rank for rank, k in enumerate(sorted({k for _, k in frames}), start=1)}
    places = {k: frame_bytes.place(planes[k]) for k in ranks}
    several = len(findings) > 1  # the segment of a single one stands in the shared groups
    belongs = {finding.number: frame_bytes.segment(finding.number) if several else b"" for finding in findings}
    groups = [
        frame_bytes.frame(places[k], [finding.number] if volume.is_projection else [finding.number, ranks[k]], belongs[finding.number])
        for finding, k in frames
    ]
    rows, columns = volume.voxels.shape[1:]
    if as_shares:
        return len(frames), frame_bytes.ending(groups, [label_map.probability_frames(frames, (rows, columns))], encapsulated=True)
    return len(frames), frame_bytes.ending(groups, _packed(frames, (rows, columns)), encapsulated=False)


def _label_frames(findings: Sequence[Finding], planes: Sequence[Plane], volume: Volume, every: Sequence[int] | None) -> tuple[int, Parts]:
    """Each slice with a finding, or `every` one, as a frame of labels: how many, and their bytes."""
    slices = every or sorted({k for finding in findings for k in _slices(finding)})
    groups = [frame_bytes.frame(frame_bytes.place(planes[k]), [rank]) for rank, k in enumerate(slices, start=1)]
    rows, columns = volume.voxels.shape[1:]
    return len(slices), frame_bytes.ending(groups, [label_map.label_frames(findings, slices, (rows, columns))], encapsulated=True)


def _packed(frames: Sequence[tuple[Finding, int]], shape: tuple[int, int]) -> Parts:
    """The frames' pixels as bits that follow each other without padding between frames, lowest bit first, in parts.

    Of a frame only the rows of its finding are written; all between is zero, and the same few bytes: a page of memory that is written
    to for the first time costs more than what is written there.
    """
    rows, columns = shape
    length = (len(frames) * rows * columns + 15) // 16 * 2  # even
    crossing = [(number, finding, k) for number, (finding, k) in enumerate(frames) if label_map.crosses(finding, k)]
    if columns % 8:
        return [_pack_bits(crossing, shape, length)]
    width, at, used = columns // 8, 0, 0
    groups = [list(group) for _, group in groupby(crossing, key=lambda frame: frame[1].number)]
    rows_of_all = np.zeros(sum(len(group) * group[0][1].segment.mask.shape[1] for group in groups) * width, dtype=np.uint8)
    packed = rows_of_all.data
    parts: list[bytes | memoryview] = []
    for group in groups:
        row, high = group[0][1].segment.origin[1], group[0][1].segment.mask.shape[1]
        size = high * width
        _pack_bytes(group, rows_of_all[used : used + len(group) * size].reshape(len(group), high, width))
        for number, _, _ in group:
            begin = number * rows * width + row * width
            parts += _zeros(begin - at)
            parts.append(packed[used : used + size])
            at, used = begin + size, used + size
    return [*parts, *_zeros(length - at)]


@lru_cache(maxsize=256)
def _zeros(length: int) -> Parts:
    return [_NOTHING] * (length // len(_NOTHING)) + [_NOTHING[: length % len(_NOTHING)]]


def _pack_bytes(frames: Sequence[tuple[int, Finding, int]], whole: NDArray[np.uint8]) -> None:
    """Pack the rows of one finding's frames into `whole` (frame, row, byte), where each row begins with a byte: several at once."""
    first, _, column = frames[0][1].segment.origin
    mask = frames[0][1].segment.mask
    _, high, wide = mask.shape
    left, right = column // 8, (column + wide + 7) // 8
    at_once = max(1, _BLOCK_BYTES // (high * (right - left) * 8))
    bits = np.zeros((min(at_once, len(frames)), high, (right - left) * 8), dtype=np.bool_)
    for begin in range(0, len(frames), at_once):
        block = frames[begin : begin + at_once]
        low, end = block[0][2] - first, block[-1][2] - first + 1
        there = mask[low:end] if end - low == len(block) else mask[[k - first for _, _, k in block]]
        bits[: len(block), :, column - left * 8 : column - left * 8 + wide] = there
        packed = np.packbits(bits[: len(block)].reshape(-1), bitorder="little").reshape(len(block), high, right - left)
        whole[begin : begin + len(block), :, left:right] = packed


def _pack_bits(frames: Sequence[tuple[int, Finding, int]], shape: tuple[int, int], length: int) -> memoryview:
    """Pack frames into `length` bytes where rows begin anywhere in a byte: one by one. Pages nobody wrote to take no memory."""
    data = _blank(length)
    size = shape[0] * shape[1]
    for number, finding, k in frames:
        _, row, column = finding.segment.origin
        mask = finding.segment.mask[k - finding.segment.origin[0]]
        first, shift = divmod(number * size + row * shape[1], 8)
        bits = np.zeros(shift + len(mask) * shape[1], dtype=np.uint8)  # of its rows alone: the others stay 0
        bits[shift:].reshape(len(mask), shape[1])[:, column : column + mask.shape[1]] = mask
        packed = np.packbits(bits, bitorder="little")
        data[first : first + len(packed)] |= packed
    return data.data


def _blank(size: int) -> NDArray[np.uint8]:
    """Zeros in small pages: of huge ones, which numpy asks for, a frame's few bytes would take two MiB."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def _slices(finding: Finding) -> list[int]:
    """The slices of the volume in which a finding has a voxel."""
    return [finding.segment.origin[0] + int(k) for k in np.flatnonzero(finding.segment.mask.any(axis=(1, 2)))]


def _overlap(findings: Sequence[Finding]) -> bool:
    """Whether a voxel belongs to two findings."""
    begins = np.array([finding.segment.origin for finding in findings])
    ends = begins + [finding.segment.mask.shape for finding in findings]
    for i, one in enumerate(findings):
        low, high = np.maximum(begins[i], begins[i + 1 :]), np.minimum(ends[i], ends[i + 1 :])
        for j in np.flatnonzero((high > low).all(axis=1)).tolist():
            parts = [
                f.segment.mask[tuple(slice(a, b) for a, b in zip(low[j] - f.segment.origin, high[j] - f.segment.origin, strict=True))]
                for f in (one, findings[i + 1 + j])
            ]
            if (parts[0] & parts[1]).any():
                return True
    return False


def _algorithm(findings: Findings, identity: RunIdentity) -> highdicom.AlgorithmIdentificationSequence:
    """What made the segments: one sequence for all of them, as none changes it."""
    return highdicom.AlgorithmIdentificationSequence(
        name=provenance.long_string(findings.algorithm_name),
        family=coded(codes.ARTIFICIAL_INTELLIGENCE),
        version=provenance.long_string(findings.version),
        source=provenance.long_string(findings.manufacturer),
        parameters=dict(provenance.algorithm_parameters(identity, findings)),
    )


def _describe(
    finding: Finding, number: int, algorithm: highdicom.AlgorithmIdentificationSequence, identity: RunIdentity
) -> SegmentDescription:
    """One item of the Segment Sequence (PS3.3 C.8.20.2, C.8.20.4)."""
    tracking_uid, tracking_id = uids.tracking_of(identity, finding)
    description = SegmentDescription(
        segment_number=number,
        segment_label=_label(finding),
        segmented_property_category=coded(finding.category),
        segmented_property_type=coded(finding.type),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=tracking_uid,
        tracking_id=tracking_id,
        anatomic_regions=[coded(finding.site)] if finding.site else None,
        display_color=CIELabColor(*finding.colour_cielab),
    )
    if finding.shape != "outline":
        description.SegmentDescription = _EXPLANATIONS[finding.shape]
    if finding.site and finding.side:
        description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [coded(codes.LATERALITY[finding.side])]
    return description


def _descriptions(
    findings: Sequence[Finding], algorithm: highdicom.AlgorithmIdentificationSequence, identity: RunIdentity
) -> list[dict[int, bytes]]:
    """The items of the Segment Sequence by their encoded elements. Findings of one kind differ in a few: all others are encoded once."""
    kinds: dict[tuple[object, ...], dict[int, bytes]] = {}
    items = []
    for number, finding in enumerate(findings, start=1):
        kind = finding.category, finding.type, finding.site, finding.side, finding.shape
        if kind not in kinds:
            kinds[kind] = provenance.encoded_elements(_describe(finding, number, algorithm, identity))
        colour = CIELabColor(*finding.colour_cielab).value
        own = frame_bytes.segment_values(number, _label(finding), colour, *uids.tracking_of(identity, finding))
        items.append({**kinds[kind], **own})  # each stands where the kind has it: in the order of tags
    return items


def _label(finding: Finding) -> str:
    return provenance.long_string(finding.label, ending=_ENDINGS[finding.shape].format(finding.number))


def _derive_dimension_uid(result: Dataset, uid: str) -> None:
    """Replace highdicom's random Dimension Organization UID wherever it stands (PS3.3 C.7.6.17)."""
    for item in [*result.DimensionOrganizationSequence, *result.DimensionIndexSequence]:
        item.DimensionOrganizationUID = uid
