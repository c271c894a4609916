"""What is bright in a head without a tumour: hyperintensities of the white matter, and after contrast agent plexus, vessels and dura.

Small vessel disease makes spots in the deep white matter and caps and bands at the ventricles (F. Fazekas et al., AJR 149, 1987).
Must never look at real images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dicomnode.phantoms.shapes import Axes, Ellipsoid, Floats, Waves, inside, random_rotation, random_waves

FAR_MM = 50.0  # from anything: no tissue


@dataclass(frozen=True, kw_only=True)
class Place:
    """What of a head the look-alikes need to know, on one grid: distances in mm, negative inside, and the share of white matter."""

    surface: Floats  # of the brain without its folds
    sheets: Floats  # distance to the middle of the sulci
    fold_mm: float
    fluid_mm: float
    texture: Floats  # deviation 1
    white: Floats


@dataclass(frozen=True, kw_only=True)
class Lookalikes:
    """What is bright without a tumour."""

    spots: tuple[Ellipsoid, ...]  # in the white matter
    ventricles: tuple[Ellipsoid, ...]  # whose caps and bands are bright
    band_mm: float
    plexus: tuple[Ellipsoid, ...]
    vessels: tuple[Ellipsoid, ...]
    veins: Waves  # deviation 1; in sulci where it is high runs a vein
    sinus_mm: float  # half the width of the sinus in the middle
    dura_mm: float

    def shares(self, axes: Axes, edge: float, place: Place) -> Iterator[tuple[str, Floats]]:
        """Yield tissues with their share of each voxel, in the order in which they take the place of what is there."""
        z, _, x = axes
        spots = _nearest(self.spots, axes)
        bands = _nearest(self.ventricles, axes) - self.band_mm * np.clip(1 + 0.8 * place.texture, 0, 2)
        yield "hyperintensity", np.asarray(inside(np.minimum(spots, bands), 1.0) * place.white, dtype=np.float32)
        yield "plexus", inside(_nearest(self.plexus, axes), edge)
        veins = np.maximum(place.sheets - 1.0, 2.0 * (1.2 - self.veins(axes)))
        veins = np.maximum(np.maximum(veins, place.surface - 1.5), -place.fold_mm - place.surface)
        middle = np.maximum(np.abs(place.surface - place.fluid_mm / 2) - self.sinus_mm, np.abs(x) - self.sinus_mm)
        sinus = np.maximum(middle, -z - 10.0)
        yield "vessel", inside(np.minimum(np.minimum(veins, sinus), _nearest(self.vessels, axes)), edge)
        yield "dura", np.asarray(inside(np.abs(place.surface - place.fluid_mm) - self.dura_mm, edge), dtype=np.float32)


def _nearest(bodies: Sequence[Ellipsoid], axes: Axes) -> Floats:
    """Signed distance to the nearest of some small bodies; what is far from all is as far as `FAR_MM`."""
    z, y, x = axes
    nearest = np.full((z.size, y.size, x.size), FAR_MM, dtype=np.float32)
    for body in bodies:
        low, high = body.bounds(8.0)
        box = tuple(
            slice(*np.searchsorted(axis.ravel(), (first, last))) for axis, first, last in zip((z, y, x), low[::-1], high[::-1], strict=True)
        )
        part = (z[box[0]], y[:, box[1]], x[:, :, box[2]])
        if nearest[box].size:
            nearest[box] = np.minimum(nearest[box], body.distance(part))
    return nearest


def random_lookalikes(seed: int, brain: tuple[float, float, float], ventricles: Sequence[Ellipsoid]) -> Lookalikes:
    """Draw them for a head: none to many spots, as from the young to the old."""
    rng = np.random.default_rng([seed, 53])
    width, depth, height = brain
    age = rng.random()
    spots = []
    for _ in range(int(rng.integers(0, int(4 + 40 * max(0.0, age - 0.4))))):
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.75)
        centre = (reach * width * float(np.cos(angle)), reach * depth * float(np.sin(angle)), height * rng.uniform(-0.1, 0.6))
        radii = np.exp(rng.uniform(np.log(1.2), np.log(6.0))) * np.exp(rng.normal(0, 0.3, 3))
        spots.append(Ellipsoid(centre=centre, radii=(radii[0], radii[1], radii[2]), rotation=random_rotation(rng)))
    plexus = tuple(
        Ellipsoid(centre=(float(v.centre[0]), float(v.centre[1]) + rng.uniform(10, 20), float(v.centre[2]) - rng.uniform(0, 3)),
                  radii=(rng.uniform(1.5, 3.5), rng.uniform(4, 10), rng.uniform(2, 5)))
        for v in ventricles
    )  # fmt: skip
    vessels = [
        Ellipsoid(centre=(side * rng.uniform(12, 22), rng.uniform(-28, -12), -0.55 * height), radii=(14.0, rng.uniform(1.2, 2.4), 2.0))
        for side in (-1, 1)
    ]
    vessels += [  # carotid, cavernous sinus and pituitary below the brain; the great vein in its middle
        Ellipsoid(centre=(side * rng.uniform(8, 14), rng.uniform(-22, -14), -0.75 * height), radii=(4.0, 6.0, 8.0)) for side in (-1, 0, 1)
    ]
    vessels.append(Ellipsoid(centre=(0.0, rng.uniform(22, 32), rng.uniform(-4, 8)), radii=(2.0, 6.0, rng.uniform(2, 4))))
    return Lookalikes(
        spots=tuple(spots), ventricles=tuple(ventricles), band_mm=float(rng.uniform(-1.0, 1.5) + 6 * max(0.0, age - 0.5)), plexus=plexus,
        vessels=tuple(vessels), veins=random_waves(rng, count=24, wavelengths_mm=(14, 50), deviation=1.0),
        sinus_mm=float(rng.uniform(2.5, 5.0)), dura_mm=float(rng.uniform(0.3, 1.0)),
    )  # fmt: skip
