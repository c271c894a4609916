"""Ribs of a frontal film, one by one: tubes that fall from the spine to the front, as a beam projects them.

The ribs of a rendered chest (`chest`) are bands that never end, which is enough for CT; on a film they are what most of a lung field
shows, so here each has a course, a thickness and an end of its own. Must never look at real images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dicomnode.phantoms.anatomy import Anatomy
from dicomnode.phantoms.shadows import Plane
from dicomnode.phantoms.shapes import Floats

Onto = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # (n, 3) LPS mm -> (n, 2): x and z in the plane of the detector

PAIRS = 10
PIECES = 20  # of a rib
FLAT = 0.6  # how thick a rib is, to its height
MARROW = 0.8  # of a rib's inside that is no dense bone
STEEPEST = 2.0  # path length along a rib that runs with the beam, to that across it


def draw_ribs(plane: Plane, anatomy: Anatomy, onto: Onto, rng: np.random.Generator) -> Floats:
    """Path lengths in mm of the dense bone of all ribs: front and back parts of each are drawn over each other."""
    total = np.zeros(plane.shape, dtype=np.float32)
    pitch, fall = rng.uniform(23, 31), rng.uniform(55, 125)
    height, wall = rng.uniform(4.5, 7.0), rng.uniform(0.55, 0.8)
    front = rng.uniform(0.62, 0.86)  # of the way to the sternum: there a rib becomes cartilage
    first = anatomy.apex_z + rng.uniform(-8, 14)
    for number in range(PAIRS):
        head = first - pitch * number * (1 - 0.012 * number)
        drop = fall * (0.35 + 0.65 * min(1.0, number / 4))
        for side in (-1.0, 1.0):
            bend, lift = rng.normal(0, 0.12), rng.normal(0, 1.5)
            theta = np.linspace(0.12, front + rng.normal(0, 0.02), PIECES) * np.pi
            z = head + lift - drop * (theta / np.pi) ** (1.35 + bend)
            width, depth = _cage_at(anatomy, z)
            points = np.stack([side * width * np.sin(theta), depth * np.cos(theta), z], axis=1)
            back = theta <= np.pi / 2
            radius = height * rng.uniform(0.9, 1.1) * (0.75 if number == 0 else 1.0)
            for part in (points[back], points[np.flatnonzero(~back)[0] - 1 :]):
                total += _tube(plane, part, onto(part), radius, wall)
    return total


def _cage_at(anatomy: Anatomy, z: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Half the width and half the depth of the cage's wall at heights, mm."""
    cage = anatomy.cage
    high = np.clip((z - cage.centre[2]) / cage.radii[2], 0, 0.93)
    share = np.sqrt(1 - high * high)
    return cage.radii[0] * share + 4, cage.radii[1] * share + 4


def _tube(plane: Plane, body: NDArray[np.float64], seen: NDArray[np.float64], radius: float, wall: float) -> Floats:
    """Path length in mm through a chain of flattened hollow rods; where two of them join, the longer way counts."""
    longest = np.zeros(plane.shape, dtype=np.float32)
    for start, end, there, here in zip(seen[:-1], seen[1:], body[:-1], body[1:], strict=True):
        box = plane.around(np.minimum(start, end) - radius, np.maximum(start, end) + radius)
        if box is None:
            continue
        part = plane.part(box)
        dx, dz = end - start
        square_length = float(dx * dx + dz * dz)
        along = np.clip(((part.x - start[0]) * dx + (part.z - start[1]) * dz) / max(square_length, 1e-6), 0, 1)
        square = (part.x - start[0] - along * dx) ** 2 + (part.z - start[1] - along * dz) ** 2
        outer = 2 * np.sqrt(np.maximum(radius * radius - square, 0))
        inner = 2 * np.sqrt(np.maximum((wall * radius) ** 2 - square, 0))
        slope = min(STEEPEST, float(np.linalg.norm(here - there)) / max(square_length**0.5, 1e-3))
        np.maximum(longest[box], FLAT * slope * (outer - MARROW * inner), out=longest[box])
    return longest
