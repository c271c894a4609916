"""Who and what an image shows by its header: human or animal or phantom, which body part, view, side and age.

Must never look at a patient's name or identifiers, or at pixels.
"""

from __future__ import annotations

import re
from datetime import date
from functools import lru_cache

from pydicom.dataset import Dataset

from dicomnode.analysis.attributes import codes_of, items_of, text_of, texts_of
from dicomnode.analysis.manifest import InputSection

# Parts of the body: the words of Body Part Examined (PS3.16 Annex L, and what scanners write), and codes of Anatomic Region (CID 4031,
# 4030; SRT codes are those of older objects). A narrower part stands in the row of the one it lies in, where a scan of it covers that.
_PARTS: dict[str, tuple[str, str]] = {
    "CHEST": (
        "CHEST THORAX LUNG LUNGS TORAX THORACIC MEDIASTINUM",
        "816094009 51185008 43799004 39607008 72410000 T-D3000 T-D3200 T-28000",
    ),
    "HEAD": ("HEAD BRAIN SKULL CRANIUM NEURO KOPF CEREBRUM", "69536005 12738006 89546000 T-D1100 T-A0100 T-11100"),
    "NECK": ("NECK HALS", "45048000 T-D1600"),
    "ABDOMEN": (
        "ABDOMEN ABD ABDO LIVER SPLEEN PANCREAS KIDNEY KIDNEYS",
        "818981001 113345001 10200004 78961009 15776009 64033007 T-D4000 T-62000 T-C3000 T-65000 T-71000",
    ),
    "PELVIS": ("PELVIS PELV PROSTATE BLADDER UTERUS", "816092008 12921003 41216001 T-D6000 T-92000"),
    "HEART": ("HEART CARDIAC CARDIO", "80891009 T-32000"),
    "BREAST": ("BREAST MAMMA", "76752008 T-04000"),
}
_SEVERAL: dict[str, tuple[str, str]] = {
    "HEAD NECK": ("HEADNECK", "774007 T-D1000"),
    "NECK CHEST": ("NECKCHEST", "417437006 R-FAB52"),
    "CHEST ABDOMEN": ("CHESTABDOMEN CHESTABD THORACOABDOMINAL", "416550000 R-FAB55"),
    "CHEST ABDOMEN PELVIS": ("CHESTABDPELVIS CAP TAP", "416775004 R-FAB56"),
    "ABDOMEN PELVIS": ("ABDOMENPELVIS ABDPELVIS", "818982008"),
    "NECK CHEST ABDOMEN": ("NECKCHESTABDOMEN", "416152001 R-FAB53"),
    "NECK CHEST ABDOMEN PELVIS": ("NECKCHESTABDPELV NECKCHESTABDPELVIS", "416319003 R-FAB54"),
    "HEAD NECK CHEST ABDOMEN PELVIS": ("WHOLEBODY BODY", "38266002 T-D0010"),
}
# Views: PA and AP are also FRONTAL, left and right lateral are also LAT (PS3.3 C.8.11.5.1, CID 4010).
_VIEWS: dict[str, tuple[str, str]] = {
    "PA FRONTAL": ("PA POSTEROANTERIOR", "272479007 R-10214 R-40888"),
    "AP FRONTAL": ("AP ANTEROPOSTERIOR", "399348003 R-10206"),
    "FRONTAL": ("FRONTAL", "399033003 R-10202"),
    "LL LAT": ("LL", "399173006 R-10236"),
    "RL LAT": ("RL", "399198007 R-10232"),
    "LAT": ("LAT LATERAL", "399067008 R-102CD"),
    "MLO": ("MLO", "399368009 R-10226"),
    "CC": ("CC", "399162004 R-10242"),
}
_HUMAN_CODES = {"337915000", "L-85B00", "L-85003"}
_PHANTOM_CODES = {"706342009", "R-FE0C7"}
_ANIMALS = re.compile(r"\b(CANINE|FELINE|EQUINE|BOVINE|PORCINE|OVINE|CAPRINE|AVIAN|MURINE|DOG|HORSE)\b")
_TEETH = re.compile(r"TOOTH|TEETH|DENTAL|IMPACTED|MAXILL|MANDIB|OPG|PANORAM")  # where a canine is a tooth
_DESCRIPTIONS = ("AcquisitionDeviceProcessingDescription", "ProtocolName", "SeriesDescription", "StudyDescription", "BodyPartExamined")
_AGE = re.compile(r"^(\d{1,3})([DWMY])$")
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


def is_animal(header: Dataset) -> bool:
    """Whether the header says that the patient is no human: by species, breed, owner, or the words of a protocol for animals."""
    species = text_of(header, "PatientSpeciesDescription").upper()
    if species and not re.search(r"HOMO|HUMAN|SAPIENS", species):
        return True
    if any(value not in _HUMAN_CODES for value, _, _ in codes_of(header, "PatientSpeciesCodeSequence")):
        return True
    if text_of(header, "PatientBreedDescription") or items_of(header, "PatientBreedCodeSequence") or text_of(header, "PatientSexNeutered"):
        return True
    if items_of(header, "BreedRegistrationSequence") or text_of(header, "ResponsiblePersonRole").upper() in ("OWNER", "VETERINARIAN"):
        return True
    described = " ".join(text_of(header, keyword) for keyword in _DESCRIPTIONS).upper()
    if _ANIMALS.search(described) and not _TEETH.search(described):
        return True
    return "VETERINAR" in " ".join([described, text_of(header, "InstitutionName"), text_of(header, "InstitutionalDepartmentName")]).upper()


