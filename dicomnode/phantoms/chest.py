"""A synthetic chest CT: a scene with known truth, and its rendering in Hounsfield units in any box at any spacing.

Must never look at real images: everything comes from a seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dicomnode.phantoms.anatomy import Anatomy, points_in_lung, random_anatomy
from dicomnode.phantoms.nodules import Nodule, draw_nodule, random_nodule
from dicomnode.phantoms.shapes import Axes, Ellipsoid, Floats, Grid, inside

AIR = -1000.0
FAR_MM = 50.0  # stands for any larger distance from the lungs
LUNG_MARGIN_MM = 12.0  # lung distances are exact this far outside the cage
EDGE_MM = 0.75  # half the width of an organ's border: the resolution of the scanner


@dataclass(frozen=True, kw_only=True)
class ChestScene:
    """A chest and its nodules."""

    seed: int
    anatomy: Anatomy
    nodules: tuple[Nodule, ...]

    def with_nodules(self, nodules: tuple[Nodule, ...]) -> ChestScene:
        """The same chest with other nodules."""
        return replace(self, nodules=nodules)


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A box of a scene without noise."""

    grid: Grid
    hu: Floats  # (slices, rows, columns)
    lung_distance: Floats  # mm, negative inside the lungs


def chest_scene(seed: int, *, nodules: tuple[Nodule, ...] = ()) -> ChestScene:
    """Draw a chest from `seed`; the same seed gives the same chest for ever within a version."""
    return ChestScene(seed=seed, anatomy=random_anatomy(np.random.default_rng([seed, 1])), nodules=nodules)


def scatter_nodules(scene: ChestScene, rng: np.random.Generator, diameters_mm: NDArray[np.float64]) -> ChestScene:
    """The scene with random nodules of these sizes: a quarter at the pleura, a quarter on vessels, the others anywhere; none touch."""
    placed: list[Nodule] = []
    tubes = scene.anatomy.vessels
    joints = tubes.ends[(tubes.end_radii > 0.6) & (tubes.end_radii < 3.0)]
    for diameter in diameters_mm:
        radius = float(diameter) / 2
        for _ in range(20):
            kind = rng.random()
            if kind < 0.25:
                point = points_in_lung(scene.anatomy, rng, count=1, depth_mm=(0.2 * radius, 0.9 * radius + 0.5))[0]
            elif kind < 0.5 and len(joints):
                point = joints[rng.integers(len(joints))] + rng.normal(0, 0.3 * radius, 3)
            else:
                point = points_in_lung(scene.anatomy, rng, count=1, depth_mm=(min(radius, 12.0), np.inf))[0]
            clear = all(np.linalg.norm(np.subtract(point, other.centre_lps_mm)) > radius + other.diameter_mm / 2 + 6 for other in placed)
            x, y, z = (np.array([v], dtype=np.float32) for v in point)
            if clear and float(scene.anatomy.lung_distance((z, y, x))[0]) < -0.15 * radius:
                placed.append(random_nodule(rng, (float(point[0]), float(point[1]), float(point[2])), float(diameter)))
                break
    return scene.with_nodules(tuple(placed))


def true_mask(scene: ChestScene, nodule: Nodule, grid: Grid) -> tuple[NDArray[np.bool_], tuple[slice, slice, slice]] | None:
    """The voxels whose centre lies in the nodule's body and in the lung: a mask and its box in `grid`; None outside the grid."""
    box = grid.box(*nodule.body.bounds(0.3 * nodule.diameter_mm))
    if box is None:
        return None
    near = grid.part(box)
    return (nodule.distance(near) < 0) & (scene.anatomy.lung_distance(near.axes) < 1.0), box


def render(scene: ChestScene, grid: Grid, *, ribs: bool = True) -> Rendering:
    """Render a box of the scene, noiseless, in HU, with or without ribs. Outside the body only the table is drawn."""
    anatomy = scene.anatomy
    hu = np.full(grid.shape, AIR, dtype=np.float32)
    lung_distance = np.full(grid.shape, FAR_MM, dtype=np.float32)
    _draw_table(hu, anatomy, grid)
    reach_x, reach_y = anatomy.body_radii
    body = grid.box((-1.3 * reach_x - 3, -reach_y - 3, -np.inf), (1.3 * reach_x + 3, reach_y + 3, np.inf))
    if body is None:
        return Rendering(grid=grid, hu=hu, lung_distance=lung_distance)
    inner = grid.part(body)
    hu[body] = _outside_lungs(anatomy, inner, hu[body], ribs=ribs)
    cage = grid.box(
        (-anatomy.cage.radii[0] - LUNG_MARGIN_MM, -anatomy.cage.radii[1] - LUNG_MARGIN_MM, -np.inf),
        (anatomy.cage.radii[0] + LUNG_MARGIN_MM, anatomy.cage.radii[1] + LUNG_MARGIN_MM, np.inf),
    )
    lung = None
    if cage is not None:
        lung_distance[cage] = anatomy.lung_distance(grid.part(cage).axes)
        lung = inside(lung_distance[cage], EDGE_MM)
        if lung.any():
            hu[cage] += lung * (_parenchyma(anatomy, grid.part(cage)) - hu[cage])
    hu[body] += anatomy.great_vessels.coverage(inner, EDGE_MM) * (anatomy.densities.blood - hu[body])
    if cage is not None and lung is not None:
        _draw_chest_contents(hu[cage], lung_distance[cage], lung, scene, grid.part(cage))
    return Rendering(grid=grid, hu=hu, lung_distance=lung_distance)


