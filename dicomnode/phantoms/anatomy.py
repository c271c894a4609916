"""The anatomy of a synthetic chest: organs as ellipsoids with wavy surfaces, vessel and airway trees, tissue textures.

Origin: the middle of the chest at the top of the right diaphragm dome; LPS mm. Proportions are an adult's, drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dicomnode.phantoms.shapes import Axes, Ellipsoid, Floats, Tubes, Waves, join, random_rotation, random_waves
from dicomnode.phantoms.trees import chain, grow_tree, together

INFINITE = float("inf")


@dataclass(frozen=True, kw_only=True)
class Densities:
    """CT numbers of the tissues, HU."""

    lung: float
    lung_gradient: float  # HU per mm towards the back (supine)
    soft: float
    fat: float
    blood: float
    liver: float
    marrow: float
    cortex: float


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Everything of a chest but its nodules."""

    densities: Densities
    cage: Ellipsoid  # outer border of both lungs
    mediastinum: tuple[Ellipsoid, ...]
    domes: tuple[Ellipsoid, ...]
    heart: Ellipsoid
    spine_y: float
    apex_z: float
    bottom_z: float
    wall_mm: tuple[float, float]  # body wall outside the cage: at the sides, in front and behind
    muscle_mm: float
    rib_pitch_mm: float
    rib_slope: float
    stomach: Ellipsoid | None
    borders: tuple[Waves, Waves, Waves]  # mm, of cage, mediastinum, domes
    tissue: Waves  # deviation 1: muscle against fat
    coarse: Waves  # HU, lung
    fine: Waves  # HU, lung
    holes: Waves | None  # deviation 1: emphysema above 1
    fissures: tuple[tuple[float, float, float], ...]  # z = a + b y + c |x|, right oblique, left oblique, right horizontal
    vessels: Tubes
    airways: Tubes
    great_vessels: Tubes
    hazes: tuple[Ellipsoid, ...]  # ground glass, never a nodule
    bands: tuple[Ellipsoid, ...]  # scars, plate atelectasis, pleural plaques

    @property
    def body_radii(self) -> tuple[float, float]:
        """Half of the body's width and depth below the shoulders, mm."""
        return self.cage.radii[0] + self.wall_mm[0], self.cage.radii[1] + self.wall_mm[1]

    def lung_distance(self, axes: Axes, *, wavy: bool = True) -> Floats:
        """Signed distance to the surface of the lungs in mm, negative inside: of vessels and nodules it knows nothing."""
        cage = self.cage.distance(axes)
        middle = self.mediastinum[0].distance(axes)
        for part in self.mediastinum[1:]:
            middle = join(middle, part.distance(axes), 8.0)
        domes = np.minimum(self.domes[0].distance(axes), self.domes[1].distance(axes))
        if wavy:
            cage = cage + self.borders[0](axes)
            middle = middle + self.borders[1](axes)
            domes = domes + self.borders[2](axes)
        distance = np.maximum(np.maximum(cage, -middle), np.maximum(-domes, self.bottom_z - axes[0]))
        return np.asarray(distance, dtype=np.float32)


