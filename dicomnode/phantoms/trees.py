"""Branching trees for pulmonary vessels and airways.

Radii follow Murray's law (the cubes of the children's radii add up to the parent's; C. D. Murray, PNAS 12, 1926).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dicomnode.phantoms.shapes import Tubes

Points = NDArray[np.float64]


def _sideways(directions: Points, rng: np.random.Generator) -> Points:
    """Unit vectors at right angles to `directions` (n, 3), at random angles around them."""
    other = np.cross(directions, rng.normal(size=directions.shape))
    return np.asarray(other / np.maximum(np.linalg.norm(other, axis=1, keepdims=True), 1e-6))


def grow_tree(
    rng: np.random.Generator,
    *,
    root: Points,
    directions: Points,
    radius_mm: float,
    smallest_mm: float,
    depth_inside: Callable[[Points], NDArray[np.float32]],
    first_free: int = 3,
) -> Tubes:
    """Grow one tree from `root` (3,) into `directions` (n, 3), generation by generation.

    `depth_inside` gives for (n, 3) points how deep they lie inside the organ in mm; after the first `first_free`
    generations a branch that would end less than 1.5 mm deep is not grown.
    """
    tip = np.repeat(root[None], len(directions), axis=0)
    way = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    radius = np.full(len(directions), radius_mm * len(directions) ** (-1 / 3))
    parts: list[tuple[Points, Points, NDArray[np.float64], NDArray[np.float64]]] = []
    generation = 0
    while len(tip):
        length = np.clip(radius * rng.uniform(4.0, 9.0, len(tip)), 3.5, 26.0)
        bend = way + 0.22 * _sideways(way, rng) * rng.uniform(0, 1, (len(tip), 1))
        bend /= np.linalg.norm(bend, axis=1, keepdims=True)
        middle = tip + way * (length / 2)[:, None]
        end = middle + bend * (length / 2)[:, None]
        if generation >= first_free:
            kept = depth_inside(end) > 1.5
            tip, middle, end, bend, radius = tip[kept], middle[kept], end[kept], bend[kept], radius[kept]
        parts += [(tip, middle, radius, radius * 0.97), (middle, end, radius * 0.97, radius * 0.92)]
        share = rng.uniform(0.25, 0.75, len(end))
        side = _sideways(bend, rng)
        children = []
        for sign, fraction in ((1.0, share), (-1.0, 1 - share)):
            child_radius = radius * np.cbrt(fraction)
            angle = np.deg2rad(rng.uniform(18, 42, len(end)) + 25 * (0.5 - fraction))[:, None]
            child_way = np.cos(angle) * bend + sign * np.sin(angle) * side
            children.append((end, child_way, child_radius))
        tip = np.concatenate([c[0] for c in children])
        way = np.concatenate([c[1] for c in children])
        radius = np.concatenate([c[2] for c in children])
        wide = radius >= smallest_mm
        tip, way, radius = tip[wide], way[wide], radius[wide]
        generation += 1
    starts, ends, start_radii, end_radii = (np.concatenate([p[i] for p in parts]) for i in range(4))
    return Tubes(starts=starts, ends=ends, start_radii=start_radii, end_radii=end_radii)


def chain(points: Points, radii: NDArray[np.float64]) -> Tubes:
    """A bent tube through `points` (n, 3) with the given radii (n,)."""
    return Tubes(starts=points[:-1], ends=points[1:], start_radii=radii[:-1], end_radii=radii[1:])


def together(parts: list[Tubes]) -> Tubes:
    """All tubes of `parts` as one set."""
    return Tubes(
        starts=np.concatenate([p.starts for p in parts]),
        ends=np.concatenate([p.ends for p in parts]),
        start_radii=np.concatenate([p.start_radii for p in parts]),
        end_radii=np.concatenate([p.end_radii for p in parts]),
    )
