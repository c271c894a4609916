"""The measures of an evaluation as plain functions of numbers and masks, with their intervals. Knows no package and no case.

What has no answer is None and never a flattering number: no Dice where the reference is empty, no distance where either outline is.
All intervals are of 95 %; what is drawn is drawn from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize, stats
from scipy.spatial import KDTree

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
    Nearest neighbours are searched among the surfaces' points: small masks far apart cost no distance map of all between them.
    """
    if not prediction.any() or not reference.any():
        return None
    clouds = [_surface(mask) * np.asarray(spacing_mm) for mask in (prediction, reference)]
    there, back = (KDTree(clouds[1 - i]).query(clouds[i])[0] for i in range(2))
    hausdorff = max(float(np.percentile(distances, 95)) for distances in (there, back))
    return hausdorff, float(np.concatenate([there, back]).mean())


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
    drawn = (statistic([values[i] for i in places]) for places in _drawings(len(values)))
    defined = [value for value in drawn if value is not None]
    return _middle(defined) if defined else None


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
    median, mean = _intervals(units, np.median), _intervals(units, np.mean)
    return {
        "n": len(values), "median": float(np.median(values)), "median_interval": median,
        "mean": float(np.mean(values)), "mean_interval": mean,
        "lowest": float(min(values)), "highest": float(max(values)),
    }  # fmt: skip


def _intervals(units: Sequence[Sequence[float]], statistic: Callable[..., Any]) -> Interval | None:
    """The bootstrap's interval of a median or mean of all values of the units; in one step where each has one value."""
    if len(units) < 3 or any(len(unit) > 1 for unit in units):
        return bootstrap(units, lambda drawn: float(statistic(np.concatenate(drawn))))
    return _middle(statistic(np.ravel(units)[_drawings(len(units))], axis=1))


def _drawings(count: int) -> NDArray[np.intp]:
    """Which units are drawn, (RESAMPLES, count), the same each time."""
    return np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count))


def _middle(drawn: Sequence[float] | NDArray[np.float64]) -> Interval:
    low, high = np.quantile(drawn, (0.5 - LEVEL / 2, 0.5 + LEVEL / 2))
    return float(low), float(high)


def _surface(mask: Mask) -> NDArray[np.intp]:
    """Indices (n, 3) of the voxels with a neighbour outside of the mask; beyond the image is outside, but not across a single slice."""
    box = ndimage.find_objects(mask.view(np.uint8))[0]
    cross = ndimage.generate_binary_structure(3, 1)
    if len(mask) == 1:
        cross[[0, 2]] = False
    inside = mask[box]
    edge: Mask = inside & ~ndimage.binary_erosion(inside, cross)
    places: NDArray[np.intp] = np.argwhere(edge) + np.array([part.start for part in box])
    return places


def _newcombe(area: float, m: int, n: int) -> Interval:
    """Where the area lies at the edge of its own interval, with Hanley and McNeil's variance under exponential scores."""
    more = (m + n) / 2 - 1

    def reach(true: float) -> float:
        variance = true * (1 - true) * (1 + more * (1 - true) / (2 - true) + more * true / (1 + true)) / (m * n)
        return _Z * float(np.sqrt(variance))

    low = 0.0 if area == 0 else float(optimize.brentq(lambda true: area - true - reach(true), 0.0, area * (1 - 1e-12)))
    high = 1.0 if area == 1 else float(optimize.brentq(lambda true: true - area - reach(true), area + (1 - area) * 1e-12, 1.0))
    return low, high