def random_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a chest. Cost: about 0.1 s, most of it the trees."""
    half_width, half_depth = rng.uniform(112, 150), rng.uniform(80, 112)
    apex_z, top = rng.uniform(165, 245), rng.uniform(85, 145)
    cage = Ellipsoid(centre=(0, 0, apex_z - top), radii=(half_width, half_depth, top), dome=True)
    spine_y = half_depth * rng.uniform(0.42, 0.6)
    tilt = _tilt(rng, 0.35)
    heart = Ellipsoid(
        centre=(rng.uniform(14, 32), -half_depth * rng.uniform(0.15, 0.35), rng.uniform(25, 50)),
        radii=(rng.uniform(52, 70), rng.uniform(42, 54), rng.uniform(42, 58)), rotation=tilt,
    )  # fmt: skip
    hilum_z = apex_z * rng.uniform(0.42, 0.52)
    hila = [np.array([side * rng.uniform(36, 46), rng.uniform(2, 16), hilum_z + rng.uniform(-8, 8)]) for side in (-1, 1)]
    mediastinum = (
        Ellipsoid(centre=(rng.uniform(-4, 6), 0, 0), radii=(rng.uniform(24, 38), half_depth * 0.72, INFINITE)),
        Ellipsoid(centre=(0, -half_depth * 0.85, 0), radii=(rng.uniform(8, 24), 30, INFINITE)),
        Ellipsoid(centre=(0, spine_y + 14, 0), radii=(rng.uniform(22, 30), 36, INFINITE)),
        Ellipsoid(centre=(rng.uniform(18, 26), spine_y - 16, 0), radii=(14, 14, INFINITE)),
        heart,
        Ellipsoid(centre=(rng.uniform(22, 32), 4, hilum_z + 38), radii=(22, 34, 22)),  # aortic arch
        *(Ellipsoid(centre=_triple(h), radii=(rng.uniform(12, 20), 15, rng.uniform(14, 22)), rotation=_tilt(rng, 0.5)) for h in hila),
    )
    depths = rng.uniform(48, 85, 2)
    domes = tuple(
        Ellipsoid(
            centre=(side * half_width * rng.uniform(0.46, 0.54), rng.uniform(-12, 6), (0 if side < 0 else -rng.uniform(0, 25)) - depth),
            radii=(half_width * rng.uniform(0.52, 0.6), half_depth * rng.uniform(0.94, 1.04), depth), dome=True,
        )
        for side, depth in zip((-1, 1), depths, strict=True)
    )  # fmt: skip
    stomach = None
    if rng.random() < 0.6:
        stomach = Ellipsoid(
            centre=(half_width * 0.5, -20, domes[1].centre[2] + depths[1] - rng.uniform(28, 45)),
            radii=(rng.uniform(15, 38), rng.uniform(15, 35), rng.uniform(10, 20)), rotation=_tilt(rng, 0.4),
        )  # fmt: skip
    contrast = rng.random() < 0.5
    anatomy = Anatomy(
        densities=Densities(
            lung=rng.uniform(-895, -780), lung_gradient=rng.uniform(0, 0.5), soft=rng.uniform(30, 65), fat=rng.uniform(-115, -90),
            blood=rng.uniform(100, 320) if contrast else rng.uniform(30, 55), liver=rng.uniform(50, 115),
            marrow=rng.uniform(120, 260), cortex=rng.uniform(400, 900),
        ),
        cage=cage, mediastinum=mediastinum, domes=domes, heart=heart, spine_y=spine_y, apex_z=apex_z, bottom_z=-float(depths.max()) * 0.9,
        wall_mm=(rng.uniform(24, 55), rng.uniform(20, 45)), muscle_mm=rng.uniform(8, 22),
        rib_pitch_mm=rng.uniform(22, 30), rib_slope=rng.uniform(0.3, 0.9), stomach=stomach,
        borders=(
            random_waves(rng, count=24, wavelengths_mm=(14, 90), deviation=rng.uniform(0.6, 2.0)),
            random_waves(rng, count=32, wavelengths_mm=(14, 80), deviation=rng.uniform(1.5, 4.0)),
            random_waves(rng, count=24, wavelengths_mm=(20, 90), deviation=rng.uniform(1.0, 3.5)),
        ),
        tissue=random_waves(rng, count=32, wavelengths_mm=(6, 50), deviation=1.0),
        coarse=random_waves(rng, count=32, wavelengths_mm=(15, 80), deviation=rng.uniform(8, 30)),
        fine=random_waves(rng, count=48, wavelengths_mm=(3.5, 12), deviation=rng.uniform(8, 26)),
        holes=random_waves(rng, count=40, wavelengths_mm=(7, 28), deviation=1.0) if rng.random() < 0.3 else None,
        fissures=(
            (hilum_z - 5 + rng.uniform(-8, 8), rng.uniform(0.7, 1.3), rng.uniform(-0.3, 0.3)),
            (hilum_z - 5 + rng.uniform(-8, 8), rng.uniform(0.7, 1.3), rng.uniform(-0.3, 0.3)),
            (hilum_z + rng.uniform(-8, 12), rng.uniform(-0.15, 0.15), rng.uniform(-0.2, 0.2)),
        ),
        vessels=_NO_TUBES, airways=_NO_TUBES, great_vessels=_great_vessels(rng, hila, apex_z, spine_y),
        hazes=(), bands=(),
    )  # fmt: skip
    return _with_contents(anatomy, rng, hila)


_NO_TUBES = Tubes(starts=np.zeros((0, 3)), ends=np.zeros((0, 3)), start_radii=np.zeros(0), end_radii=np.zeros(0))


def _with_contents(anatomy: Anatomy, rng: np.random.Generator, hila: list[NDArray[np.float64]]) -> Anatomy:
    def depth_inside(points: NDArray[np.float64]) -> NDArray[np.float32]:
        x, y, z = points.T.astype(np.float32)
        return -anatomy.lung_distance((z, y, x), wavy=False)

    vessels, airways = [], []
    trachea = np.array([[0, 8, anatomy.apex_z + 60], [rng.uniform(-4, 4), 14, hila[0][2] + 30]])
    airways.append(chain(trachea, np.full(2, rng.uniform(7, 9.5))))
    for side, hilum in zip((-1, 1), hila, strict=True):
        airways.append(chain(np.stack([trachea[1], hilum]), np.array([6.5, 5.0])))
        fan = np.array([[0.6, 0.1, 1.0], [1.0, -0.7, 0.2], [1.0, 0.5, 0.3], [0.7, 0.5, -0.9], [0.6, -0.4, -0.8], [0.4, 0.9, -0.3]])
        for kind in ("artery", "vein"):
            tree = grow_tree(
                rng, root=hilum + rng.normal(0, 4, 3), directions=(fan + rng.normal(0, 0.25, fan.shape)) * (side, 1, 1),
                radius_mm=rng.uniform(6.5, 9.5), smallest_mm=rng.uniform(0.45, 0.7), depth_inside=depth_inside,
            )  # fmt: skip
            vessels.append(tree)
            wide = tree.start_radii > 1.5
            if kind == "artery":
                shift = rng.normal(0, 2.2, 3)
                airways.append(
                    Tubes(
                        starts=tree.starts[wide] + shift, ends=tree.ends[wide] + shift,
                        start_radii=tree.start_radii[wide] * 0.65, end_radii=tree.end_radii[wide] * 0.65,
                    )
                )  # fmt: skip
    hazes = tuple(
        Ellipsoid(centre=_triple(_lung_point(rng, anatomy)), radii=_triple(rng.uniform(10, 45, 3)), rotation=random_rotation(rng))
        for _ in range(int(rng.integers(0, 4)) if rng.random() < 0.35 else 0)
    )
    bands = []
    for _ in range(int(rng.integers(0, 8)) if rng.random() < 0.6 else 0):
        radii = (rng.uniform(12, 45), rng.uniform(8, 25), rng.uniform(0.5, 1.6))
        bands.append(Ellipsoid(centre=_triple(_lung_point(rng, anatomy)), radii=radii, rotation=random_rotation(rng)))
    values = {name: getattr(anatomy, name) for name in Anatomy.__dataclass_fields__}
    values |= {"vessels": together(vessels), "airways": together(airways), "hazes": hazes, "bands": tuple(bands)}
    return Anatomy(**values)


def _lung_point(rng: np.random.Generator, anatomy: Anatomy) -> NDArray[np.float64]:
    point: NDArray[np.float64] = points_in_lung(anatomy, rng, count=1, depth_mm=(0.0, INFINITE))[0]
    return point


def points_in_lung(anatomy: Anatomy, rng: np.random.Generator, *, count: int, depth_mm: tuple[float, float]) -> NDArray[np.float64]:
    """Draw (count, 3) points x, y, z whose depth below the lung's surface lies between the two numbers (negative: outside)."""
    found: list[NDArray[np.float64]] = []
    total = 0
    reach_x, reach_y, _ = anatomy.cage.radii
    for _ in range(200):
        points = rng.uniform((-reach_x - 5, -reach_y - 5, anatomy.bottom_z), (reach_x + 5, reach_y + 5, anatomy.apex_z + 5), (4096, 3))
        x, y, z = points.T.astype(np.float32)
        depth = -anatomy.lung_distance((z, y, x))
        kept = points[(depth >= depth_mm[0]) & (depth <= depth_mm[1])]
        found.append(kept)
        total += len(kept)
        if total >= count:
            return np.concatenate(found)[:count]
    raise ValueError(f"this chest has no place {depth_mm} mm below the surface of its lungs")


