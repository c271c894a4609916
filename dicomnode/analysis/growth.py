"""Findings of two studies of one patient, put together: which is the same, by how much it grew, which is new, which is gone.

Must never import torch, read a file or know how results are written.
"""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from math import log, pi
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from dicomnode.findings import Comparison, Finding, Findings, Growth, Prior, PriorFinding, Volume

# What breathing, posture and a coarse alignment leave between two places of one thing.
RESIDUAL_MM = 10.0
# Growth is a change of volume by at least a quarter; below that it may be measurement (British Thoracic Society, Thorax 2015;70 Suppl 2).
SIGNIFICANT_PERCENT = 25.0
ABNORMAL = "49755003"  # Morphologically Abnormal Structure: what may grow; an organ has no doubling time

_NEVER = 1e6  # mm: a pair that can't be one thing


def compare(findings: Findings, volume: Volume, prior: Prior) -> Findings:
    """Return the findings, each with its former self where the prior study has one, and with what became of the others.

    Two are the same thing if they are of one type, name, shape and side, and their centres, brought into one space, are nearest to each
    other among all, and not farther apart than the larger one's radius (that of a ball of its volume) and RESIDUAL_MM. Outlines get
    a volume change in percent, and a doubling time in days where something abnormal grew significantly in at least a day:
    days · ln 2 / ln(volume / former volume).
    """
    distances = _distances(findings.findings, volume, prior)
    pairs = {int(i): int(j) for i, j in zip(*linear_sum_assignment(distances), strict=True) if distances[i, j] < _NEVER}
    compared = [
        _grown(finding, prior.findings[pairs[i]], volume, prior.days) if i in pairs else finding
        for i, finding in enumerate(findings.findings)
    ]
    vanished = tuple(former for j, former in enumerate(prior.findings) if j not in pairs.values())
    return replace(findings, findings=tuple(compared), comparison=Comparison(prior=prior, vanished=vanished))


def volume_change_percent(volume_ml: float, former_ml: float) -> float:
    """Return by how much a volume changed, in percent of the former one."""
    return 100.0 * (volume_ml - former_ml) / former_ml


def doubling_days(volume_ml: float, former_ml: float, days: float) -> float:
    """Return the time in which the volume doubled once, had it grown exponentially."""
    return days * log(2.0) / log(volume_ml / former_ml)


def _distances(findings: tuple[Finding, ...], volume: Volume, prior: Prior) -> NDArray[np.float64]:
    """(findings, prior findings): mm between the centres; _NEVER where they can't be the same."""
    to_current = np.array(prior.to_current)
    distances = np.full((len(findings), len(prior.findings)), _NEVER)
    for j, former in enumerate(prior.findings):
        place = to_current[:, :3] @ np.array(former.centre_lps_mm) + to_current[:, 3]
        for i, finding in enumerate(findings):
            if finding.centre_lps_mm is None or not _alike(finding, former):
                continue
            distance = float(np.linalg.norm(place - np.array(finding.centre_lps_mm)))
            reach = max(_radius_mm(finding.segment.voxel_count * volume.voxel_ml), _radius_mm(former.volume_ml)) + RESIDUAL_MM
            if distance <= reach:
                distances[i, j] = distance
    return distances


def _alike(finding: Finding, former: PriorFinding) -> bool:
    same_type = (finding.type.value, finding.type.scheme) == (former.type.value, former.type.scheme)
    same_side = finding.side is None or former.side is None or finding.side == former.side
    return same_type and same_side and _name(finding.label) == _name(former.label) and finding.shape == former.shape


def _name(label: str) -> str:
    """A label without what a SEG may have changed of it: letters beyond ASCII, and an end beyond 64 characters."""
    return "".join(c for c in unicodedata.normalize("NFKD", label) if c.isascii() and c.isalnum())[:40]


def _grown(finding: Finding, former: PriorFinding, volume: Volume, days: int | None) -> Finding:
    if finding.shape != "outline":
        return replace(finding, growth=Growth(former=former, percent=None, trend=None, doubling_days=None))
    now_ml = finding.segment.voxel_count * volume.voxel_ml
    percent = volume_change_percent(now_ml, former.volume_ml)
    trend: Literal["grown", "shrunk", "unchanged"] = "unchanged"
    if abs(percent) >= SIGNIFICANT_PERCENT:
        trend = "grown" if percent > 0 else "shrunk"
    doubling = None
    if trend == "grown" and finding.category.value == ABNORMAL and days is not None and days > 0:
        doubling = doubling_days(now_ml, former.volume_ml, days)
    return replace(finding, growth=Growth(former=former, percent=percent, trend=trend, doubling_days=doubling))


def _radius_mm(volume_ml: float) -> float:
    """Of a ball of this volume."""
    return float((3000.0 * volume_ml / (4.0 * pi)) ** (1.0 / 3.0))
