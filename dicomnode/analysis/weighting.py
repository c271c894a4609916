"""What an MR image is weighted by, from how it was acquired.

Acquisition parameters decide. The words of a description may only choose between weightings that the parameters leave open, and what
stays open is None: a network that was trained on FLAIR must not be given what might be FLAIR. Must never look at pixels.
Limits of TR, TE and TI are those of clinical protocols at 0.5 to 3 T.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydicom.dataset import Dataset

from dicomnode.analysis.attributes import codes_of, items_of, number_of, text_of, texts_of, value_of
from dicomnode.analysis.manifest import MrContrast

# Acquisition Contrast (0008,9209) of enhanced images, PS3.3 C.8.13.3.3.1.
_ACQUISITION_CONTRAST: dict[str, MrContrast] = {
    "T1": "t1", "T2": "t2", "PROTON_DENSITY": "pd", "FLUID_ATTENUATED": "flair", "DIFFUSION": "diffusion", "PERFUSION": "perfusion",
    "T2_STAR": "susceptibility", "TOF": "angiography", "FLOW_ENCODED": "angiography",
}  # fmt: skip
# Values of Image Type beyond the second: what kind of image a reconstruction is.
_KINDS: dict[str, MrContrast] = {
    "ADC": "adc", "DIFFUSION": "diffusion", "TRACEW": "diffusion", "TRACE": "diffusion", "PERFUSION": "perfusion", "SWI": "susceptibility",
    "TOF": "angiography", "ANGIO": "angiography", "MRA": "angiography",
}  # fmt: skip
_NO_WEIGHTING = {  # maps and parts of complex images
    "FA", "EADC", "EXP", "PHASE MAP", "P", "R", "I", "PHASE", "REAL", "IMAGINARY", "T1 MAP", "T2 MAP", "T2_STAR MAP", "B0 MAP", "FIELD MAP",
    "CBF", "CBV", "RCBV", "RCBF", "MTT", "TTP", "TMAX", "SUBTRACTION", "SUB",
}  # fmt: skip
_WORDS: tuple[tuple[MrContrast, str], ...] = (
    ("flair", r"FLAIR|DARK ?FLUID|TIRM"),
    ("adc", r"\bADC\b|APPARENT DIFFUSION"),
    ("diffusion", r"\bDWI\b|\bDTI\b|DIFF(USION)?\b|TRACEW?"),
    ("susceptibility", r"\bSWI\b|\bSWAN\b|SUSCEPT|\bHEMO\b|T2\*|T2 ?STAR"),
    ("angiography", r"\bTOF\b|\bMRA\b|ANGIO"),
    ("perfusion", r"PERF(USION)?\b|\bDSC\b|\bDCE\b|\bASL\b"),
    ("pd", r"\bPDW?\b|PROTON ?DENSITY"),
    ("t1", r"T1W?(-?CE?|-?GD)?(?![A-Z0-9])|MP ?RAGE|BRAVO"),
    ("t2", r"T2W?(?![A-Z0-9*])"),
)
_AFTER_AGENT = re.compile(r"\+ ?C\b|\bGA?D\b|\bGADO\w*|\bPOST\b|\bKM\b|\bC\+|\bT1W?-?(CE?|GD)\b|\bCE\b")
_NO_AGENT = {"", "NONE", "NO", "N", "0", "NIL", "OFF", "NATIVE", "WITHOUT", "NO CONTRAST", "NOT GIVEN", "N/A"}
_BY_MOUTH = {"26643006", "418136008", "37161004"}  # oral, gastrointestinal, rectal route


@dataclass(frozen=True, kw_only=True)
class _Acquisition:
    """The parameters that make a weighting; None where the header is silent. Times in ms."""

    repetition: float | None
    echo: float | None
    inversion: float | None
    flip: float | None
    b_value: float | None
    gradient_echo: bool
    spin_echo: bool
    inversion_recovery: bool
    echo_planar: bool
    balanced: bool
    angiography: bool


def contrast_agent(header: Dataset) -> bool | None:
    """Whether a contrast agent was in the vessels: True, False where the header denies it, None where it says nothing."""
    usages = [item for item in items_of(header, "ContrastBolusUsageSequence") if text_of(item, "ContrastBolusAgentAdministered")]
    if usages:
        return any(text_of(item, "ContrastBolusAgentAdministered").upper() == "YES" for item in usages)
    routes = {value for value, _, _ in codes_of(header, "ContrastBolusAdministrationRouteSequence")}
    route = text_of(header, "ContrastBolusRoute").upper()
    if (routes and routes <= _BY_MOUTH) or any(word in route for word in ("ORAL", "RECTAL", "PO")):
        return None
    if items_of(header, "ContrastBolusAgentSequence"):
        return True
    agent = text_of(header, "ContrastBolusAgent").upper()
    if agent:
        return agent not in _NO_AGENT
    return True if (number_of(value_of(header, "ContrastBolusVolume")) or 0) > 0 else None


def weighting_of(header: Dataset) -> MrContrast | None:
    """Return the weighting of one MR image plane, or None where header and description leave it open or contradict each other."""
    kinds = {value.strip().upper() for value in texts_of(header, "ImageType")[2:]}
    if kinds & _NO_WEIGHTING:
        return None
    stated = _ACQUISITION_CONTRAST.get(text_of(header, "AcquisitionContrast").upper())
    if stated is None:
        stated = next((_KINDS[kind] for kind in sorted(kinds & set(_KINDS))), None)
    if stated is None:
        stated = _weighting_acquired(header)
    if stated != "t1":
        return stated
    agent = contrast_agent(header)
    if agent is None:
        agent = bool(_AFTER_AGENT.search(_description(header)))
    return "t1c" if agent else "t1"


def _weighting_acquired(header: Dataset) -> MrContrast | None:
    possible = _possible(_acquisition(header))
    if len(possible) == 1:
        return possible[0]
    said = _weightings_said(header)
    if not possible:  # the parameters are silent
        return said[0] if len(said) == 1 else None
    agreed = [weighting for weighting in possible if weighting in said]
    if said:
        return agreed[0] if len(agreed) == 1 else None
    # Spoiled gradient echoes that nothing calls an angiogram.
    return "t1" if set(possible) == {"t1", "angiography"} else None


def _possible(acquired: _Acquisition) -> list[MrContrast]:
    """The weightings that the parameters allow; none if they are silent. Where they contradict each other several are left."""
    if (acquired.b_value or 0) > 0 or acquired.angiography:
        return ["diffusion" if acquired.b_value else "angiography"]
    if acquired.echo_planar:
        return ["diffusion", "perfusion", "t2", "susceptibility"] if acquired.spin_echo else ["perfusion", "susceptibility"]
    if acquired.repetition is None or acquired.echo is None:
        return []
    if acquired.inversion_recovery or (acquired.inversion or 0) > 0:
        return _after_inversion(acquired)
    if acquired.gradient_echo:
        return _of_gradient_echo(acquired)
    return _of_spin_echo(acquired) if acquired.spin_echo else []


_OPEN: list[MrContrast] = ["t1", "t2", "pd", "flair", "susceptibility"]  # open, and no prior


def _after_inversion(acquired: _Acquisition) -> list[MrContrast]:
    echo, inversion = acquired.echo or 0, acquired.inversion
    if inversion is None or inversion == 0:
        return ["t1"] if echo < 10 and acquired.gradient_echo else ["t1", "flair"]  # MPRAGE without its inversion time
    if inversion >= 1400 and echo >= 60:
        return ["flair"]
    if 300 <= inversion <= 1400 and echo < 40:
        return ["t1"]
    return _OPEN if inversion >= 300 else ["t1", "t2"]  # below: fat is nulled, and neither name tells the rest


def _of_gradient_echo(acquired: _Acquisition) -> list[MrContrast]:
    repetition, echo = acquired.repetition or 0, acquired.echo or 0
    if acquired.balanced:
        return ["t1", "t2"]
    if echo >= 12:
        return ["susceptibility"]
    if echo >= 10 or repetition > 700 or (acquired.flip is not None and acquired.flip < 6):
        return ["t1", "pd", "susceptibility"]
    return ["t1", "angiography"]


def _of_spin_echo(acquired: _Acquisition) -> list[MrContrast]:
    repetition, echo = acquired.repetition or 0, acquired.echo or 0
    if repetition <= 1000:
        return ["t1"] if echo <= 40 else _OPEN
    if repetition < 1500:
        return ["t1", "pd"] if echo <= 40 else ["t2"] if echo >= 80 else _OPEN
    return ["pd"] if echo <= 40 else ["t2"] if echo >= 60 else ["pd", "t2"]


def _acquisition(header: Dataset) -> _Acquisition:
    sequence = {value.strip().upper() for value in texts_of(header, "ScanningSequence")}
    echo_pulse = text_of(header, "EchoPulseSequence").upper()  # enhanced images: SPIN, GRADIENT or BOTH
    variant = {value.strip().upper() for value in texts_of(header, "SequenceVariant")}
    return _Acquisition(
        repetition=_number(header, "RepetitionTime"),
        echo=_first(header, "EffectiveEchoTime", "EchoTime"),
        inversion=_first(header, "InversionTime", "InversionTimes"),
        flip=_number(header, "FlipAngle"),
        b_value=_number(header, "DiffusionBValue"),
        gradient_echo="GR" in sequence or echo_pulse in ("GRADIENT", "BOTH"),
        spin_echo=bool(sequence & {"SE", "RM"}) or echo_pulse in ("SPIN", "BOTH"),
        inversion_recovery="IR" in sequence or text_of(header, "InversionRecovery").upper() == "YES",
        echo_planar="EP" in sequence or text_of(header, "EchoPlanarPulseSequence").upper() == "YES",
        balanced="SS" in variant and "SP" not in variant,
        angiography=text_of(header, "AngioFlag").upper() == "Y",
    )


def _number(header: Dataset, keyword: str) -> float | None:
    return number_of((texts_of(header, keyword) or [""])[0])


def _first(header: Dataset, *keywords: str) -> float | None:
    return next((value for value in (_number(header, keyword) for keyword in keywords) if value is not None), None)


def _description(header: Dataset) -> str:
    texts = (text_of(header, keyword) for keyword in ("SeriesDescription", "ProtocolName", "SequenceName"))
    return re.sub(r"[_/,;]", " ", " ".join(texts)).upper()


def _weightings_said(header: Dataset) -> list[MrContrast]:
    """The weightings that the description names; FLAIR, SWI and the like say more than the T1 or T2 beside them."""
    described = _description(header)
    said = [weighting for weighting, words in _WORDS if re.search(words, described)]
    special = [weighting for weighting in said if weighting not in ("t1", "t2", "pd")]
    return special or said
