"""A synthetic head for MR: tissues with a known brain, and what sequences make of them.

Origin: the middle of the brain; LPS mm. A head is drawn from a seed and rendered as the share of each tissue in each voxel;
a contrast gives each tissue its signal. Must never look at real images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.phantoms.head_lookalikes import Lookalikes, Place, random_lookalikes
from dicomnode.phantoms.shapes import Axes, Ellipsoid, Floats, Grid, Waves, inside, join, random_rotation, random_waves

MM_PER_FOLD = 5.5  # the waves of the folds rise by about one deviation in so many millimetres
TISSUES = ("air", "skin", "fat", "muscle", "bone", "marrow", "fluid", "grey", "white", "eye", "lesion")

GLIOMA = ("oedema", "rim", "necrosis")  # from the outside to the inside; the rim takes up contrast agent
# what is bright on FLAIR or after contrast agent in heads without a tumour: spots of the white matter, plexus, vessels, dura
LOOKALIKES = ("hyperintensity", "plexus", "vessel", "dura")
_ALL = (*TISSUES, *GLIOMA, *LOOKALIKES)


def _signals(*values: float) -> Mapping[str, float]:
    return dict(zip(_ALL, values, strict=True))


# Signal of each tissue between 0 and 1, as usual sequences show them; lesion: oedema of white matter
CONTRASTS: Mapping[str, Mapping[str, float]] = {
    "t1": _signals(0.0, 0.5, 1.0, 0.42, 0.06, 0.7, 0.14, 0.5, 0.72, 0.2, 0.4, 0.5, 0.48, 0.3, 0.62, 0.45, 0.2, 0.35),
    "t1c": _signals(0.0, 0.55, 1.0, 0.48, 0.06, 0.7, 0.14, 0.52, 0.72, 0.2, 0.95, 0.52, 1.1, 0.32, 0.62, 1.0, 1.2, 0.8),
    "t2": _signals(0.0, 0.45, 0.7, 0.22, 0.05, 0.5, 1.0, 0.52, 0.36, 0.95, 0.85, 0.85, 0.65, 0.95, 0.65, 0.75, 0.1, 0.25),
    "flair": _signals(0.0, 0.4, 0.7, 0.3, 0.05, 0.45, 0.1, 0.6, 0.45, 0.15, 1.0, 1.0, 0.95, 0.8, 0.85, 0.5, 0.1, 0.3),
    "pd": _signals(0.0, 0.6, 0.85, 0.5, 0.06, 0.6, 0.8, 0.85, 0.68, 0.85, 0.95, 0.95, 0.9, 0.95, 0.85, 0.8, 0.25, 0.35),
}


@dataclass(frozen=True, kw_only=True)
class Glioma:
    """A tumour in the white matter: oedema around a rim that enhances, around necrosis."""

    oedema: Ellipsoid
    core: Ellipsoid
    rim_mm: float
    surface: Waves  # mm, of the oedema; a third of it is the core's


@dataclass(frozen=True, kw_only=True)
class HeadScene:
    """A head: its surfaces, from the outside to the inside."""

    seed: int
    skin: Ellipsoid
    scalp_mm: float
    skull_mm: float
    fluid_mm: float
    brain: Ellipsoid
    cerebellum: Ellipsoid
    stem: Ellipsoid
    ventricles: tuple[Ellipsoid, ...]
    nuclei: tuple[Ellipsoid, ...]
    cortex_mm: float
    folds: Waves  # deviation 1; where it is near zero lie the sulci
    fold_mm: float  # how deep they are
    outline: Waves  # of skin, skull and brain together, mm
    texture: Waves  # deviation 1
    eyes: tuple[Ellipsoid, ...]
    jaw: Ellipsoid
    neck: Ellipsoid
    airway: tuple[Ellipsoid, ...]
    lesion: Ellipsoid | None
    glioma: Glioma | None
    lookalikes: Lookalikes | None = None

    def brain_distance(self, axes: Axes) -> Floats:
        """Signed distance to the surface of cerebrum, cerebellum and stem without their folds, mm; the ventricles are inside."""
        both = join(self.brain.distance(axes) + self.outline(axes), self.cerebellum.distance(axes), 6.0)
        return join(both, np.maximum(self.stem.distance(axes), -axes[0] - 95.0), 6.0)


def head_scene(seed: int, *, lesion_mm: float = 0.0, glioma_mm: float = 0.0, lookalikes: bool = False) -> HeadScene:
    """Draw a head from `seed`; above 0 `lesion_mm` is the diameter of a lesion in the white matter, `glioma_mm` about that of a glioma.

    With `lookalikes` it has what is bright on FLAIR or after contrast agent without a tumour; the rest of the head is the same.
    """
    rng = np.random.default_rng([seed, 51])
    width, depth, height = rng.uniform(60, 70), rng.uniform(76, 90), rng.uniform(54, 66)
    scalp, skull, fluid = rng.uniform(3, 9), rng.uniform(5, 10), rng.uniform(1.5, 6)
    shell = scalp + skull + fluid
    tilt = rng.uniform(-0.1, 0.1)
    rotation = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    horn = rng.uniform(0.6, 1.8)
    ventricles = [
        Ellipsoid(centre=(side * rng.uniform(9, 13), rng.uniform(-8, 4), 8), radii=(4 * horn, 30 * horn**0.4, 7 * horn)) for side in (-1, 1)
    ]
    ventricles += [Ellipsoid(centre=(0, -2, -6), radii=(2.0 * horn, 13, 10)), Ellipsoid(centre=(0, 32, -42), radii=(6, 5, 9))]
    side = -1.0 if rng.random() < 0.5 else 1.0
    lesion = None
    if lesion_mm:
        lesion = Ellipsoid(centre=(side * 0.5 * width, rng.uniform(-30, 30), rng.uniform(8, 25)), radii=(lesion_mm / 2,) * 3)
    gaze = rng.uniform(28, 33)
    return HeadScene(
        seed=seed, skin=Ellipsoid(centre=(0, 0, 0), radii=(width + shell, depth + shell, height + shell), rotation=rotation),
        scalp_mm=scalp, skull_mm=skull, fluid_mm=fluid,
        brain=Ellipsoid(centre=(0, 0, 0), radii=(width, depth, height), rotation=rotation),
        cerebellum=Ellipsoid(centre=(0, 0.5 * depth, -0.72 * height), radii=(0.72 * width, 0.36 * depth, 0.36 * height)),
        stem=Ellipsoid(centre=(0, 16, -60), radii=(13, 12, 60)), ventricles=tuple(ventricles),
        nuclei=tuple(Ellipsoid(centre=(s * 22, -4, 0), radii=(9, 17, 9)) for s in (-1, 1)), cortex_mm=rng.uniform(2.2, 4.0),
        folds=random_waves(rng, count=48, wavelengths_mm=(22, 48), deviation=1.0), fold_mm=rng.uniform(8, 18),
        outline=random_waves(rng, count=24, wavelengths_mm=(50, 140), deviation=rng.uniform(0.5, 2.5)),
        texture=random_waves(rng, count=32, wavelengths_mm=(9, 50), deviation=1.0),
        eyes=tuple(Ellipsoid(centre=(s * gaze, -0.92 * depth, -0.5 * height), radii=(12, 12, 12)) for s in (-1, 1)),
        jaw=Ellipsoid(centre=(0, -0.5 * depth, -1.35 * height), radii=(0.85 * width, 0.62 * depth, 0.95 * height)),
        neck=Ellipsoid(centre=(0, 22, 0), radii=(rng.uniform(48, 62), rng.uniform(52, 66), np.inf)),
        airway=(
            Ellipsoid(centre=(0, -0.85 * depth, -0.95 * height), radii=(14, 28, 20)),
            Ellipsoid(centre=(-30, -0.8 * depth, -height), radii=(13, 14, 14)),
            Ellipsoid(centre=(30, -0.8 * depth, -height), radii=(13, 14, 14)),
            Ellipsoid(centre=(0, -0.35 * depth, -1.7 * height), radii=(9, 8, 50)),
        ),
        lesion=lesion, glioma=_glioma(seed, glioma_mm, (width, depth, height)) if glioma_mm else None,
        lookalikes=random_lookalikes(seed, (width, depth, height), ventricles[:2]) if lookalikes else None,
    )  # fmt: skip


def _glioma(seed: int, diameter_mm: float, brain: tuple[float, float, float]) -> Glioma:
    rng = np.random.default_rng([seed, 52])
    width, depth, height = brain
    side = -1.0 if rng.random() < 0.5 else 1.0
    centre = (side * rng.uniform(0.35, 0.6) * width, rng.uniform(-0.45, 0.45) * depth, rng.uniform(-0.1, 0.4) * height)
    radii = diameter_mm / 2 * np.exp(rng.normal(0, 0.15, 3))
    middle = np.array(centre) + rng.uniform(-0.2, 0.2, 3) * radii
    core = radii * rng.uniform(0.45, 0.7)
    return Glioma(
        oedema=Ellipsoid(centre=centre, radii=(radii[0], radii[1], radii[2]), rotation=random_rotation(rng)),
        core=Ellipsoid(centre=(middle[0], middle[1], middle[2]), radii=(core[0], core[1], core[2])),
        rim_mm=float(min(rng.uniform(2.5, 6.0), 0.6 * core.min())),
        surface=random_waves(rng, count=32, wavelengths_mm=(14, 50), deviation=0.12 * diameter_mm / 2),
    )


def render_head(scene: HeadScene, grid: Grid) -> tuple[dict[str, Floats], Floats]:
    """The share (0..1) of each tissue in each voxel of a grid, and the share of the brain with its ventricles."""
    z, _, _ = axes = grid.axes
    edge = max(0.7, min(grid.spacing_mm) / 2)
    outline = scene.outline(axes)
    texture = scene.texture(axes)
    skin = scene.skin.distance(axes) + outline
    face = join(join(skin, scene.jaw.distance(axes) + outline, 12.0), np.maximum(scene.neck.distance(axes), z + 20.0), 14.0)
    shares = {"air": np.ones(grid.shape, dtype=np.float32)}

    def put(tissue: str, share: Floats) -> None:
        for known in shares:
            shares[known] *= 1 - share
        shares[tissue] = shares.get(tissue, np.zeros(grid.shape, dtype=np.float32)) + share

    put("skin", inside(face, edge))
    put("fat", inside(face + 2.0, edge))
    below = inside(z + 0.45 * scene.brain.radii[2] + 0 * face, 6.0)  # face and neck: muscle among the fat
    put("muscle", inside(face + 8.0 - 3 * texture, edge) * below * np.clip(0.75 + 0.6 * texture, 0, 1))
    for way in scene.airway:
        put("air", inside(way.distance(axes), edge))
    cranium = join(skin + scene.scalp_mm, scene.brain_distance(axes) - scene.fluid_mm - 2.0, 4.0)
    cranium = np.maximum(cranium, -z - 1.15 * scene.brain.radii[2] - 20)
    put("bone", inside(cranium, edge))
    if scene.skull_mm > 6:
        put("marrow", inside(np.abs(cranium + scene.skull_mm / 2) - scene.skull_mm / 5, edge))
    brain = scene.brain_distance(axes)
    put("fluid", inside(brain - scene.fluid_mm, edge))
    whole = inside(brain, edge)
    sheets = np.minimum(np.abs(scene.folds(axes)) * MM_PER_FOLD, np.abs(axes[2]) + 20 * (z < 0))  # sulci, and the fissure in the middle
    sulci = np.maximum(sheets - 0.8, -scene.fold_mm - brain)
    banks = np.maximum(sheets - 0.8 - scene.cortex_mm, -scene.fold_mm - scene.cortex_mm - brain)
    put("grey", inside(np.maximum(brain, -sulci), edge))
    put("white", inside(np.maximum(brain + scene.cortex_mm, -banks) + 0.4 * texture, edge))
    for nucleus in scene.nuclei:
        put("grey", inside(nucleus.distance(axes), edge) * np.float32(0.8))
    for ventricle in scene.ventricles:
        put("fluid", inside(ventricle.distance(axes), edge))
    if scene.lookalikes is not None:
        for tissue, share in scene.lookalikes.shares(axes, edge, Place(
            surface=brain, sheets=sheets, fold_mm=scene.fold_mm, fluid_mm=scene.fluid_mm, texture=texture, white=shares["white"],
        )):  # fmt: skip
            put(tissue, share)
    if scene.lesion is not None:
        put("lesion", inside(scene.lesion.distance(axes), 1.5) * whole)
    if scene.glioma is not None:
        surface = scene.glioma.surface(axes)
        core = scene.glioma.core.distance(axes) + surface / 3
        put("oedema", inside(scene.glioma.oedema.distance(axes) + surface, 1.5) * whole * (1 - shares["fluid"]))
        put("rim", inside(core, edge) * whole)
        put("necrosis", inside(core + scene.glioma.rim_mm, edge) * whole)
    for eye in scene.eyes:
        put("fat", inside(eye.distance(axes) - 7.0, edge) * (1 - whole) * inside(face + 3.0, edge))
        put("eye", inside(eye.distance(axes), edge))
    return shares, whole


def signal(shares: Mapping[str, Floats], contrast: Mapping[str, float]) -> Floats:
    """The noiseless image of rendered tissues, 0 to about 1."""
    total = np.zeros(next(iter(shares.values())).shape, dtype=np.float32)
    for tissue, share in shares.items():
        total += np.float32(contrast[tissue]) * share
    return total


def acquire(image: Floats, grid: Grid, affine: NDArray[np.float64], shape: tuple[int, int, int], *, thickness_mm: float) -> Floats:
    """Scan an image that lies on `grid` in slices of any orientation: (slices, rows, columns) with `affine` from (k, r, c, 1) to LPS mm.

    Each slice is the mean of planes across its thickness.
    """
    normal = affine[:3, 0] / np.linalg.norm(affine[:3, 0])
    planes = max(1, round(thickness_mm / 1.5))
    total = np.zeros(shape, dtype=np.float32)
    back = np.linalg.inv(grid.affine)
    for shift in (np.arange(planes) - (planes - 1) / 2) * (thickness_mm / planes):
        moved = affine.copy()
        moved[:3, 3] += shift * normal
        way = back @ moved
        total += ndimage.affine_transform(image, way[:3, :3], way[:3, 3], output_shape=shape, order=1, mode="constant", cval=0.0)
    return total / np.float32(planes)


def receive(image: Floats, rng: np.random.Generator, *, noise: float = 0.02, bias: float = 0.2) -> Floats:
    """What coils make of it: a smooth bias field and Rician noise (H. Gudbjartsson and S. Patz, Magn. Reson. Med. 34, 1995)."""
    coarse = ndimage.zoom(rng.normal(0, 1, (3, 3, 3)), np.array(image.shape) / 3, order=2, mode="nearest", grid_mode=True)
    bent = image * np.exp(np.float32(bias) * coarse.astype(np.float32))
    real, imaginary = (np.float32(noise) * rng.standard_normal(image.shape, dtype=np.float32) for _ in range(2))
    return np.asarray(np.hypot(bent + real, imaginary), dtype=np.float32)
