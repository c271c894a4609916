"""What a report says in words is compared with what it must say.

Must never import highdicom or the encoders: what proves must not share code with what is proved.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from dicomnode.findings import Findings, Volume
from dicomnode.results.decoding import expect

WARNING = "RESEARCH USE ONLY - NOT FOR DIAGNOSIS"


def compare_comments(comments: Sequence[str], findings: Findings, volume: Volume) -> None:
    """Return if what must be told in words is told: the warning, each note, each class, what was left out, what a number means.

    Raises:
        ProofFailed: one sentence says what isn't told.
    """
    expect(WARNING in comments, "the SR doesn't say that it is for research only")
    for note in findings.notes:
        expect(any(_says(comment, note) for comment in comments), f"the SR doesn't say: {note}")
    for score in findings.scores:
        words = f"{score.label}: {100.0 * score.probability:.1f} %, {'positive' if score.positive else 'negative'}"
        expect(any(_says(comment, words) for comment in comments), f"the SR doesn't say in words: {words}")
    left_out = any(comment.startswith(f"{findings.omitted} further finding") for comment in comments)
    expect(left_out == (findings.omitted > 0), f"the SR doesn't say that {findings.omitted} findings are omitted")
    for calibration, words in (("detector", "at the detector"), ("none", "in pixels")):
        must = bool(findings.findings) and volume.calibration == calibration
        expect(not must or any(words in comment for comment in comments), f"the SR doesn't say that it measures {words}")


def _says(comment: str, words: str) -> bool:
    """Whether a comment begins with the letters and digits of `words`, whatever became of those that ASCII lacks."""
    left = iter(_letters(comment))
    return all(letter in left for letter in _letters(words))


def _letters(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if c.isascii() and c.isalnum())
