"""The functional groups of a multi-frame image (PS3.3 C.7.6.16) as the attributes that a classic image of each plane would have.

What is absent, empty, contradictory or malformed in a group is an absent attribute of the plane, and never an exception: what comes
after refuses what it misses. Must never read pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag

Elements = Mapping[BaseTag, DataElement | RawDataElement]  # what a Dataset is made of

# What pydicom raises on bytes that are no value of their VR, or no sequence of items.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NotImplementedError, OSError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip

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

# Anatomic Region Sequence (CID 4, and Annex L of PS3.16) to Body Part Examined: (SNOMED CT, SNOMED RT) codes.
_BODY_PARTS = {
    "HEAD": ("69536005", "T-D1100"), "BRAIN": ("12738006", "T-A0100"), "NECK": ("45048000", "T-D1600"), "CHEST": ("51185008", "T-D3000"),
    "LUNG": ("39607008", "T-28000"), "HEART": ("80891009", "T-32000"), "BREAST": ("76752008", "T-04000"), "LIVER": ("10200004", "T-62000"),
    "ABDOMEN": ("818983003", "113345001", "T-D4000"), "PELVIS": ("816092008", "12921003", "T-D6000"), "PROSTATE": ("41216001", "T-9200B"),
    "CSPINE": ("122494005", "T-11501"), "TSPINE": ("122495006", "T-11502"), "LSPINE": ("122496007", "T-11503"),
    "SPINE": ("421060004", "T-D0146"), "KNEE": ("72696002", "T-D9200"), "HIP": ("24136001", "T-15710"),
    "SHOULDER": ("16982005", "T-D2220"),
}  # fmt: skip
_BODY_PART_OF = {code: part for part, region in _BODY_PARTS.items() for code in region}
_AGENT = Tag(0x0018, 0x0010)  # Contrast/Bolus Agent
_BODY_PART = Tag(0x0018, 0x0015)
_REGION = Tag(0x0008, 0x2218)  # Anatomic Region Sequence
_USAGE = Tag(tag_for_keyword("ContrastBolusUsageSequence") or 0)


class FunctionalGroups:
    """The functional groups of one image; groups with the same bytes in many frames are decoded once."""

    def __init__(self, image: Dataset) -> None:
        self._image = image
        self._decoded: dict[tuple[BaseTag, bytes], Elements] = {}
        shared = items_of(image, "SharedFunctionalGroupsSequence")
        self._shared = self._groups(shared[0]) if len(shared) == 1 else {}
        self._flat_shared: Elements = {tag: element for group in self._shared.values() for tag, element in group.items()}

    def plane(self, frame: Dataset | None) -> Elements:
        """Return the attributes of the plane to which this item of Per-frame Functional Groups Sequence belongs; None: it has none.

        A group that stands among the shared ones and in the frame (which PS3.3 C.7.6.16.1.1 forbids) counts where both say the same.
        """
        own = self._groups(frame) if frame is not None else {}
        elements = dict(self._flat_shared)
        for tag, group in own.items():
            shared = self._shared.get(tag)
            if shared is None or tag == _USAGE:
                elements.update(group)
            elif shared != group:
                for contradicted in (*shared, *group):
                    elements.pop(contradicted, None)
        return elements

    def _groups(self, holder: Dataset) -> dict[BaseTag, Elements]:
        found = {}
        for tag in _GROUPS:
            element = holder.get_item(tag) if tag in holder else None
            if element is not None:
                group = self._group(holder, tag, element)
                if group:
                    found[tag] = group
        return found

    def _group(self, holder: Dataset, tag: BaseTag, element: object) -> Elements:
        raw = element.value if isinstance(element, RawDataElement) and isinstance(element.value, bytes) else None
        if raw is None:
            return self._decode(holder, tag)
        known = self._decoded.get((tag, raw))
        if known is None:
            known = self._decoded[tag, raw] = self._decode(holder, tag)
        return known

    def _decode(self, holder: Dataset, tag: BaseTag) -> Elements:
        try:
            items = list(holder[tag].value or [])
        except UNREADABLE:
            return {}
        if tag == _USAGE:
            return _agent_of(self._image, items)
        if not items or any(item != items[0] for item in items[1:]):
            return {}  # more than one of what must be one: none of them is to be believed
        elements: dict[BaseTag, DataElement | RawDataElement] = {}
        for element in readable(items[0]):
            elements.update(_classic(element))
        return elements


def items_of(dataset: Dataset, keyword: str) -> Sequence[Dataset]:
    """Return the items of a sequence; none where it is absent, empty or malformed."""
    try:
        value = dataset.get(keyword)
        return list(value) if value else []
    except UNREADABLE:
        return []


def readable(dataset: Dataset) -> Iterator[DataElement]:
    """Yield the elements of a data set that have a value of their VR, as a reader converts them."""
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
        except UNREADABLE:
            continue
        if isinstance(element, DataElement):
            yield element


def _classic(element: DataElement) -> Elements:
    tag = _RENAMED.get(element.tag)
    elements = {element.tag: element}
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
