"""Opacities in the lungs of a chest film, and what looks like one and is none: as path lengths that are added to a shadow.

What absorbs adds up along a beam, so one projected chest serves many films. Must never look at real images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.phantoms.radiograph import Technique
from dicomnode.phantoms.shadows import Box, Plane, Shadow, capsule, ellipsoid
from dicomnode.phantoms.shapes import Floats

Kind = Literal["round", "dense", "hollow", "ill-defined"]

IN_LUNG = 0.8  # of an opacity's pixels lie in the lung fields
BODY = 0.3  # of its longest path: what a reader would outline
DIAMETERS_MM = (8.0, 55.0)
MASS_MM = 30.0  # an opacity as large is a mass (Fleischner Society, Radiology 246, 2008): what a film is called positive for
SEEN = 1.5  # conspicuity from which on an opacity is called seen: at 1.0 the eye hardly finds it, knowing where it is
SPREAD_MM = 4.0  # what is blurred or rough reaches this far beyond the largest radius


@dataclass(frozen=True, kw_only=True)
class Opacity:
    """One opacity: its path lengths in a box of a plane, and which of these pixels a reader would outline."""

    box: Box
    path_cm: Floats  # of water, beyond the lung that it displaces
    body: NDArray[np.bool_]
    diameter_mm: float  # at the detector
    kind: Kind


def scatter_opacities(shadow: Shadow, rng: np.random.Generator) -> tuple[Opacity, ...]:
    """What a film is called positive for: one mass in 45 of 100 films, two in 20, else three to six of like size, all of them seen.

    Raises:
        ValueError: the lungs have no room for one.
    """
    for _ in range(50):
        kind = rng.random()
        count = 1 if kind < 0.45 else 2 if kind < 0.65 else int(rng.integers(3, 7))
        alike: Kind | None = "round" if count >= 3 and rng.random() < 0.8 else None
        if found := _scattered(shadow, rng, count, (rng.uniform(MASS_MM, DIAMETERS_MM[1]), MASS_MM), alike, least=SEEN):
            return found
    raise ValueError("the lung fields hold no opacity that is seen")


def crowd_opacities(shadow: Shadow, rng: np.random.Generator) -> tuple[Opacity, ...]:
    """What a film of training shows: up to ten opacities, mostly several, of any size, seen or not. There is more to learn from it."""
    kind = rng.random()
    count = 1 if kind < 0.2 else int(rng.integers(2, 4)) if kind < 0.4 else int(rng.integers(4, 11))
    smallest, largest = DIAMETERS_MM
    alike: Kind | None = "round" if count >= 3 and rng.random() < 0.8 else None
    return _scattered(shadow, rng, count, (rng.uniform(1.5 * smallest, largest), smallest), alike, least=0.0)


def _scattered(
    shadow: Shadow, rng: np.random.Generator, count: int, diameters_mm: tuple[float, float], alike: Kind | None, *, least: float
) -> tuple[Opacity, ...]:
    """So many opacities at most, around the first diameter and not smaller than the second."""
    typical, smallest = diameters_mm
    found = []
    for _ in range(count):
        diameter = float(np.clip(typical * np.exp(rng.normal(0, 0.3)), smallest, DIAMETERS_MM[1])) if count > 1 else typical
        opacity = opacity_in_lung(shadow, diameter, alike or _any_kind(diameter, rng), rng, least=least)
        if opacity is not None:
            found.append(opacity)
    return tuple(found)


def conspicuity(shadow: Shadow, opacity: Opacity) -> float:
    """How much an opacity absorbs on its outline's mean, to how much that varies in the lung beside it (a standard deviation).

    By a usual beam, whatever a film's technique is: contrast to the complexity of what surrounds it, as H. L. Kundel and G. Revesz put
    it (Am. J. Roentgenol. 126, 1976). `shadow` is without the opacity.
    """
    beside = (shadow.right | shadow.left)[opacity.box] & ~opacity.body
    if not opacity.body.any() or not beside.any():
        return 0.0
    beam = Technique()
    lung = beam.soft_per_cm * shadow.soft_cm[opacity.box] + beam.bone_per_cm * shadow.bone_cm[opacity.box]
    contrast = beam.soft_per_cm * float(opacity.path_cm[opacity.body].mean())
    return contrast / max(float(lung[beside].std()), 1e-6)


def opacity_at(plane: Plane, centre: tuple[float, float], diameter_mm: float, kind: Kind, rng: np.random.Generator) -> Opacity | None:
    """An opacity of about this size around a point (x, z) of the plane; None if it lies outside."""
    stretch = np.exp(rng.normal(0, 0.12 if kind != "ill-defined" else 0.3, 2))
    rx, rz = (float(radius) for radius in diameter_mm / 2 * stretch / np.sqrt(stretch.prod()))
    reach = 1.2 * max(rx, rz) + SPREAD_MM
    box = plane.around((centre[0] - reach, centre[1] - reach), (centre[0] + reach, centre[1] + reach))
    if box is None:
        return None
    part = plane.part(box)
    form = _form(part, centre, (rx, rz), rng, rough=0.3 if kind == "ill-defined" else 0.1)
    depth = diameter_mm * rng.uniform(0.7, 1.1) / 10
    density = rng.uniform(0.7, 0.95)
    if kind == "ill-defined":
        flat = np.asarray(np.clip(2.5 * (1 - form), 0, 1), dtype=np.float32)
        texture = ndimage.gaussian_filter(rng.standard_normal(part.shape, dtype=np.float32), 4.0 / plane.pixel_mm)
        texture /= max(float(texture.std()), 1e-6)
        path = depth * rng.uniform(0.4, 0.8) * ndimage.gaussian_filter(flat, rng.uniform(2, 4) / plane.pixel_mm) * (1 + 0.25 * texture)
    else:
        path = depth * density * np.sqrt(np.maximum(1 - form, 0))
        if kind == "hollow":
            path -= depth * density * rng.uniform(0.5, 0.75) * np.sqrt(np.maximum(1 - form / rng.uniform(0.35, 0.6), 0))
        path = ndimage.gaussian_filter(path, rng.uniform(0.2, 1.6) / plane.pixel_mm)
        if kind == "dense":
            path *= rng.uniform(1.2, 2.0)
    path = np.maximum(path, 0)
    body = ndimage.binary_fill_holes(path > BODY * path.max()) if path.any() else np.zeros(part.shape, dtype=np.bool_)
    return Opacity(box=box, path_cm=np.asarray(path, dtype=np.float32), body=body, diameter_mm=diameter_mm, kind=kind)


def opacity_in_lung(shadow: Shadow, diameter_mm: float, kind: Kind, rng: np.random.Generator, *, least: float = SEEN) -> Opacity | None:
    """An opacity of at least this conspicuity, most of it in the lung fields; None if none of thirty random places holds it."""
    lungs = shadow.right | shadow.left
    places = np.argwhere(lungs)
    for _ in range(30 if len(places) else 0):
        row, column = places[rng.integers(len(places))]
        centre = (float(shadow.plane.x[0, column]), float(shadow.plane.z[row, 0]))
        opacity = opacity_at(shadow.plane, centre, diameter_mm, kind, rng)
        if opacity is None or not opacity.body.any() or lungs[opacity.box][opacity.body].mean() < IN_LUNG:
            continue
        if not least or conspicuity(shadow, opacity) >= least:
            return opacity
    return None


def with_opacities(shadow: Shadow, opacities: tuple[Opacity, ...]) -> Shadow:
    """The shadow of the same chest with these opacities in it."""
    soft = shadow.soft_cm.copy()
    for opacity in opacities:
        soft[opacity.box] += opacity.path_cm
    return replace(shadow, soft_cm=soft)


def with_decoys(shadow: Shadow, rng: np.random.Generator) -> Shadow:
    """The shadow with what looks like an opacity and is none: nipples, ossified cartilage, vessels end on, gas, electrodes, a pacemaker."""
    plane, lungs = shadow.plane, shadow.right | shadow.left
    soft, bone = shadow.soft_cm.copy(), shadow.bone_cm.copy()
    rows, columns = (np.flatnonzero(lungs.any(axis=axis)) for axis in (1, 0))
    top, low, right, left = plane.z[rows[0], 0], plane.z[rows[-1], 0], plane.x[0, columns[0]], plane.x[0, columns[-1]]
    middle, high, half = (right + left) / 2, top - low, (left - right) / 2
    if rng.random() < 0.25:
        z, size = low + high * rng.uniform(0.12, 0.35), rng.uniform(3.5, 6.5)
        for side in (-1.0, 1.0):
            centre = (middle + side * half * rng.uniform(0.55, 0.8), z + rng.normal(0, 6))
            soft += 0.1 * ellipsoid(plane, centre, (size, rng.uniform(3, 8), size * rng.uniform(0.7, 1.2)))
    if rng.random() < 0.5:
        for side in (-1.0, 1.0):
            for number in range(int(rng.integers(1, 4))):
                centre = (middle + side * half * rng.uniform(0.25, 0.45), top - high * (0.16 + 0.13 * number) + rng.normal(0, 6))
                radii = (rng.uniform(4, 10), rng.uniform(1, 4), rng.uniform(2.5, 6))
                bone += 0.1 * rng.uniform(0.2, 0.8) * ellipsoid(plane, centre, radii, turn=float(rng.uniform(0, 3)))
    for _ in range(int(rng.integers(0, 9))):
        side = 1.0 if rng.random() < 0.5 else -1.0
        centre = (middle + side * half * rng.uniform(0.2, 0.5), low + high * rng.uniform(0.35, 0.65))
        size = rng.uniform(1.5, 4.0)
        soft += 0.1 * ellipsoid(plane, centre, (size, size * rng.uniform(1.5, 4), size))
    if rng.random() < 0.4:
        centre = (middle + half * rng.uniform(0.3, 0.7), low + high * rng.uniform(-0.05, 0.06))
        gas = ellipsoid(plane, centre, (rng.uniform(15, 40), rng.uniform(15, 40), rng.uniform(8, 22)), turn=float(rng.normal(0, 0.3)))
        soft -= 0.1 * gas * ~lungs
    if rng.random() < 0.15:
        for _ in range(int(rng.integers(2, 6))):
            _electrode(plane, bone, (middle + half * rng.uniform(-0.9, 0.9), low + high * rng.uniform(0.1, 0.95)), rng)
    if rng.random() < 0.08:
        side = 1.0 if rng.random() < 0.7 else -1.0
        box = (middle + side * half * rng.uniform(0.5, 0.8), top - high * rng.uniform(0.05, 0.25))
        bone += 0.1 * np.minimum(ellipsoid(plane, box, (24, 60, 20)), 25)
        path = [box, (middle + side * 10, top - 20), (middle - 12, low + 0.45 * high), (middle + 25, low + 0.15 * high)]
        for start, end in pairwise(path):
            bone += 0.1 * capsule(plane, start, end, (1.2, 1.2))
    return replace(shadow, soft_cm=np.maximum(soft, 0), bone_cm=np.maximum(bone, 0))


def _electrode(plane: Plane, bone: Floats, centre: tuple[float, float], rng: np.random.Generator) -> None:
    size = rng.uniform(4, 9)
    disc = ellipsoid(plane, centre, (size, 1.0, size)) > 0
    bone += np.float32(rng.uniform(0.05, 0.3)) * disc
    end = (centre[0] + rng.normal(0, 120), centre[1] - rng.uniform(50, 250))
    bone += 0.1 * capsule(plane, centre, end, (0.9, 0.9))


def _any_kind(diameter_mm: float, rng: np.random.Generator) -> Kind:
    kinds: tuple[Kind, ...] = ("round", "dense", "hollow", "ill-defined")
    shares = (0.85, 0.15, 0.0, 0.0) if diameter_mm < 15 else (0.6, 0.08, 0.07, 0.25)
    return kinds[int(rng.choice(4, p=shares))]


def _form(part: Plane, centre: tuple[float, float], radii: tuple[float, float], rng: np.random.Generator, *, rough: float) -> Floats:
    """Below 1 within an ellipse with a wavy border."""
    angle = rng.uniform(0, np.pi)
    dx, dz = part.x - centre[0], part.z - centre[1]
    along, across = dx * np.cos(angle) + dz * np.sin(angle), -dx * np.sin(angle) + dz * np.cos(angle)
    direction = np.arctan2(across, along)
    waves = sum(rng.normal(0, rough / n) * np.cos(n * direction + rng.uniform(0, 6.3)) for n in range(2, 7))
    return np.asarray(((along / radii[0]) ** 2 + (across / radii[1]) ** 2) * np.exp(waves), dtype=np.float32)
