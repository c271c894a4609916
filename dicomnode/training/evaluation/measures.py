"""The measures of an evaluation as plain functions of numbers and masks, with their intervals. Knows no package and no case.

What has no answer is None and never a flattering number: no Dice where the reference is empty, no distance where either outline is.
All intervals are of 95 %; what is drawn is drawn from a fixed seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from numpy.typing import NDArray
from scipy import ndimage, optimize, stats

LEVEL = 0.95
RESAMPLES = 2000
SEED = 20260101
BINS = 10  # of reliability, of equal width
FROC_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false findings a scan, as LUNA16 has them (Setio 2017)

Interval = tuple[float, float]
Mask = NDArray[np.bool_]
_Z = float(stats.norm.ppf(0.5 + LEVEL / 2))


def dice(prediction: Mask, reference: Mask) -> float | None:
    """2 |A and B| / (|A| + |B|) of two masks of one shape; 0 where nothing was marked, None where the reference is empty."""
    of_reference = int(np.count_nonzero(reference))
    if not of_reference:
        return None
    return 2 * int(np.count_nonzero(prediction & reference)) / (int(np.count_nonzero(prediction)) + of_reference)


def surface_distances(prediction: Mask, reference: Mask, spacing_mm: Sequence[float]) -> tuple[float, float] | None:
    """The 95th percentile Hausdorff distance and the average symmetric surface distance of two masks, mm. None where one is empty.

    As MONAI has them: a surface is a mask's voxels with a neighbour outside of it; HD95 is the larger of the two directions' 95th
    percentiles, the average that of both directions together. Masks (k, r, c) with their spacing; one slice is measured in its plane.
    """
    both = prediction | reference
    if not prediction.any() or not reference.any():
        return None
    box = ndimage.find_objects(both.view(np.uint8))[0]
    flat = both.shape[0] == 1
    pair = [torch.from_numpy(np.ascontiguousarray(mask[box]))[None, None] for mask in (prediction, reference)]
    pair = [mask[:, :, 0] if flat else mask for mask in pair]
    pair = [torch.nn.functional.pad(mask, (1, 1) * (mask.ndim - 2)) for mask in pair]
    spacing = list(spacing_mm[1:] if flat else spacing_mm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI tells of optional packages
        hausdorff = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
        average = compute_average_surface_distance(*pair, include_background=True, symmetric=True, spacing=spacing)
    return float(hausdorff), float(average)


def wilson(hits: int, count: int) -> Interval | None:
    """Wilson's score interval of a proportion; None of nothing."""
    if count == 0:
        return None
    low, high = stats.binomtest(hits, count).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


def bootstrap(values: Sequence[Any], statistic: Callable[[Sequence[Any]], float | None]) -> Interval | None:
    """The percentile bootstrap's interval of a statistic of independent units (patients, or cases); None of fewer than three.

    Drawings that have no statistic are left out.
    """
    if len(values) < 3:
        return None
    rng = np.random.default_rng(SEED)
    drawn = (statistic([values[i] for i in rng.integers(0, len(values), len(values))]) for _ in range(RESAMPLES))
    defined = [value for value in drawn if value is not None]
    if not defined:
        return None
    low, high = np.quantile(defined, (0.5 - LEVEL / 2, 0.5 + LEVEL / 2))
    return float(low), float(high)


def froc_curve(lesion_scores: Sequence[float | None], false_scores: Sequence[float], scans: int) -> list[tuple[float, float, float]]:
    """(score, false findings a scan, sensitivity) at every score that occurs, from the highest down.

    A lesion's score is that of the best finding that meets it, None where none does.
    """
    found = np.sort([score for score in lesion_scores if score is not None])
    false = np.sort(np.asarray(false_scores, dtype=np.float64))
    curve = []
    for score in sorted({*found.tolist(), *false.tolist()}, reverse=True):
        hits = len(found) - int(np.searchsorted(found, score))
        wrong = len(false) - int(np.searchsorted(false, score))
        curve.append((float(score), wrong / scans, hits / len(lesion_scores)))
    return curve


def sensitivities(lesion_scores: Sequence[float | None], false_scores: Sequence[float], scans: int) -> list[float] | None:
    """The highest sensitivity with at most FROC_RATES false findings a scan, each; None without lesions. Nothing is interpolated."""
    if not lesion_scores or not scans:
        return None
    found = np.array([score for score in lesion_scores if score is not None], dtype=np.float64)
    false = np.sort(np.asarray(false_scores, dtype=np.float64))[::-1]
    reached = []
    for rate in FROC_RATES:
        most = int(rate * scans + 1e-9)
        lowest = false[most] if len(false) > most else -1.0  # a finding must be above the first false one that is too many
        reached.append(int(np.count_nonzero(found > lowest)) / len(lesion_scores))
    return reached


