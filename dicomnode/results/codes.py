"""The coded concepts that results use beside those a package's manifest brings. One table, from PS3.16.

Must hold values and meanings exactly as the standard prints them.
"""

from __future__ import annotations

from dicomnode.findings import Code, Laterality

VOLUME = Code(value="118565006", scheme="SCT", meaning="Volume")
LONG_AXIS = Code(value="103339001", scheme="SCT", meaning="Long axis")
CERTAINTY = Code(value="111012", scheme="DCM", meaning="Certainty of Finding")  # CID 6048
BOUNDED_BY = Code(value="75958009", scheme="SCT", meaning="Bounded by")  # CID 219
QUALITATIVE_EVALUATIONS = Code(value="C0034375", scheme="UMLS", meaning="Qualitative Evaluations")  # TID 1500 row 12
COMMENT = Code(value="121106", scheme="DCM", meaning="Comment")
AREA = Code(value="42798000", scheme="SCT", meaning="Area")  # CID 7471
SEGMENTED = Code(value="113076", scheme="DCM", meaning="Segmentation")  # CID 7203
SOURCE_IMAGE = Code(value="121322", scheme="DCM", meaning="Source image for image processing operation")  # CID 7202
ARTIFICIAL_INTELLIGENCE = Code(value="123110", scheme="DCM", meaning="Artificial Intelligence")  # CID 7162

# No scheme that PS3.16 lists has a code for these two, so they are of a private one (PS3.16 8.2).
VOLUME_CHANGE = Code(value="VOLUME-CHANGE", scheme="99DICOMNODE", meaning="Volume change since prior study")
DOUBLING_TIME = Code(value="DOUBLING-TIME", scheme="99DICOMNODE", meaning="Volume doubling time")
PRIVATE = (VOLUME_CHANGE, DOUBLING_TIME)  # all of that scheme, for the conformance statement
QUALITATIVE_DIFFERENCE = Code(value="111049", scheme="DCM", meaning="Qualitative Difference")
INCREASED = Code(value="15454001", scheme="SCT", meaning="Increase in size")  # CID 6134
DECREASED = Code(value="19776001", scheme="SCT", meaning="Decrease in size")  # CID 6134
UNCHANGED = Code(value="129723006", scheme="SCT", meaning="No significant changes in the finding")  # CID 6134
NEW = Code(value="129721008", scheme="SCT", meaning="New finding")  # CID 6002
ABSENT = Code(value="272519000", scheme="SCT", meaning="Absent")  # CID 240

DAY = Code(value="d", scheme="UCUM", meaning="day")
MILLILITRE = Code(value="ml", scheme="UCUM", meaning="ml")
MILLIMETRE = Code(value="mm", scheme="UCUM", meaning="mm")
SQUARE_MILLIMETRE = Code(value="mm2", scheme="UCUM", meaning="mm2")
PIXELS = Code(value="{pixels}", scheme="UCUM", meaning="Pixels")
PERCENT = Code(value="%", scheme="UCUM", meaning="Percent")

SUMMARY = Code(value="111017", scheme="DCM", meaning="CAD Processing and Findings Summary")
# CID 6047 CAD Processing and Findings Summary
WITH_FINDINGS = Code(value="111242", scheme="DCM", meaning="All algorithms succeeded; with findings")
WITHOUT_FINDINGS = Code(value="111241", scheme="DCM", meaning="All algorithms succeeded; without findings")
NO_ALGORITHM_SUCCEEDED = Code(value="111245", scheme="DCM", meaning="No algorithms succeeded; without findings")

LATERALITY: dict[Laterality, Code] = {
    "left": Code(value="7771000", scheme="SCT", meaning="Left"),  # CID 244
    "right": Code(value="24028007", scheme="SCT", meaning="Right"),
}

# CID 100 Quantitative Diagnostic Imaging Procedures: it names modalities; the part of the body stands in each finding's site.
_PROCEDURES: dict[str, Code] = {
    "CT": Code(value="25045-6", scheme="LN", meaning="CT unspecified body region"),
    "MR": Code(value="25056-3", scheme="LN", meaning="MRI unspecified body region"),
    "NM": Code(value="49118-3", scheme="LN", meaning="NM unspecified body region"),
    "PT": Code(value="44136-0", scheme="LN", meaning="PET unspecified body region"),
    "CR": Code(value="43468-8", scheme="LN", meaning="XR unspecified body region"),
    "DX": Code(value="43468-8", scheme="LN", meaning="XR unspecified body region"),
    "RG": Code(value="43468-8", scheme="LN", meaning="XR unspecified body region"),
}
_IMAGING = Code(value="363679005", scheme="SCT", meaning="Imaging procedure")  # CID 100

# CID 29 Acquisition Modality, and of CID 32 what isn't in it: the value is that of Modality (0008,0060)
_MODALITIES = {
    "CT": "Computed Tomography", "MR": "Magnetic Resonance", "PT": "Positron emission tomography", "NM": "Nuclear Medicine",
    "CR": "Computed Radiography", "DX": "Digital Radiography", "MG": "Mammography", "RG": "Radiographic imaging",
    "XA": "X-Ray Angiography", "RF": "Radiofluoroscopy", "PX": "Panoramic X-Ray", "IO": "Intra-oral Radiography",
    "US": "Ultrasound", "OT": "Other",
}  # fmt: skip


def modality(value: str) -> Code | None:
    """Return the coded modality of a Modality (0008,0060), or None where this table doesn't know it."""
    return Code(value=value, scheme="DCM", meaning=_MODALITIES[value]) if value in _MODALITIES else None


def as_printed(code: Code) -> Code:
    """Return the code with the meaning that PS3.16 prints, where this table knows it."""
    return next((c for c in (VOLUME, LONG_AXIS, AREA) if (c.value, c.scheme) == (code.value, code.scheme)), code)


def procedure_reported(modality: str) -> Code:
    """Return the Procedure Reported (121058, DCM) of images of a Modality (0008,0060)."""
    return _PROCEDURES.get(modality, _IMAGING)