def _draw_chest_contents(hu: Floats, lung_distance: Floats, lung: Floats, scene: ChestScene, grid: Grid) -> None:
    _draw_trees(hu, scene.anatomy, grid)
    if lung.any():
        for band in scene.anatomy.bands:
            _draw_ellipsoid(hu, band, grid, value=-50.0, limit=lung)
        for nodule in scene.nodules:
            draw_nodule(hu, lung_distance, nodule, grid, EDGE_MM)


def _draw_table(hu: Floats, anatomy: Anatomy, grid: Grid) -> None:
    back = anatomy.body_radii[1] + 12
    box = grid.box((-np.inf, back - 40, -np.inf), (np.inf, back + 10, np.inf))
    if box is None:
        return
    _, y, x = grid.part(box).axes
    table = np.maximum(np.abs(y - (back - 0.0006 * x * x)) - 2.5, np.abs(x) - 210)
    hu[box] += inside(table, EDGE_MM) * (-350 - AIR)


def _outside_lungs(anatomy: Anatomy, grid: Grid, surroundings: Floats, *, ribs: bool) -> Floats:
    """The body but for what fills the cage's lungs: wall, ribs, mediastinum, abdomen, spine; around it the `surroundings`."""
    z, y, x = axes = grid.axes
    d = anatomy.densities
    tissue = anatomy.tissue(axes)
    cage = anatomy.cage.distance(axes)
    soft = d.soft + 6 * tissue
    fat = d.fat + 8 * tissue
    # the wall: muscle near the ribs, then fat with layers of muscle
    outward = cage - anatomy.muscle_mm
    muscle = np.clip(0.4 - outward / 5 + 0.8 * tissue, 0, 1)
    hu = fat + muscle * (soft - fat)
    if ribs:
        _draw_ribs(hu, anatomy, axes, cage, tissue)
    # inside the cage: mediastinal fat and soft tissue, heart, abdomen
    within = inside(cage, EDGE_MM)
    mixed = fat + np.clip(0.75 + 0.8 * tissue, 0, 1) * (soft - fat)
    hu += within * (mixed - hu)
    _draw_inner_organs(hu, anatomy, grid, tissue, within)
    middle = grid.box((-42, -np.inf, -np.inf), (42, np.inf, np.inf))
    if middle is not None:
        _draw_spine(hu[middle], anatomy, grid.part(middle).axes, tissue[middle])
    # the body's surface, wider at the shoulders
    shoulders = 1 + 0.3 * np.clip((z - anatomy.apex_z + 70) / 70, 0, 1)
    skin = Ellipsoid(centre=(0, 0, 0), radii=(*anatomy.body_radii, np.inf)).distance((z, y, (x / shoulders).astype(np.float32)))
    hu += inside(-skin, EDGE_MM) * (surroundings - hu)
    return np.asarray(hu, dtype=np.float32)


def _draw_ribs(hu: Floats, anatomy: Anatomy, axes: Axes, cage: Floats, tissue: Floats) -> None:
    """Tilted bands that follow the cage."""
    z, y, x = axes
    d = anatomy.densities
    along = np.mod(z + anatomy.rib_slope * y + 0.12 * np.abs(x), anatomy.rib_pitch_mm) - anatomy.rib_pitch_mm / 2
    rib = (np.sqrt(((cage - 5.0) / 3.6) ** 2 + (along / 6.3) ** 2) - 1) * 3.6
    cartilage = np.clip((-y - 0.55 * anatomy.cage.radii[1]) / 10, 0, 1) * np.ones_like(rib)
    hu += inside(rib, EDGE_MM) * (1 - 0.65 * cartilage) * (d.cortex - hu)
    hu += inside(rib + 1.6, EDGE_MM) * (d.marrow + 30 * tissue - 120 * cartilage - hu)


