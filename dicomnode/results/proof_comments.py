"""What a report says in words is compared with what it must say, and whether it names its procedure and its algorithm.

Must never import highdicom or the encoders: what proves must not share code with what is proved.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from pydicom import Dataset

from dicomnode.findings import Findings, Volume
from dicomnode.results.decoding import concept_of, expect, items_below

WARNING = "RESEARCH USE ONLY - NOT FOR DIAGNOSIS"
_PROCEDURE, _GROUP, _ALGORITHM, _VERSION = "121058", "125007", "111001", "111003"  # of DCM
_PROCEDURES = {  # CID 100, by Modality
    "CT": ("25045-6", "LN"), "MR": ("25056-3", "LN"), "NM": ("49118-3", "LN"), "PT": ("44136-0", "LN"),
    "CR": ("43468-8", "LN"), "DX": ("43468-8", "LN"), "RG": ("43468-8", "LN"),
}  # fmt: skip
_IMAGING = ("363679005", "SCT")


def compare_comments(comments: Sequence[str], findings: Findings, volume: Volume) -> None:
    """Return if what must be told in words is told: the warning, each note, each class, what was left out, what a number means.

    Raises:
        ProofFailed: one sentence says what isn't told.
    """
    expect(WARNING in comments, "the SR doesn't say that it is for research only")
    for note in findings.notes:
        expect(any(says(comment, note) for comment in comments), f"the SR doesn't say: {note}")
    for score in findings.scores:
        words = f"{score.label}: {100.0 * score.probability:.1f} %, {'positive' if score.positive else 'negative'}"
        expect(any(says(comment, words) for comment in comments), f"the SR doesn't say in words: {words}")
    left_out = any(comment.startswith(f"{findings.omitted} further finding") for comment in comments)
    expect(left_out == (findings.omitted > 0), f"the SR doesn't say that {findings.omitted} findings are omitted")
    for calibration, words in (("detector", "at the detector"), ("none", "in pixels")):
        must = bool(findings.findings) and volume.calibration == calibration
        expect(not must or any(words in comment for comment in comments), f"the SR doesn't say that it measures {words}")


def compare_origin(document: Dataset, *, modality: str, algorithm_name: str, package_version: str) -> None:
    """Return if the report names once the procedure it reports on, and each group the algorithm with version and weights (TID 1500, 4019).

    Raises:
        ProofFailed: one sentence says what is missing or another's.
    """
    procedures = [item.get("ConceptCodeSequence") for item in document.get("ContentSequence", []) if concept_of(item) == _PROCEDURE]
    said = [(str(codes[0].get("CodeValue")), str(codes[0].get("CodingSchemeDesignator"))) for codes in procedures if codes]
    wanted = _PROCEDURES.get(modality, _IMAGING)
    expect(said == [wanted], f"the SR's Procedure Reported is {said or 'missing'}, not {wanted} for {modality}")
    version = re.compile(re.escape(package_version) + r" weights sha256:[0-9a-f]{64}")
    for group in (item for item in items_below(document) if concept_of(item) == _GROUP):
        texts = [(concept_of(item), str(item.get("TextValue", ""))) for item in items_below(group)]
        names = [text for concept, text in texts if concept == _ALGORITHM]
        expect(len(names) == 1 and _letters(names[0]) == _letters(algorithm_name), f"the SR names {names} as a group's algorithm")
        versions = [text for concept, text in texts if concept == _VERSION]
        right = len(versions) == 1 and version.fullmatch(versions[0]) is not None
        expect(right, f"the SR gives {versions} as the version of a group's algorithm, which is {package_version} with its weights")


def says(comment: str, words: str) -> bool:
    """Whether a comment begins with the letters and digits of `words`, whatever became of those that ASCII lacks."""
    left = iter(_letters(comment))
    return all(letter in left for letter in _letters(words))


def _letters(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if c.isascii() and c.isalnum())
