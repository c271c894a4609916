"""A frontal chest radiograph of a synthetic chest: Hounsfield units to path lengths along a diverging beam, and those to a film.

Sources: attenuation is exponential in path length (Beer and Lambert); scatter is a wide blur of the primary image, as in
J. A. Seibert and J. M. Boone, J. Nucl. Med. Technol. 33, 2005. Must never look at real images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.phantoms.chest import ChestScene, render
from dicomnode.phantoms.ribs import draw_ribs
from dicomnode.phantoms.shadows import Plane, Shadow, capsule, ellipsoid, no_lungs, tubular_bone
from dicomnode.phantoms.shapes import Floats, Grid

BONE_HU, DENSE_BONE_HU = 100.0, 600.0  # denser than the first counts as bone; the second is dense bone
STEP_MM = (3.0, 5.0, 3.0)  # of the rendering that is projected where nothing else is said: slice, row, column
ABOVE_MM, BEAM_HEIGHT = 100.0, 0.55  # what is rendered above the apices; where the beam is aimed at, of the height up to there
SOFT_EDGE_MM = 2.5  # of arms, breasts and gas in the bowel
VISIBLE_LUNG_MM = 12.0  # a shorter way through lung is not seen as lung


@dataclass(frozen=True, kw_only=True)
class View:
    """How a chest stands before the detector."""

    source_mm: float = 1800.0  # from source to detector
    from_behind: bool = True  # PA: the detector is in front of the chest; else AP
    turn_degrees: float = 0.0  # around the body's axis
    tilt_degrees: float = 0.0  # lordotic: leaning back


@dataclass(frozen=True, kw_only=True)
class Technique:
    """How path lengths become a film."""

    soft_per_cm: float = 0.19
    bone_per_cm: float = 0.45
    scatter: float = 0.5  # of the primary signal's mean
    photons: float = 20000.0  # a pixel, unattenuated
    blur_px: float = 0.5
    gamma: float = 1.0
    black_percent: float = 0.5  # of the film is black, and of it is white
    white_percent: float = 0.5
    enhancement: float = 0.0  # how much of what is finer than a fifth of the film is added once more


def random_view(rng: np.random.Generator) -> View:
    """A view drawn from what is usual."""
    return View(
        source_mm=float(rng.uniform(1000, 2000)), from_behind=bool(rng.random() < 0.7), turn_degrees=float(rng.normal(0, 4)),
        tilt_degrees=float(rng.normal(0, 5)),
    )  # fmt: skip


def random_technique(rng: np.random.Generator) -> Technique:
    """A technique drawn from what is usual."""
    return Technique(
        soft_per_cm=float(rng.uniform(0.14, 0.24)), bone_per_cm=float(rng.uniform(0.2, 1.3)), scatter=float(rng.uniform(0.05, 1.2)),
        photons=float(np.exp(rng.uniform(np.log(2000), np.log(300000)))), blur_px=float(rng.uniform(0.2, 1.0)),
        gamma=float(np.exp(rng.normal(0, 0.35))), black_percent=float(rng.uniform(0.5, 12)), white_percent=float(rng.uniform(0.5, 12)),
        enhancement=float(rng.uniform(0, 1.5) if rng.random() < 0.5 else 0.0),
    )  # fmt: skip


def digital_technique(rng: np.random.Generator) -> Technique:
    """A technique of today's detectors: less noise, a grid against scatter, and the grey scale spent on the lungs."""
    return Technique(
        soft_per_cm=float(rng.uniform(0.15, 0.22)), bone_per_cm=float(rng.uniform(0.2, 0.9)), scatter=float(rng.uniform(0.15, 0.9)),
        photons=float(np.exp(rng.uniform(np.log(8000), np.log(300000)))), blur_px=float(rng.uniform(0.2, 0.9)),
        gamma=float(np.exp(rng.normal(0, 0.3))), black_percent=float(rng.uniform(0.1, 4)), white_percent=float(rng.uniform(1, 22)),
        enhancement=float(rng.uniform(0, 1.5) if rng.random() < 0.6 else 0.0),
    )  # fmt: skip


