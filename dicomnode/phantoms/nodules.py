"""Synthetic lung nodules: where they are, what they look like, and how they are drawn into a scene.

The truth is the nodule's body: spicules and halos are drawn but don't count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dicomnode.phantoms.shapes import Ellipsoid, Floats, Grid, Tubes, Waves, inside, random_rotation, random_waves

Kind = Literal["solid", "ground-glass", "part-solid", "calcified", "cavitary"]


@dataclass(frozen=True, kw_only=True)
class Nodule:
    """One nodule of known place, size and kind."""

    body: Ellipsoid
    kind: Kind = "solid"
    hu: float = 30.0
    surface: Waves | None = None  # mm added to the distance: a rough surface
    spicules: Tubes | None = None
    halo_mm: float = 0.0  # width of a ground-glass rim

    @property
    def centre_lps_mm(self) -> tuple[float, float, float]:
        """The centre of the body."""
        return self.body.centre

    @property
    def diameter_mm(self) -> float:
        """Diameter of the sphere of the body's volume."""
        return 2 * math.prod(self.body.radii) ** (1 / 3)

    @property
    def volume_ml(self) -> float:
        """Volume of the body, a rough surface not counted."""
        return 4 / 3 * math.pi * math.prod(self.body.radii) / 1000

    def distance(self, grid: Grid) -> Floats:
        """Signed distance to the surface in mm, negative inside."""
        distance = self.body.distance(grid.axes)
        return distance if self.surface is None else distance + self.surface(grid.axes)


def sphere(centre_lps_mm: tuple[float, float, float], diameter_mm: float, *, hu: float = 30.0) -> Nodule:
    """A smooth solid ball, for when the truth must be plain."""
    return Nodule(body=Ellipsoid(centre=centre_lps_mm, radii=(diameter_mm / 2,) * 3), hu=hu)


def random_nodule(rng: np.random.Generator, centre_lps_mm: tuple[float, float, float], diameter_mm: float) -> Nodule:
    """A nodule of about `diameter_mm` with random shape, surface, density and kind."""
    stretch = np.exp(rng.normal(0, 0.16, 3))
    radii = diameter_mm / 2 * stretch / stretch.prod() ** (1 / 3)
    kind: Kind = str(rng.choice(["solid", "ground-glass", "part-solid", "calcified", "cavitary"], p=[0.7, 0.07, 0.1, 0.07, 0.06]))  # type: ignore[assignment]  # numpy gives a plain str
    if diameter_mm < 10 and kind in ("cavitary", "part-solid"):
        kind = "solid"
    roughness = diameter_mm * rng.uniform(0.0, 0.06)
    surface = None
    if rng.random() < 0.8:
        surface = random_waves(rng, count=24, wavelengths_mm=(0.35 * diameter_mm, 1.3 * diameter_mm), deviation=roughness)
    spicules = None
    if rng.random() < 0.3 and diameter_mm > 8:
        spicules = _spicules(rng, np.asarray(centre_lps_mm), diameter_mm / 2)
    hu = rng.uniform(-650, -350) if kind == "ground-glass" else rng.uniform(-20, 90)
    return Nodule(
        body=Ellipsoid(centre=centre_lps_mm, radii=(float(radii[0]), float(radii[1]), float(radii[2])), rotation=random_rotation(rng)),
        kind=kind, hu=float(hu), surface=surface, spicules=spicules,
        halo_mm=float(rng.uniform(1, 4)) if rng.random() < 0.15 else 0.0,
    )  # fmt: skip


def _spicules(rng: np.random.Generator, centre: NDArray[np.float64], radius: float) -> Tubes:
    count = int(rng.integers(5, 22))
    ways = rng.normal(size=(count, 3))
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    reach = radius * rng.uniform(1.15, 1.9, (count, 1))
    return Tubes(
        starts=centre + ways * radius * 0.7,
        ends=centre + ways * reach,
        start_radii=np.minimum(radius * rng.uniform(0.1, 0.25, count), 2.5),
        end_radii=np.full(count, 0.2),
    )


def draw_nodule(hu: Floats, lung_distance: Floats, nodule: Nodule, grid: Grid, edge_mm: float) -> None:
    """Draw `nodule` into `hu` (in place), as far as the lung reaches; wall and nodule merge where they touch."""
    margin = 3 * edge_mm + nodule.halo_mm + (nodule.diameter_mm * (0.5 if nodule.spicules is not None else 0.2))
    box = grid.box(*nodule.body.bounds(margin))
    if box is None:
        return
    near = grid.part(box)
    target = hu[box]
    distance = nodule.distance(near)
    room = inside(lung_distance[box] - 1.0, edge_mm)
    if nodule.halo_mm:
        halo = room * np.clip(1 - distance / nodule.halo_mm, 0, 1)
        target += halo * np.maximum(-620 - target, 0)
    if nodule.spicules is not None:
        target += room * nodule.spicules.coverage(near, edge_mm) * np.maximum(nodule.hu - 60 - target, 0)
    fill = room * inside(distance, edge_mm)
    if nodule.kind == "ground-glass":
        target += fill * np.maximum(nodule.hu - target, 0)
        return
    if nodule.kind == "part-solid":
        target += fill * np.maximum(-500 - target, 0)
        core = room * inside(distance + nodule.diameter_mm * 0.22, edge_mm)
        target += core * (nodule.hu - target)
        return
    target += fill * (nodule.hu - target)
    if nodule.kind == "cavitary":
        target += inside(distance + nodule.diameter_mm * 0.2, edge_mm) * (-880 - target)
    if nodule.kind == "calcified":
        target += inside(distance + nodule.diameter_mm * 0.25, edge_mm) * (450 - target)
