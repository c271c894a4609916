"""Display profiles: which kinds of result objects a peer is given, by what its viewers show. Edited like a peer's other fields.

A film is an image without a Frame of Reference: of CR, DX, MG, IO, PX, RF or XA. OHIF 3.13 takes the distance of slices from each SEG's
Pixel Measures; a film's SEG has none, and the whole page is lost. So `seg-no-film`, which the profile `ohif` names, is no SEG for a
film: its report draws alone, and the key image stands beside it.

Must never import an encoder: the command line reads this page too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Profile = tuple[str, ...]  # kinds, in the order of the table

KINDS = {
    "seg": "Segmentation, BINARY",
    "seg-no-film": "Segmentation, BINARY; of a film none, and the report draws alone",
    "seg-fractional": "Segmentation, FRACTIONAL: each voxel's probability, RLE Lossless; BINARY where the model gives none",
    "seg-labelmap": "Label Map Segmentation in RLE Lossless; BINARY where findings overlap",
    "sr": "Comprehensive 3D SR, TID 1500",
    "sr-comprehensive": "Comprehensive SR, the same content",
    "key-image": "Secondary Capture with the outlines burned in",
    "key-object": "Key Object Selection of the images with findings",
    "presentation-state": "Grayscale Softcopy Presentation State, the outlines over the original images",
}
PROFILES: dict[str, Profile] = {
    "standard": ("seg", "sr"),
    "plain": ("key-image",),  # a PACS that takes images only
    "ohif": ("seg-no-film", "sr", "key-image"),  # OHIF 3.13 is lost with a SEG of a film
    "orthanc": ("seg", "sr", "key-image"),  # Orthanc's own viewer shows images alone; whoever reads from it gets the rest
}
OWN: Profile = PROFILES["standard"]  # what the node keeps of each analysis, whoever is given it
SEGMENTATIONS = ("seg", "seg-no-film", "seg-fractional", "seg-labelmap")
REPORTS = ("sr", "sr-comprehensive")
_SPEAKING = {*REPORTS, "key-image"}  # these can say that nothing was found, or why nothing was analysed


@dataclass(frozen=True, kw_only=True, order=True)
class Form:
    """How segmentations are written."""

    kind: str = "seg"  # one of SEGMENTATIONS
    per: Literal["model", "finding"] = "model"  # one for all findings, or one for each
    empty_frames: bool = False  # whether a segment has a frame on images without it, too

    @property
    def variant(self) -> str:
        """What tells its objects' UIDs from those of the usual form, for which it is empty."""
        return (
            " fractional" * (self.kind == "seg-fractional")
            + " per finding" * (self.per == "finding")
            + " with empty frames" * self.empty_frames
        )


USUAL = Form()
Part = tuple[str, Form | None]  # an object to make: its kind, of a segmentation its form, of a report that of the one it refers to


def alternative(part: Part) -> Part | None:
    """Return what is made for a peer that takes no label maps: the BINARY segmentation, and the report that refers to it."""
    kind, form = part
    if form is None or form.kind != "seg-labelmap":
        return None
    return ("seg" if kind in SEGMENTATIONS else kind), replace(form, kind="seg")


def chosen(name: str | None, kinds: Iterable[str]) -> Profile:
    """Return the profile of this name, or of these kinds; without either the standard one.

    Raises:
        ValueError: one sentence, why it cannot be.
    """
    kinds = tuple(kinds)
    if name is not None and kinds:
        raise ValueError("a profile has a name or a list of objects, not both")
    if name is not None and name not in PROFILES:
        raise ValueError(f"{name!r} is no display profile: {', '.join(PROFILES)}")
    return check_objects(kinds) if kinds else PROFILES[name or "standard"]


def check_objects(kinds: Iterable[str]) -> Profile:
    """Return the kinds, each once, in the order of the table.

    Raises:
        ValueError: one sentence, what is no kind, or what doesn't go together.
    """
    wanted = set(kinds)
    unknown = sorted(wanted - set(KINDS))
    if unknown:
        raise ValueError(f"{', '.join(map(repr, unknown))} is no kind of result object: {', '.join(KINDS)}")
    if not wanted & _SPEAKING:
        raise ValueError(f"a peer needs one of {', '.join(k for k in KINDS if k in _SPEAKING)}: no finding must be said, too")
    for one_of in (REPORTS, SEGMENTATIONS):
        if len(wanted.intersection(one_of)) > 1:
            raise ValueError(f"{' and '.join(kind for kind in one_of if kind in wanted)} say the same: one of them is enough")
    return tuple(kind for kind in KINDS if kind in wanted)


def parts(profile: Profile, *, seg_per: Literal["model", "finding"] = "model", empty_frames: bool = False) -> tuple[Part, ...]:
    """Return what is made for a profile."""
    segmentation = next((kind for kind in profile if kind in SEGMENTATIONS), None)
    form = None if segmentation is None else Form(kind=segmentation, per=seg_per, empty_frames=empty_frames)
    return tuple((kind, form if kind in REPORTS or kind == segmentation else None) for kind in profile)


def made_as(part: Part, *, film: bool) -> Part | None:
    """Return what is made for a part once it is known whether a film was analysed; None: nothing."""
    kind, form = part
    if form is None or form.kind != "seg-no-film":
        return part
    if film:
        return None if kind in SEGMENTATIONS else (kind, None)
    usual = replace(form, kind="seg")
    return usual.kind if kind in SEGMENTATIONS else kind, usual