def project(
    scene: ChestScene,
    view: View,
    *,
    seed: int = 0,
    pixel_mm: float = 2.0,
    step_mm: tuple[float, float, float] = STEP_MM,
    bare: bool = False,
) -> Shadow:
    """Project a chest onto the detector: path lengths and the true lung fields.

    The rendering is moved row by row (a row is a coronal plane): what lies farther from the detector is magnified and, if the
    body is turned or tilted, shifted. Shoulders, arms, breasts and gas in the bowel are drawn from `seed`. Cost: about a second.
    A `bare` chest is without ribs, girdle, arms, breasts and gas in the bowel: `dressed` adds them, ever different ones.
    """
    anatomy = scene.anatomy
    rng = np.random.default_rng([scene.seed, seed, 31])
    half_width, half_depth = (1.3 * anatomy.body_radii[0], anatomy.body_radii[1])
    low, high = anatomy.bottom_z - 60, anatomy.apex_z + ABOVE_MM
    dz, dy, dx = step_mm
    grid = Grid(
        origin_lps_mm=(-half_width, -half_depth, low), spacing_mm=step_mm,
        shape=(int((high - low) / dz), int(2 * half_depth / dy) + 1, int(2 * half_width / dx) + 1),
    )  # fmt: skip
    rendering = render(scene, grid, ribs=not bare)
    hu = _with_a_neck(rendering.hu, scene, grid, rng)
    silhouettes = _silhouettes(scene, grid)
    wide = 1.25 * half_width
    plane = Plane(
        left_mm=-wide, top_mm=high * 1.15, pixel_mm=pixel_mm, shape=(int((high * 1.15 - low * 1.1) / pixel_mm), int(2 * wide / pixel_mm))
    )
    bone = np.clip((hu - BONE_HU) / (DENSE_BONE_HU - BONE_HU), 0, None)
    layers = (np.clip(1 + hu / 1000, 0, 1.05), bone, (rendering.lung_distance < 0).astype(np.float32))
    sums = [np.zeros(plane.shape, dtype=np.float32) for _ in layers]
    hidden = np.zeros(plane.shape, dtype=np.float32)
    for row, y in enumerate(grid.axes[1].ravel().tolist()):
        place = _Placing(view=view, grid=grid, plane=plane, depth_mm=half_depth, y=y)
        for number, layer in enumerate(layers):
            if layer[:, row].any():
                sums[number] += dy * place(layer[:, row])
        if silhouettes[:, row].any():
            np.maximum(hidden, place(silhouettes[:, row]), out=hidden)
    soft, bony, lung = sums
    if not bare:
        soft += _outside_the_rendering(scene, plane, rng)
        bony += _girdle(scene, plane, rng)
    field = (lung > VISIBLE_LUNG_MM) & (hidden < 0.5)
    labels, _ = ndimage.label(ndimage.binary_opening(field, iterations=max(1, round(4 / pixel_mm))))
    sizes = np.bincount(labels.ravel())
    kept = np.isin(labels, [number for number in range(1, len(sizes)) if sizes[number] * pixel_mm**2 > 1500.0])
    on_the_right = np.broadcast_to(plane.x < half_depth * np.tan(np.deg2rad(view.turn_degrees)) * 0.3, plane.shape)
    soft_cm, bone_cm = soft / np.float32(10), bony / np.float32(10)
    return Shadow(plane=plane, soft_cm=soft_cm, bone_cm=bone_cm, right=kept & on_the_right, left=kept & ~on_the_right)


