"""The functional groups of a multi-frame image (PS3.3 C.7.6.16) as the attributes that a classic image of each plane would have.

What is absent, empty, contradictory or malformed in a group is an absent attribute of the plane, and never an exception: what comes
after refuses what it misses. Must never read pixels.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag

from dicomnode.analysis.attributes import UNREADABLE, items_of

Elements = Mapping[BaseTag, DataElement | RawDataElement]  # what a Dataset is made of

# Groups whose one item's attributes are those of a classic image, or stand beside them. Other groups stay out of the planes:
# real world values, references and private groups belong to the image as a whole.
_GROUPS = tuple(
    Tag(tag_for_keyword(keyword) or 0)
    for keyword in (
        "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence",
        "FrameContentSequence", "FrameAnatomySequence", "FrameVOILUTSequence", "TemporalPositionSequence",
        "UnassignedSharedConvertedAttributesSequence", "UnassignedPerFrameConvertedAttributesSequence",
        "CTImageFrameTypeSequence", "CTAcquisitionTypeSequence", "CTAcquisitionDetailsSequence", "CTReconstructionSequence",
        "CTExposureSequence", "CTXRayDetailsSequence",
        "MRImageFrameTypeSequence", "MRTimingAndRelatedParametersSequence", "MREchoSequence", "MRModifierSequence", "MRDiffusionSequence",
        "MRAveragesSequence", "MRVelocityEncodingSequence", "MRFOVGeometrySequence",
        "PETFrameTypeSequence", "XAXRFFrameCharacteristicsSequence", "FrameDetectorParametersSequence", "ContrastBolusUsageSequence",
    )
)  # fmt: skip

# An attribute of a group by its name in the classic images (PS3.3 C.8.2.1, C.8.3.1, C.8.13).
_CLASSIC = {
    "FrameType": "ImageType",
    "EffectiveEchoTime": "EchoTime",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "FrameAcquisitionDateTime": "AcquisitionDateTime",
    "TemporalPositionIndex": "TemporalPositionIdentifier",
    "FrameLaterality": "ImageLaterality",
    "InversionTimes": "InversionTime",  # of which the classic attribute has the first
}
_RENAMED = {Tag(tag_for_keyword(old) or 0): Tag(tag_for_keyword(new) or 0) for old, new in _CLASSIC.items()}

# Anatomic Region Sequence to Body Part Examined (PS3.16 Annex L): SNOMED CT codes, the retired ones too, and those of SNOMED RT.
_BODY_PARTS = {
    "HEAD": ("69536005", "T-D1100"), "BRAIN": ("12738006", "T-A0100"), "SKULL": ("89546000", "T-11100"), "NECK": ("45048000", "T-D1600"),
    "HEADNECK": ("774007", "T-D1000"), "CHEST": ("816094009", "51185008", "T-D3000"), "LUNG": ("39607008", "T-28000"),
    "HEART": ("80891009", "T-32000"), "BREAST": ("76752008", "T-04000"), "ABDOMEN": ("818981001", "818983003", "113345001", "T-D4000"),
    "LIVER": ("10200004", "T-62000"), "KIDNEY": ("64033007", "T-71000"), "PANCREAS": ("15776009", "T-65000"),
    "COLON": ("71854001", "T-59300"), "PELVIS": ("816092008", "12921003", "T-D6000"), "PROSTATE": ("41216001", "T-9200B"),
    "ABDOMENPELVIS": ("818982008", "416949008", "R-FAB57"), "CHESTABDOMEN": ("416550000", "R-FAB55"),
    "CHESTABDPELVIS": ("416775004", "R-FAB56"), "WHOLEBODY": ("38266002", "T-D0010"), "CSPINE": ("122494005", "T-11501"),
    "TSPINE": ("122495006", "T-11502"), "LSPINE": ("122496007", "T-11503"), "SPINE": ("421060004", "T-D04FF"),
    "SHOULDER": ("16982005", "T-D2220"), "HIP": ("24136001", "T-15710"), "KNEE": ("72696002", "T-D9200"),
}  # fmt: skip
_BODY_PART_OF = {code: part for part, region in _BODY_PARTS.items() for code in region}
_AGENT = Tag(0x0018, 0x0010)  # Contrast/Bolus Agent
_BODY_PART = Tag(0x0018, 0x0015)
_REGION = Tag(0x0008, 0x2218)  # Anatomic Region Sequence
_NOTHING: Elements = {}

# What belongs to the image: no group of a frame says otherwise.
_OF_THE_IMAGE = frozenset(
    tag_for_keyword(keyword)
    for keyword in (
        "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "SpecificCharacterSet",
        "PatientName", "PatientID", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "BitsAllocated",
        "BitsStored", "HighBit", "PixelRepresentation", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelData",
    )
)  # fmt: skip
_SHARED = Tag(0x5200, 0x9229)
_PER_FRAME = Tag(0x5200, 0x9230)

# Encoding (PS3.5 7.1.2, 7.5)
_HEADS = {True: struct.Struct("<HH2sH"), False: struct.Struct(">HH2sH")}  # by "little endian"
_LENGTHS = {True: struct.Struct("<I"), False: struct.Struct(">I")}
_TAGS = {True: struct.Struct("<HH"), False: struct.Struct(">HH")}
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_ITEM_END = 0xFFFEE00D
_UNDEFINED = 0xFFFFFFFF
_DEEPEST = 16
_USAGE = Tag(tag_for_keyword("ContrastBolusUsageSequence") or 0)


class FunctionalGroups:
    """The functional groups of one image, for each of its planes in turn; what has the same bytes in many frames is decoded once."""

    def __init__(self, image: Dataset) -> None:
        self._image = image
        self._groups: dict[tuple[int, bytes], Elements] = {}
        self._elements: dict[tuple[int, bytes], Elements] = {}
        shared = self._items(_SHARED)
        self._shared = self._groups_of(shared[0]) if len(shared) == 1 else {}
        self.shared: Elements = {tag: element for group in self._shared.values() for tag, element in group.items()}
        self._frames = self._items(_PER_FRAME)

    def __len__(self) -> int:
        """How many frames have groups of their own."""
        return len(self._frames)

    def plane(self, index: int) -> Elements:
        """Return the attributes of a plane by its place in Per-frame Functional Groups Sequence: `shared` where it has none of its own.

        A group that stands among the shared ones and in the frame (which PS3.3 C.7.6.16.1.1 forbids) counts where both say the same.
        """
        own = self._groups_of(self._frames[index])
        if not own:
            return self.shared
        elements = dict(self.shared)
        for tag, group in own.items():
            shared = self._shared.get(tag)
            if shared is None or tag == _USAGE or shared == group:
                elements.update(group)
            else:
                for contradicted in (*shared, *group):
                    elements.pop(contradicted, None)
        return elements

    def _items(self, tag: BaseTag) -> Sequence[Dataset | _Encoded]:
        """The items of one of the two sequences as they were read: bytes, or data sets where they are decoded already."""
        element = self._image.get_item(tag) if tag in self._image else None
        try:
            if isinstance(element, RawDataElement) and isinstance(element.value, bytes):
                return encoded_items(element.value, implicit=element.is_implicit_VR, little=element.is_little_endian)
            return list(self._image[tag].value or []) if element is not None else []
        except UNREADABLE:
            return []

    def _groups_of(self, holder: Dataset | _Encoded) -> dict[int, Elements]:
        found: dict[int, Elements] = {}
        if isinstance(holder, Dataset):
            for tag in _GROUPS:
                if tag in holder and (group := self._flat(tag, _decoded_items(holder, tag))):
                    found[int(tag)] = group
            return found
        for number, vr, value in holder.elements():
            if number in _GROUPS and vr in (b"SQ", None):
                if (number, value) not in self._groups:
                    self._groups[number, value] = self._flat(number, self._items_in(holder, value))
                if self._groups[number, value]:
                    found[number] = self._groups[number, value]
        return found

    def _items_in(self, holder: _Encoded, value: bytes) -> list[Dataset]:
        try:
            return [self._data_set(item) for item in encoded_items(value, implicit=holder.implicit, little=holder.little)]
        except UNREADABLE:
            return []

    def _data_set(self, item: _Encoded) -> Dataset:
        elements: dict[BaseTag, DataElement | RawDataElement] = {}
        for tag, vr, value in item.elements():
            name = vr.decode("ascii") if vr else None
            elements[BaseTag(tag)] = RawDataElement(BaseTag(tag), name, len(value), value, 0, item.implicit, item.little)
        data_set = Dataset(elements)
        data_set.set_original_encoding(item.implicit, item.little, self._image.original_character_set)
        return data_set

    def _flat(self, tag: int, items: Sequence[Dataset]) -> Elements:
        try:
            if tag == _USAGE:
                return _agent_of(self._image, items)
            if not items or any(item != items[0] for item in items[1:]):
                return {}  # more than one of what must be one: none of them is to be believed
        except UNREADABLE:
            return {}
        flat: dict[BaseTag, DataElement | RawDataElement] = {}
        for element in list(items[0].keys()):
            flat.update(self._classic(items[0], element))
        return {tag: element for tag, element in flat.items() if tag not in _OF_THE_IMAGE}

    def _classic(self, item: Dataset, tag: BaseTag) -> Elements:
        raw = item.get_item(tag)
        key = (int(tag), raw.value) if isinstance(raw, RawDataElement) and isinstance(raw.value, bytes) else None
        known: Elements | None = self._elements.get(key) if key else None
        if known is None:
            try:
                element = item[tag]
                known = _classic(element) if isinstance(element, DataElement) else _NOTHING
            except UNREADABLE:
                known = _NOTHING
            if key:
                self._elements[key] = known
        return known


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """An item of a sequence as bytes."""

    data: bytes
    start: int
    end: int
    implicit: bool
    little: bool

    def elements(self) -> list[tuple[int, bytes | None, bytes]]:
        """Return (tag, VR, value) of each element; a sequence's value is its items. What can't be walked has none."""
        try:
            found, _ = _walk(self, self.start, self.end, 0)
        except UNREADABLE:
            return []
        return [(tag, vr, self.data[start:end]) for tag, vr, start, end in found]


def encoded_items(value: bytes, *, implicit: bool, little: bool) -> list[_Encoded]:
    """Return the items of a sequence's value (PS3.5 7.5), of defined or undefined length.

    Raises:
        ValueError, struct.error: it is none.
    """
    whole = _Encoded(data=value, start=0, end=len(value), implicit=implicit, little=little)
    items, _ = _items_from(whole, 0, len(value), 0)
    return [_Encoded(data=value, start=start, end=end, implicit=implicit, little=little) for start, end in items]


def _walk(data: _Encoded, at: int, end: int, depth: int) -> tuple[list[tuple[int, bytes | None, int, int]], int]:
    """Return (tag, VR, start, end of value) of elements up to `end` or an Item Delimitation Item, and where that is."""
    head, content = _HEADS[data.little], data.data
    found: list[tuple[int, bytes | None, int, int]] = []
    while at + 8 <= end:
        group, number, vr, short, length = *head.unpack_from(content, at), 0
        tag = group << 16 | number
        if tag == _ITEM_END:
            return found, at
        if data.implicit:
            length, vr, at = _LENGTHS[data.little].unpack_from(content, at + 4)[0], None, at + 8
        elif vr in _LONG:
            length, at = _LENGTHS[data.little].unpack_from(content, at + 8)[0], at + 12
        else:
            length, at = short, at + 8
        if length == _UNDEFINED:
            if depth == _DEEPEST or vr == b"UN":
                raise ValueError("a functional group is nested too deep or of unknown encoding")
            _, after = _items_from(data, at, end, depth + 1)
            found.append((tag, vr, at, after - 8))
            at = after
        else:
            if at + length > end:
                raise ValueError("an element is longer than what holds it")
            found.append((tag, vr, at, at + length))
            at += length
    return found, at


def _items_from(data: _Encoded, at: int, end: int, depth: int) -> tuple[list[tuple[int, int]], int]:
    """Return (start, end) of each item up to `end` or a Sequence Delimitation Item, and what follows that."""
    items: list[tuple[int, int]] = []
    while at + 8 <= end:
        group, number = _TAGS[data.little].unpack_from(data.data, at)
        (length,) = _LENGTHS[data.little].unpack_from(data.data, at + 4)
        at += 8
        if (group, number) == (0xFFFE, 0xE0DD):
            return items, at
        if (group, number) != (0xFFFE, 0xE000):
            raise ValueError("a sequence holds something else than items")
        if length == _UNDEFINED:
            _, stop = _walk(data, at, end, depth)
            items.append((at, stop))
            at = stop + 8
        else:
            if at + length > end:
                raise ValueError("an item is longer than its sequence")
            items.append((at, at + length))
            at += length
    if depth:
        raise ValueError("a sequence of undefined length has no end")
    return items, at


def _decoded_items(dataset: Dataset, tag: BaseTag) -> Sequence[Dataset]:
    try:
        return list(dataset[tag].value or [])
    except UNREADABLE:
        return []


def _classic(element: DataElement) -> Elements:
    tag = _RENAMED.get(element.tag)
    elements: dict[BaseTag, DataElement | RawDataElement] = {element.tag: element}
    if tag is not None and not element.is_empty:
        value = element.value
        if element.keyword == "InversionTimes" and isinstance(value, MultiValue | list):
            value = value[0]
        try:
            elements[tag] = DataElement(tag, element.VR, value)
        except UNREADABLE:
            return {}
    if element.tag == _REGION and element.VR == "SQ" and len(element.value) == 1:
        part = _BODY_PART_OF.get(str(element.value[0].get("CodeValue", "")))
        if part:
            elements[_BODY_PART] = DataElement(_BODY_PART, "CS", part)
    return elements


def _agent_of(image: Dataset, usages: Sequence[Dataset]) -> Elements:
    """Return Contrast/Bolus Agent where one of the image's agents was in the patient during the frame (PS3.3 C.7.6.16.2.12)."""
    administered = {
        str(usage.get("ContrastBolusAgentNumber", "")) for usage in usages if usage.get("ContrastBolusAgentAdministered") == "YES"
    }
    if not administered:
        return {}
    agents = items_of(image, "ContrastBolusAgentSequence")
    names = [str(agent.get("CodeMeaning", "")) for agent in agents if str(agent.get("ContrastBolusAgentNumber", "")) in administered]
    return {_AGENT: DataElement(_AGENT, "LO", next((name for name in names if name), "UNNAMED AGENT"))}