def _great_vessels(rng: np.random.Generator, hila: list[NDArray[np.float64]], apex_z: float, spine_y: float) -> Tubes:
    hilum_z = float(hila[0][2])
    arch = np.array(
        [
            [5, -22, hilum_z - 25], [-12, -26, hilum_z + 10], [0, -12, hilum_z + 42], [20, 10, hilum_z + 45],
            [24, spine_y - 16, hilum_z + 25], [22, spine_y - 16, -120],
        ]
    )  # fmt: skip
    parts = [chain(arch + rng.normal(0, 2, arch.shape), np.array([16, 15.5, 14, 13, 12.5, 11.5]))]
    cava = np.array([[-24, -10, apex_z + 40], [-26, -8, hilum_z - 20]])
    parts.append(chain(cava, np.array([7.0, 10.0])))
    trunk = np.array([20, -22, hilum_z - 8.0])
    parts += [chain(np.stack([trunk, hilum]), np.array([13.0, 9.0])) for hilum in hila]
    for x in (-18, 8, 26):
        neck = np.array([[x * 0.6, -8, hilum_z + 46], [x * 1.5, -4, apex_z + 40]])
        parts.append(chain(neck, np.array([5.0, 4.0])))
    for side in (-1, 1):  # subclavian vessels over the apex
        over = np.array([[side * 25, -2, apex_z + 10], [side * 60, -8, apex_z + 12], [side * 110, 0, apex_z - 15]])
        parts.append(chain(over + rng.normal(0, 4, over.shape), np.array([4.5, 4.5, 4.0])))
    return together(parts)


def _tilt(rng: np.random.Generator, strength: float) -> NDArray[np.float64]:
    """A small random rotation."""
    matrix, upper = np.linalg.qr(np.eye(3) + strength * rng.normal(size=(3, 3)) * 0.7)
    return np.asarray(matrix * np.sign(np.diag(upper)), dtype=np.float64)


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])