def dressed(shadow: Shadow, scene: ChestScene, view: View, rng: np.random.Generator) -> Shadow:
    """A bare chest's shadow with ribs, girdle, arms, breasts and gas in the bowel drawn from `rng`. Cost: a tenth of a second."""
    plane, half_depth = shadow.plane, scene.anatomy.body_radii[1]
    beam_z = BEAM_HEIGHT * (scene.anatomy.apex_z + ABOVE_MM)
    lean, turn = np.tan(np.deg2rad(view.tilt_degrees)), np.tan(np.deg2rad(view.turn_degrees))

    def onto(points: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y, z = points.T
        larger = _larger(view, half_depth, y)
        return np.stack([(x + turn * y) * larger, beam_z + (z + lean * y - beam_z) * larger], axis=1)

    around = ndimage.gaussian_filter(_outside_the_rendering(scene, plane, rng), SOFT_EDGE_MM / plane.pixel_mm)
    soft = np.maximum(shadow.soft_cm + around / np.float32(10), 0)
    bone = shadow.bone_cm + (_girdle(scene, plane, rng) + draw_ribs(plane, scene.anatomy, onto, rng)) / np.float32(10)
    return replace(shadow, soft_cm=soft, bone_cm=bone)


def project_sideways(scene: ChestScene) -> Shadow:
    """The lateral film of a chest, which is no frontal one: its masks are empty. Parallel beam, front to the film's left."""
    anatomy = scene.anatomy
    half_width, half_depth = anatomy.body_radii
    low, high = anatomy.bottom_z - 50, anatomy.apex_z + 30
    grid = Grid(
        origin_lps_mm=(-half_width, -half_depth - 20, low), spacing_mm=(3.0, 3.0, 8.0),
        shape=(int((high - low) / 3), int((2 * half_depth + 40) / 3), int(2 * half_width / 8)),
    )  # fmt: skip
    hu = render(scene, grid).hu[::-1]
    soft = np.clip(1 + hu / 1000, 0, 1.05).sum(axis=2) * 8.0
    bone = np.clip((hu - BONE_HU) / (DENSE_BONE_HU - BONE_HU), 0, None).sum(axis=2) * 8.0
    return no_lungs(Plane(left_mm=-half_depth - 20, top_mm=high, pixel_mm=3.0, shape=(soft.shape[0], soft.shape[1])), soft, bone)


@dataclass(frozen=True, kw_only=True)
class _Placing:
    """Where a coronal plane of a rendering falls on the detector."""

    view: View
    grid: Grid
    plane: Plane
    depth_mm: float
    y: float

    def __call__(self, layer: Floats) -> Floats:
        larger = float(_larger(self.view, self.depth_mm, np.array(self.y)))
        across, up = self.y * np.tan(np.deg2rad(self.view.turn_degrees)), self.y * np.tan(np.deg2rad(self.view.tilt_degrees))
        beam_z = BEAM_HEIGHT * float(self.grid.axes[0].max())
        step = self.plane.pixel_mm / larger
        x0, _, z0 = self.grid.origin_lps_mm
        first_z = beam_z + (self.plane.top_mm - beam_z) / larger - up
        first_x = self.plane.left_mm / larger - across
        return np.asarray(
            ndimage.affine_transform(
                layer, np.array([-step / self.grid.spacing_mm[0], step / self.grid.spacing_mm[2]]),
                offset=((first_z - z0) / self.grid.spacing_mm[0], (first_x - x0) / self.grid.spacing_mm[2]),
                output_shape=self.plane.shape, order=1, mode="constant", cval=0.0,
            ),
            dtype=np.float32,
        )  # fmt: skip


def _larger(view: View, half_depth_mm: float, y: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much larger what lies at `y` (towards the back) is seen on the detector."""
    distance = half_depth_mm + y if view.from_behind else half_depth_mm - y
    return view.source_mm / (view.source_mm - distance - 30.0)


def _with_a_neck(hu: Floats, scene: ChestScene, grid: Grid, rng: np.random.Generator) -> Floats:
    """Cut shoulders and a neck out of the cylinder that the body of a rendering is; take the table away."""
    z, y, x = grid.axes
    apex = scene.anatomy.apex_z
    neck, slope = rng.uniform(52, 68), rng.uniform(0.25, 0.75)
    outside = (np.abs(x) > neck) & (z > apex + rng.uniform(15, 40) - slope * (np.abs(x) - neck))
    outside = outside | ((np.hypot(x, 0.9 * y) > neck + 12) & (z > apex + rng.uniform(30, 60)))
    outside = outside | (y > scene.anatomy.body_radii[1] + 5)
    return np.where(outside, np.float32(-1000), hu)


def _silhouettes(scene: ChestScene, grid: Grid) -> Floats:
    """Where heart, mediastinum, spine and what lies below the diaphragm hide lung in a frontal view: 1, elsewhere 0."""
    anatomy, axes = scene.anatomy, grid.axes
    middle = np.full(grid.shape, 50.0, dtype=np.float32)
    for part in anatomy.mediastinum[:6]:  # not the hila: readers count them as lung field
        np.minimum(middle, part.distance(axes), out=middle)
    domes = np.minimum(anatomy.domes[0].distance(axes), anatomy.domes[1].distance(axes))
    within = anatomy.cage.distance(axes) < 0
    return np.asarray(within & ((middle + anatomy.borders[1](axes) < 0) | (domes + anatomy.borders[2](axes) < 0)), dtype=np.float32)


def _outside_the_rendering(scene: ChestScene, plane: Plane, rng: np.random.Generator) -> Floats:
    """Water path lengths of arms, breasts and chin, less the gas in the bowel, mm."""
    anatomy = scene.anatomy
    width, apex = anatomy.body_radii[0], anatomy.apex_z
    total = np.zeros(plane.shape, dtype=np.float32)
    breast = rng.uniform(0, 70) if rng.random() < 0.5 else 0.0
    for side in (-1.0, 1.0):
        shoulder, thick = (side * width * rng.uniform(1.05, 1.25), apex - rng.uniform(0, 40)), rng.uniform(38, 60)
        hand = (shoulder[0] + side * rng.uniform(0, 260), shoulder[1] - rng.uniform(150, 400))
        if rng.random() < 0.8:
            total += capsule(plane, shoulder, hand, (thick, 0.8 * thick))
        if breast:
            centre = (side * width * rng.uniform(0.4, 0.6), anatomy.apex_z * rng.uniform(0.1, 0.4))
            total += 0.5 * ellipsoid(plane, centre, (rng.uniform(50, 85), breast, rng.uniform(50, 90)))
    for _ in range(int(rng.integers(0, 9)) if rng.random() < 0.6 else 0):
        centre = (rng.uniform(-width, width) * 0.8, anatomy.bottom_z - rng.uniform(-20, 80))
        radii = rng.uniform(8, 30, 3)
        gas = ellipsoid(plane, centre, (float(radii[0]), float(radii[1]), float(radii[2])), turn=float(rng.uniform(0, 3)))
        total -= gas * (plane.z < anatomy.bottom_z + 10)
    if rng.random() < 0.3:
        total += ellipsoid(plane, (rng.uniform(-20, 20), apex + rng.uniform(70, 130)), (60, 60, 45))
    return total


def _girdle(scene: ChestScene, plane: Plane, rng: np.random.Generator) -> Floats:
    """Dense bone of clavicles, shoulder blades and upper arms, mm."""
    anatomy = scene.anatomy
    width, apex = anatomy.body_radii[0], anatomy.apex_z
    total = np.zeros(plane.shape, dtype=np.float32)
    rise, depth = rng.uniform(-30, 40), rng.uniform(0, 30)
    blade = rng.uniform(0.55, 1.0)
    for side in (-1.0, 1.0):
        inner, middle = (side * 16.0, apex - depth), (side * width * 0.5, apex - depth + 0.7 * rise + rng.normal(0, 3))
        outer = (side * width * 0.98, apex - depth + rise)
        total += 0.6 * tubular_bone(plane, inner, middle, (9.0, 6.0)) + 0.6 * tubular_bone(plane, middle, outer, (6.0, 7.0))
        head = (side * width * 1.12, apex - depth + rise - 20)
        total += 0.4 * ellipsoid(plane, head, (22, 22, 22))
        total += tubular_bone(plane, head, (head[0] + side * rng.uniform(-10, 120), head[1] - 260), (13.0, 11.0))
        spine = (side * width * blade, apex - depth - 10)
        tip = (side * width * (blade - rng.uniform(-0.1, 0.2)), apex - rng.uniform(110, 150))
        total += 0.35 * capsule(plane, spine, tip, (4.0, 3.0)) + 0.2 * capsule(plane, head, tip, (4.5, 3.0))
        total += 0.04 * capsule(plane, (side * width * (blade + 0.12), apex - 30), tip, (38.0, 14.0))
    return total


def expose(shadow: Shadow, technique: Technique, rng: np.random.Generator) -> Floats:
    """Make a film of path lengths: float32 (rows, columns), 0 where nothing absorbed and 1 where most did, bone bright."""
    primary = np.exp(-technique.soft_per_cm * shadow.soft_cm - technique.bone_per_cm * shadow.bone_cm)
    broad = 60.0 / shadow.plane.pixel_mm
    mean = float(primary.mean())
    scattered = ndimage.gaussian_filter(primary, broad, mode="nearest", truncate=2.0) * technique.scatter * min(1.0, 0.15 / max(mean, 1e-3))
    counts = ndimage.gaussian_filter(primary, technique.blur_px) + scattered
    noisy = counts + np.sqrt(np.maximum(counts, 0) / technique.photons) * rng.standard_normal(counts.shape, dtype=np.float32)
    density = -np.log(np.maximum(noisy, 1e-4))
    if technique.enhancement > 0:
        density = density + technique.enhancement * (density - ndimage.gaussian_filter(density, shadow.plane.shape[0] / 25))
    low, high = np.percentile(density, (technique.black_percent, 100 - technique.white_percent))
    return np.asarray(np.clip((density - low) / max(high - low, 1e-3), 0, 1) ** technique.gamma, dtype=np.float32)