def _draw_inner_organs(hu: Floats, anatomy: Anatomy, grid: Grid, tissue: Floats, within: Floats) -> None:
    d = anatomy.densities
    box = grid.box(*anatomy.heart.bounds(2.0))
    if box is not None:
        heart = anatomy.heart.distance(grid.part(box).axes)
        hu[box] += inside(heart + 3.0, 2.0) * (d.blood + 5 * tissue[box] - hu[box])
    box = grid.box((-np.inf, -np.inf, -np.inf), (np.inf, np.inf, 15.0))
    if box is None:
        return
    axes = grid.part(box).axes
    below = np.minimum(anatomy.domes[0].distance(axes), anatomy.domes[1].distance(axes)) + anatomy.borders[2](axes)
    hu[box] += within[box] * inside(below + 2.0, EDGE_MM) * (d.liver + 5 * tissue[box] - hu[box])
    if anatomy.stomach is not None:
        _draw_ellipsoid(hu, anatomy.stomach, grid, value=-970.0, darker=True)


def _draw_spine(hu: Floats, anatomy: Anatomy, axes: Axes, tissue: Floats) -> None:
    z, y, x = axes
    d = anatomy.densities
    disc = np.abs(np.mod(z, 24.0) - 12.0) - 9.5  # positive in the discs
    vertebra = np.sqrt((x / 17) ** 2 + ((y - anatomy.spine_y) / 14) ** 2)
    body = ((vertebra - 1) * 14).astype(np.float32)
    hu += inside(body, EDGE_MM) * (80 - hu)
    bone = np.maximum(body, disc)
    hu += inside(bone, EDGE_MM) * (d.cortex - hu)
    hu += inside(bone + 1.8, EDGE_MM) * (d.marrow + 30 * tissue - hu)
    arch_y = anatomy.spine_y + 24
    arch = np.sqrt((x / 16) ** 2 + ((y - arch_y) / 13) ** 2)
    ring = (np.abs(arch - 0.8) * 13 - 3).astype(np.float32)
    process = np.maximum(np.abs(x) - 3.0, np.abs(y - arch_y - 20) - 12)
    across = np.maximum(np.abs(y - arch_y - 2) - 4.0, np.abs(x) - 32)
    back = np.maximum(np.minimum(np.minimum(ring, process), across), disc - 2)
    hu += inside(back.astype(np.float32), EDGE_MM) * (d.cortex * 0.7 - hu)
    canal = ((np.sqrt((x / 9) ** 2 + ((y - arch_y + 5) / 7) ** 2) - 1) * 7).astype(np.float32)
    hu += inside(canal, EDGE_MM) * (25 - hu)
    sternum = np.maximum(np.abs(x) - 19, np.abs(y + anatomy.cage.radii[1] + 5) - 5)
    sternum = np.maximum(sternum, 10 - z) * np.ones_like(hu)
    hu += inside(sternum, EDGE_MM) * (d.cortex * 0.8 - hu)
    hu += inside(sternum + 1.8, EDGE_MM) * (d.marrow - hu)


def _parenchyma(anatomy: Anatomy, grid: Grid) -> Floats:
    z, y, x = axes = grid.axes
    d = anatomy.densities
    coarse = anatomy.coarse(axes)
    hu = d.lung + d.lung_gradient * y + coarse + anatomy.fine(axes)
    if anatomy.holes is not None:
        hu += np.clip((anatomy.holes(axes) - 1.0) * 3, 0, 1) * (-975 - hu)
    right_oblique, left_oblique, horizontal = anatomy.fissures
    ripple = 0.09 * coarse
    for (start, by_y, by_x), side in ((right_oblique, x < 0), (left_oblique, x >= 0), (horizontal, (x < 0) & (y < 10))):
        distance = (z - start - by_y * y - by_x * np.abs(x) + ripple) / np.sqrt(1 + by_y**2 + by_x**2)
        hu += side * np.clip(1 - np.abs(distance) / 1.2, 0, 1) * (-700 - hu) * 0.55
    for haze in anatomy.hazes:
        _draw_ellipsoid(hu, haze, grid, value=-560.0, edge_mm=6.0)
    return np.asarray(np.maximum(hu, -1000), dtype=np.float32)


def _draw_ellipsoid(
    hu: Floats, body: Ellipsoid, grid: Grid, *, value: float, limit: Floats | None = None, darker: bool = False, edge_mm: float = EDGE_MM
) -> None:
    """Blend `value` in where it is brighter than what is there, or with `darker` everywhere."""
    box = grid.box(*body.bounds(2 * edge_mm))
    if box is None:
        return
    fill = inside(body.distance(grid.part(box).axes), edge_mm)
    if limit is not None:
        fill *= limit[box]
    change = value - hu[box]
    hu[box] += fill * (change if darker else np.maximum(change, 0))


def _draw_trees(hu: Floats, anatomy: Anatomy, grid: Grid) -> None:
    d = anatomy.densities
    hu += anatomy.vessels.coverage(grid, EDGE_MM) * np.maximum(min(d.blood, 220) - hu, 0)
    walls = anatomy.airways.coverage(grid, EDGE_MM, widen_mm=1.0)
    hu += walls * np.maximum(-20 - hu, 0)
    hu += anatomy.airways.coverage(grid, EDGE_MM) * (-960 - hu)