def is_quality_control(header: Dataset) -> str | None:
    """Return the name of the attribute that says the image shows a phantom or calibrates a machine, or None."""
    for keyword, name in (("QualityControlImage", "Quality Control Image"), ("CalibrationImage", "Calibration Image")):
        if text_of(header, keyword).upper() == "YES":
            return name
    if "PHANTOM" in text_of(header, "BodyPartExamined").upper().split():
        return "Body Part Examined"
    if any(value in _PHANTOM_CODES for value, _, _ in codes_of(header, "AnatomicRegionSequence")):
        return "Anatomic Region"
    return None


def body_part_fits(header: Dataset, accepts: InputSection) -> bool:
    """Compare Body Part Examined and Anatomic Region with the manifest: each that is there must fit.

    A scan of several parts fits if the package reads one of them; a projection only if it reads them all.
    """
    if not accepts.body_parts:
        return True
    accepted = frozenset[str]().union(*(_parts_named(part) for part in accepts.body_parts))
    said = [_parts_named(text_of(header, "BodyPartExamined"))]
    said += [_part_coded(value) for value, _, _ in codes_of(header, "AnatomicRegionSequence")]
    said = [parts for parts in said if parts]
    if not said:
        return accepts.body_part_may_be_absent
    if accepts.dimensions == 2:
        return all(parts <= accepted for parts in said)
    return all(parts & accepted for parts in said)


@lru_cache(maxsize=1024)
def _parts_named(text: str) -> frozenset[str]:
    """The parts that a text such as "CHEST", "Thorax^01" or "CHEST_TO_PELVIS" names; the text itself if no word is known."""
    plain = text.strip().upper()
    found: set[str] = set()
    for word in (re.sub("[^A-Z]", "", plain), *re.findall("[A-Z]+", plain)):
        for names, (words, _) in (_PARTS | _SEVERAL).items():
            if word in words.split():
                found |= set(names.split())
    return frozenset(found or ({plain} if plain else ()))


def _part_coded(value: str) -> frozenset[str]:
    for names, (_, codes) in (_PARTS | _SEVERAL).items():
        if value in codes.split():
            return frozenset(names.split())
    return frozenset({f"code {value}"})


def view_rank(header: Dataset, accepts: InputSection) -> int | None:
    """Return the place of the image's view in the manifest's list, its length if the header names none, None if it doesn't fit."""
    accepted = [_view_named(view) for view in accepts.view_positions]
    said = [_view_named(text_of(header, "ViewPosition"))]
    said += [_view_coded(value) for value, _, _ in codes_of(header, "ViewCodeSequence")]
    said = [names for names in said if names]
    if not accepted:
        return 0
    if not said:
        if _row_runs_front_to_back(header) and not any("LAT" in names for names in accepted):
            return None
        return len(accepted) if accepts.view_position_may_be_absent else None
    # "LAT" in the manifest takes LL and RL; "PA" doesn't take what is known to be frontal alone.
    places = [next((i for i, wanted in enumerate(accepted) if wanted[0] in names), None) for names in said]
    known = [place for place in places if place is not None]
    return min(known) if len(known) == len(places) else None


def view_fits(header: Dataset, accepts: InputSection) -> bool:
    """Compare View Position and View Code with the manifest: each that is there must fit."""
    return view_rank(header, accepts) is not None


def _view_named(text: str) -> list[str]:
    plain = re.sub("[^A-Z]", "", text.upper())
    for names, (words, _) in _VIEWS.items():
        if plain in words.split():
            return names.split()
    return [text.strip().upper()] if text.strip() else []


def _view_coded(value: str) -> list[str]:
    return next((names.split() for names, (_, codes) in _VIEWS.items() if value in codes.split()), [f"code {value}"])


def _row_runs_front_to_back(header: Dataset) -> bool:
    """Patient Orientation (PS3.3 C.7.6.1.1.1) of a lateral view: its rows run to anterior or posterior."""
    return (texts_of(header, "PatientOrientation") or [""])[0].strip().upper()[:1] in ("A", "P")


def laterality_fits(header: Dataset, accepts: InputSection) -> bool:
    """Compare Frame, Image or series Laterality, the first that is there, with the manifest."""
    if not accepts.laterality:
        return True
    for keyword in ("FrameLaterality", "ImageLaterality", "Laterality"):
        side = text_of(header, keyword).upper()
        if side:
            return side in accepts.laterality
    return accepts.laterality_may_be_absent


def age_years(header: Dataset) -> float | None:
    """Return the patient's age from Patient's Age, else from the dates of birth and study; None if the header doesn't say."""
    match = _AGE.match(text_of(header, "PatientAge").upper())
    if match:
        return int(match[1]) * _YEARS[match[2]]
    born, studied = _date(text_of(header, "PatientBirthDate")), _date(text_of(header, "StudyDate"))
    if born is None or studied is None or studied < born:
        return None
    years = studied.year - born.year - ((studied.month, studied.day) < (born.month, born.day))
    return float(years) if years >= 2 else (studied - born).days / 365.25


def age_fits(header: Dataset, accepts: InputSection) -> str | None:
    """Return why the patient's age doesn't fit the manifest, without saying the age; None if it does."""
    if accepts.age_years is None:
        return None
    low, high = accepts.age_years
    age = age_years(header)
    if age is None:
        return None if accepts.age_may_be_absent else "The header says no age, and the package needs one."
    if age < low - 1e-3:
        return f"The patient is younger than {low:g} years, the youngest that the package reads."
    if int(age + 1e-6) > high:
        return f"The patient is older than {high:g} years, the oldest that the package reads."
    return None


def _date(text: str) -> date | None:
    digits = text.replace(".", "")  # the form before DICOM 3.0 has dots
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:8])) if len(digits) == 8 else None
    except ValueError:
        return None