def auc(positive: Sequence[float], negative: Sequence[float]) -> tuple[float, Interval, str] | None:
    """Area under the ROC curve, its interval and the interval's method; None without both classes.

    DeLong's variance (1988) on the logit of the area. Where that variance is zero (all pairs are ordered alike, or a class has one
    member) Newcombe's method 5 (2006), which doesn't take a small sample's perfect order for certainty.
    """
    if not positive or not negative:
        return None
    above = np.asarray(positive, dtype=np.float64)[:, None] - np.asarray(negative, dtype=np.float64)[None, :]
    wins = (above > 0) + 0.5 * (above == 0)
    area = float(wins.mean())
    m, n = wins.shape
    variance = float(wins.mean(axis=1).var(ddof=1) / m + wins.mean(axis=0).var(ddof=1) / n) if m > 1 and n > 1 else 0.0
    if variance > 0 and 0 < area < 1:
        half = _Z * np.sqrt(variance) / (area * (1 - area))
        middle = np.log(area / (1 - area))
        return area, (float(1 / (1 + np.exp(half - middle))), float(1 / (1 + np.exp(-half - middle)))), "DeLong, logit"
    return area, _newcombe(area, m, n), "Newcombe, method 5"


def roc_curve(positive: Sequence[float], negative: Sequence[float]) -> list[tuple[float, float]]:
    """(1 - specificity, sensitivity) for each score as the lowest that is called positive, from (0, 0) to (1, 1)."""
    yes, no = np.asarray(positive), np.asarray(negative)
    levels = sorted({*positive, *negative}, reverse=True)
    return [(0.0, 0.0), *((float((no >= level).mean()), float((yes >= level).mean())) for level in levels)]


def calibration(scores: Sequence[float], truths: Sequence[bool]) -> dict[str, Any] | None:
    """Reliability in BINS bins of equal width, expected calibration error and Brier score; None of nothing.

    A score of 1 belongs to the last bin. ECE: the mean distance of mean score and share of truths, weighted by the bins' numbers.
    """
    if not scores:
        return None
    values, true = np.asarray(scores, dtype=np.float64), np.asarray(truths, dtype=np.float64)
    place = np.minimum((values * BINS).astype(int), BINS - 1)
    rows: list[dict[str, Any]] = []
    for number in range(BINS):
        inside = place == number
        if inside.any():
            count, hits = int(inside.sum()), int(true[inside].sum())
            rows.append({
                "from": number / BINS, "to": (number + 1) / BINS, "n": count, "mean_score": float(values[inside].mean()),
                "observed": hits / count, "observed_interval": wilson(hits, count),
            })  # fmt: skip
    error = sum(row["n"] * abs(row["mean_score"] - row["observed"]) for row in rows) / len(values)
    return {"n": len(values), "expected_calibration_error": error, "brier": float(np.mean((values - true) ** 2)), "bins": rows}


def spread(values: Sequence[float], groups: Sequence[str]) -> dict[str, Any] | None:
    """Median and mean with bootstrap intervals, lowest and highest, and how many; None of nothing. `groups` are drawn whole."""
    if not values:
        return None
    together: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        together.setdefault(group, []).append(value)
    units = list(together.values())
    return {
        "n": len(values),
        "median": float(np.median(values)), "median_interval": bootstrap(units, lambda drawn: float(np.median(np.concatenate(drawn)))),
        "mean": float(np.mean(values)), "mean_interval": bootstrap(units, lambda drawn: float(np.mean(np.concatenate(drawn)))),
        "lowest": float(min(values)), "highest": float(max(values)),
    }  # fmt: skip


def _newcombe(area: float, m: int, n: int) -> Interval:
    """Where the area lies at the edge of its own interval, with Hanley and McNeil's variance under exponential scores."""
    more = (m + n) / 2 - 1

    def reach(true: float) -> float:
        variance = true * (1 - true) * (1 + more * (1 - true) / (2 - true) + more * true / (1 + true)) / (m * n)
        return _Z * float(np.sqrt(variance))

    low = 0.0 if area == 0 else float(optimize.brentq(lambda true: area - true - reach(true), 0.0, area * (1 - 1e-12)))
    high = 1.0 if area == 1 else float(optimize.brentq(lambda true: true - area - reach(true), area + (1 - area) * 1e-12, 1.0))
    return low, high
