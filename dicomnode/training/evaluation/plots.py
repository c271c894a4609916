"""The plots of a report, each as an SVG picture of its own. Draws what evaluation.json says and computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_Figures = Mapping[str, Any]
_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c8641b", "#8a8f98"
_STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e6ea",
    "axes.edgecolor": "#8a8f98", "axes.titlesize": 10, "axes.titleweight": "bold", "svg.hashsalt": "dicomnode", "legend.frameon": False,
}  # fmt: skip


def froc(row: _Figures) -> bytes | None:
    """Sensitivity over false findings a scan, with the rates of the table and where the package works."""
    if not row["froc"]:
        return None
    with mpl.rc_context(_STYLE):
        figure, axes = _axes("FROC: lesions found", "false findings a scan", "sensitivity")
        rates = [max(rate, 0.05) for _, rate, _ in row["froc"]["curve"]]
        axes.step(rates, [sensitivity for _, _, sensitivity in row["froc"]["curve"]], where="post", color=_BLUE)
        axes.plot(
            row["froc"]["false_findings_per_scan"], row["froc"]["sensitivity"], "o", color=_BLUE, markersize=4, label="1/8 to 8 a scan"
        )
        if row["sensitivity"] is not None and row["false_findings_per_scan"] is not None:
            place = [max(row["false_findings_per_scan"], 0.05)], [row["sensitivity"]]
            axes.plot(*place, "D", color=_ORANGE, label=f"as it reports (score {row['minimum_score']:g})")
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.05, 12)
        axes.set_xticks([0.05, 0.125, 0.25, 0.5, 1, 2, 4, 8], ["≤0.05", "1/8", "1/4", "1/2", "1", "2", "4", "8"])
        axes.minorticks_off()
        axes.set_ylim(0, 1.02)
        axes.legend(loc="lower right")
        return _svg(figure)


def by_size(row: _Figures) -> bytes | None:
    """The share found in each bin of diameters, with Wilson's intervals and the numbers."""
    sizes = [size for size in row["by_size"] if size["lesions"]]
    if not sizes:
        return None
    with mpl.rc_context(_STYLE):
        figure, axes = _axes("Lesions found by diameter", "diameter (mm)", "share found")
        shares = [size["found"] / size["lesions"] for size in sizes]
        low, high = ([abs(share - size["interval"][i]) for share, size in zip(shares, sizes, strict=True)] for i in (0, 1))
        axes.bar(range(len(sizes)), shares, color=_BLUE, alpha=0.35, width=0.65)
        axes.errorbar(range(len(sizes)), shares, yerr=[low, high], fmt="o", color=_BLUE, markersize=4, capsize=3)
        for place, size in enumerate(sizes):
            axes.text(place, 1.04, f"{size['found']}/{size['lesions']}", ha="center", fontsize=8)
        bounds = [size["diameter_mm"] for size in sizes]
        axes.set_xticks(range(len(sizes)), [f"{low:g}+" if high is None else f"{low:g}-{high:g}" for low, high in bounds])
        axes.set_ylim(0, 1.12)
        return _svg(figure)


def dice(figures: _Figures, label: str) -> bytes | None:
    """Each case's Dice as a dot, over a box of quartiles."""
    values = [outline["dice"] for outline in _outlines(figures, label) if outline["dice"] is not None]
    if not values:
        return None
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(f"Dice of {len(values)} cases", "", "Dice")
        axes.boxplot([values], positions=[0], widths=0.5, showfliers=False, medianprops={"color": _ORANGE}, boxprops={"color": _GREY})
        axes.plot(_scattered(len(values)), values, "o", color=_BLUE, alpha=0.6, markersize=4)
        axes.set_xlim(-0.6, 0.6)
        axes.set_xticks([])
        axes.set_ylim(min(0.5, *values) - 0.02, 1.01)
        return _svg(figure)


def agreement(figures: _Figures, row: _Figures) -> bytes | None:
    """Bland and Altman's plot of the size: difference over mean, bias and limits."""
    pairs = [(each["marked"], each["reference"]) for each in _outlines(figures, row["label"]) if each["reference"] > 0]
    if len(pairs) < 2 or not row["limits_of_agreement"]:
        return None
    marked, reference = np.array(pairs).T
    limits = row["limits_of_agreement"]
    with mpl.rc_context(_STYLE):
        figure, axes = _axes("Size: Bland-Altman", f"mean of marked and reference ({row['unit']})", f"marked - reference ({row['unit']})")
        axes.plot((marked + reference) / 2, marked - reference, "o", color=_BLUE, alpha=0.7, markersize=4)
        axes.axhline(0, color=_GREY, linewidth=0.8)
        axes.axhline(limits["bias"], color=_ORANGE, label=f"bias {limits['bias']:.2f}")
        for edge in ("low", "high"):
            axes.axhline(limits[edge], color=_ORANGE, linestyle="--", label=f"{limits[edge]:.2f}")
        axes.legend(loc="best", fontsize=8)
        return _svg(figure)


def roc(row: _Figures) -> bytes | None:
    """The ROC curve, and where the package works."""
    if not row["roc"]:
        return None
    with mpl.rc_context(_STYLE):
        low, high = row["auc_interval"]
        figure, axes = _axes(f"ROC: AUC {row['auc']:.3f} [{low:.3f} to {high:.3f}]", "1 - specificity", "sensitivity")
        axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=":")
        axes.step(*np.array(row["roc"]).T, where="post", color=_BLUE)
        axes.plot([1 - row["specificity"]], [row["sensitivity"]], "D", color=_ORANGE, label=f"as it reports ({row['threshold']:g})")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.legend(loc="lower right")
        return _svg(figure)


def calibration(row: _Figures | None, title: str) -> bytes | None:
    """How often what has a score is true, with Wilson's intervals, and how many scores there are."""
    if not row:
        return None
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, "mean score of the bin", "share that is true")
        means, shares = ([bin_[key] for bin_ in row["bins"]] for key in ("mean_score", "observed"))
        low, high = ([abs(bin_["observed"] - bin_["observed_interval"][i]) for bin_ in row["bins"]] for i in (0, 1))
        axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=":")
        axes.errorbar(means, shares, yerr=[low, high], fmt="o", color=_BLUE, markersize=4, capsize=3)
        for bin_ in row["bins"]:
            axes.annotate(
                f"{bin_['n']}", (bin_["mean_score"], bin_["observed"]), (5, 4), textcoords="offset points", fontsize=7, color=_GREY
            )
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.05, 1.05)
        return _svg(figure)


def _axes(title: str, across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.3, 3.3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    return figure, axes


def _svg(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _outlines(figures: _Figures, label: str) -> list[_Figures]:
    rows = (case.get("labels", {}).get(label) for case in figures["cases"])
    return [row["outline"] for row in rows if row and row["outline"]]


def _scattered(count: int) -> Sequence[float]:
    return [float(place) for place in np.random.default_rng(0).uniform(-0.18, 0.18, count)]
