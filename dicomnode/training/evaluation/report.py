"""The report of an evaluation: one HTML file that needs nothing else, and the pictures in it as files.

Must never load anything from elsewhere, run a script, or show a text that isn't escaped.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dicomnode.analysis.package import Package
from dicomnode.training import card
from dicomnode.training.evaluation import matching, plots
from dicomnode.training.evaluation.pictures import Failure

REPORT = "report.html"


def write_report(out: Path, package: Package, figures: Mapping[str, Any], worst: Sequence[Failure]) -> Path:
    """Write report.html and worst_01.png, worst_02.png... into `out`, over an earlier one, and return the report's path.

    `figures` are those of one set of cases, as `evaluate` returns them.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("worst_[0-9][0-9].png"):
        old.unlink()
    pictures = []
    for number, failure in enumerate(worst, start=1):
        png = failure.picture()
        (out / f"worst_{number:02d}.png").write_bytes(png)
        pictures.append((failure, embedded(png, "image/png")))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(REPORT).render(
        package=package, manifest=package.manifest, figures=figures, card=card, pictures=pictures, rules=matching.RULES,
        labels=[_sections(figures, output.label) for output in package.manifest.outputs], few=card.FEW,
        inputs=[card.input_text(accepts) for accepts in package.manifest.inputs],
        outputs=[card.output_text(output, package.manifest) for output in package.manifest.outputs],
    )  # fmt: skip
    file = out / REPORT
    file.write_text(page, encoding="utf-8")
    return file


def embedded(content: bytes, kind: str) -> str:
    """A picture as the address of an <img>: what is in it can't run."""
    return f"data:{kind};base64,{b64encode(content).decode('ascii')}"


def _sections(figures: Mapping[str, Any], label: str) -> dict[str, Any]:
    """What one label has of each kind of figures, with its plots."""
    outline, lesions, called = (
        next((row for row in figures[kind] if row["label"] == label), None) for kind in ("segmentation", "lesions", "scores")
    )
    drawn = [
        *([plots.dice(figures, label), plots.agreement(figures, outline)] if outline else []),
        *(
            [plots.froc(lesions), plots.by_size(lesions), plots.calibration(lesions["calibration"], "Scores of findings")]
            if lesions
            else []
        ),
        *([plots.roc(called), plots.calibration(called["calibration"], "Scores of studies")] if called else []),
    ]
    return {
        "label": label, "outline": outline, "lesions": lesions, "called": called,
        "plots": [embedded(svg, "image/svg+xml") for svg in drawn if svg is not None],
    }  # fmt: skip
