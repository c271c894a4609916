"""Radiographs of what is no frontal chest: limbs, a hand, a pelvis, an abdomen, a breast, a jaw, a skull, and test objects.

What a chest model must leave alone. Bodies are formulas (`shadows`), not renderings: a film takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dicomnode.phantoms.shadows import Plane, Shadow, capsule, ellipsoid, no_lungs, tubular_bone
from dicomnode.phantoms.shapes import Floats, random_waves

Draw = Callable[[Plane, np.random.Generator], tuple[Floats, Floats]]  # (water, bone) path lengths, mm


def film_of(kind: str, rng: np.random.Generator) -> Shadow:
    """The shadow of a random body of one of KINDS."""
    height = int(rng.integers(150, 240))
    width = int(height * rng.uniform(0.5, 1.5))
    plane = Plane(left_mm=-width, top_mm=height, pixel_mm=2.0, shape=(height, width))
    soft, bone = KINDS[kind](plane, rng)
    if rng.random() < 0.25 and kind != "chart":
        soft, bone = soft.T, bone.T
        plane = Plane(left_mm=-height, top_mm=width, pixel_mm=2.0, shape=(width, height))
    return no_lungs(plane, soft, bone)


def _size(plane: Plane) -> tuple[float, float]:
    """Half the width and half the height of the film, mm."""
    return plane.shape[1] * plane.pixel_mm / 2, plane.shape[0] * plane.pixel_mm / 2


def _texture(plane: Plane, rng: np.random.Generator, wavelengths_mm: tuple[float, float]) -> Floats:
    waves = random_waves(rng, count=40, wavelengths_mm=wavelengths_mm, deviation=1.0)
    return waves((plane.z[:, :, None], np.zeros((1, 1, 1), dtype=np.float32), plane.x.reshape(1, 1, -1)))[:, 0]


def _limb(plane: Plane, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """An arm or a leg, one bone or two, sometimes two limbs beside each other; often with a joint."""
    wide, high = _size(plane)
    soft, bone = np.zeros(plane.shape, dtype=np.float32), np.zeros(plane.shape, dtype=np.float32)
    limbs = 2 if rng.random() < 0.4 else 1
    for number in range(limbs):
        middle = 0.0 if limbs == 1 else (number - 0.5) * wide * rng.uniform(0.8, 1.1)
        lean = rng.uniform(-0.25, 0.25)
        radius = wide / limbs * rng.uniform(0.35, 0.75)
        top, low = (middle + lean * high, high * 1.2), (middle - lean * high, -high * 1.2)
        soft += capsule(plane, top, low, (radius * rng.uniform(0.8, 1.2), radius * rng.uniform(0.6, 1.0)))
        joint = rng.uniform(-0.5, 0.5) * high if rng.random() < 0.6 else 3 * high
        bones = 2 if rng.random() < 0.5 else 1
        for each in range(bones):
            shift = 0.0 if bones == 1 else (each - 0.5) * radius * 0.8
            thick = radius * rng.uniform(0.14, 0.3)
            bone += tubular_bone(
                plane, (top[0] + shift, top[1]), (low[0] + shift, joint - 4 if joint < high else low[1]), (thick, thick * 1.1)
            )
        if joint < high:
            bone += 0.35 * ellipsoid(plane, (middle + lean * joint, joint + 14), (radius * 0.55, radius * 0.5, 16))
            bone += 0.35 * ellipsoid(plane, (middle + lean * joint, joint - 16), (radius * 0.6, radius * 0.5, 14))
    return soft, bone


def _hand(plane: Plane, rng: np.random.Generator) -> tuple[Floats, Floats]:
    wide, high = _size(plane)
    size = min(wide, high) * rng.uniform(0.6, 1.0)
    soft = 0.4 * ellipsoid(plane, (0, -0.25 * size), (0.5 * size, 0.25 * size, 0.5 * size))
    bone = np.zeros(plane.shape, dtype=np.float32)
    for finger in range(5):
        angle = (finger - 2) * rng.uniform(0.14, 0.24)
        way = np.array([np.sin(angle), np.cos(angle)])
        base = np.array([(finger - 2) * 0.18 * size, -0.1 * size])
        soft = np.maximum(soft, capsule(plane, tuple(base), tuple(base + way * size), (0.1 * size, 0.07 * size)))
        for joint in range(4):
            start, end = base + way * size * (joint * 0.27 - 0.25), base + way * size * (joint * 0.27 - 0.01)
            bone += tubular_bone(plane, tuple(start), tuple(end), (0.045 * size, 0.035 * size))
    soft = np.maximum(soft, capsule(plane, (0, -0.5 * size), (0, -2 * high), (0.3 * size, 0.32 * size)))
    for side in (-1, 1):
        bone += tubular_bone(plane, (side * 0.13 * size, -0.75 * size), (side * 0.15 * size, -2 * high), (0.11 * size, 0.08 * size))
    return soft, bone


def _trunk(plane: Plane, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """The water of a trunk and the bone of a lumbar spine."""
    wide, high = _size(plane)
    waist, depth = wide * rng.uniform(0.75, 1.2), rng.uniform(90, 150)
    soft = capsule(plane, (0, 2 * high), (0, -2 * high), (waist, waist)) * (depth / waist)
    soft *= 1 + 0.02 * _texture(plane, rng, (20, 120))
    pitch, thick = rng.uniform(30, 40), rng.uniform(16, 26)
    disc = np.abs(np.mod(plane.z, pitch) - pitch / 2) < pitch / 2 - 3
    bone = 0.25 * capsule(plane, (0, 2 * high), (rng.uniform(-10, 10), -2 * high), (thick, thick)) * disc
    return np.asarray(soft, dtype=np.float32), np.asarray(bone, dtype=np.float32)


def _gas(plane: Plane, rng: np.random.Generator, count: int) -> Floats:
    wide, high = _size(plane)
    total = np.zeros(plane.shape, dtype=np.float32)
    for _ in range(count):
        radii = rng.uniform(8, 45, 3)
        centre = (rng.uniform(-0.8, 0.8) * wide, rng.uniform(-1, 1) * high)
        total = np.maximum(
            total, ellipsoid(plane, centre, (float(radii[0]), float(radii[1]), float(radii[2])), turn=float(rng.uniform(0, 3)))
        )
    return total


def _abdomen(plane: Plane, rng: np.random.Generator) -> tuple[Floats, Floats]:
    soft, bone = _trunk(plane, rng)
    return soft - _gas(plane, rng, int(rng.integers(0, 25))), bone


def _pelvis(plane: Plane, rng: np.random.Generator) -> tuple[Floats, Floats]:
    soft, bone = _trunk(plane, rng)
    wide, high = _size(plane)
    bone *= plane.z > -0.1 * high
    scale = min(wide, high) / 180
    for side in (-1.0, 1.0):
        wing = (side * 85 * scale, 25 * scale)
        bone += 0.10 * ellipsoid(plane, wing, (55 * scale, 60, 75 * scale), turn=side * 0.5)
        rim = ellipsoid(plane, wing, (58 * scale, 60, 78 * scale), turn=side * 0.5) - ellipsoid(
            plane, wing, (52 * scale, 60, 72 * scale), turn=side * 0.5
        )
        bone += 0.12 * rim
        ring = ellipsoid(plane, (side * 35 * scale, -85 * scale), (36 * scale, 20, 32 * scale))
        bone += 0.5 * (ring - ellipsoid(plane, (side * 35 * scale, -85 * scale), (22 * scale, 20, 20 * scale)))
        head = (side * 105 * scale, -55 * scale)
        bone += 0.35 * ellipsoid(plane, head, (26 * scale,) * 3)
        bone += tubular_bone(plane, (side * 140 * scale, -80 * scale), (side * 130 * scale, -3 * high), (20 * scale, 16 * scale))
        bone += 0.5 * tubular_bone(plane, head, (side * 140 * scale, -80 * scale), (18 * scale, 20 * scale))
    return soft - _gas(plane, rng, int(rng.integers(0, 8))), bone


def _breast(plane: Plane, rng: np.random.Generator) -> tuple[Floats, Floats]:
    wide, high = _size(plane)
    side = 1.0 if rng.random() < 0.5 else -1.0
    reach, tall = wide * rng.uniform(0.9, 1.7), high * rng.uniform(0.5, 0.95)
    middle = (-side * wide, rng.uniform(-0.25, 0.25) * high)
    form = np.maximum(1 - ((plane.x - middle[0]) / reach) ** 2 - ((plane.z - middle[1]) / tall) ** 2, 0)
    soft = 50 * np.minimum(form * 4, 1)
    gland = np.clip(form * 1.5, 0, 1) * np.exp(0.5 * _texture(plane, rng, (6, 60)))
    soft = soft * (0.9 + 0.15 * gland * rng.uniform(0.5, 2.5))
    if rng.random() < 0.6:
        muscle = (plane.z - high * rng.uniform(-0.3, 0.3)) * rng.uniform(0.4, 0.9) - side * plane.x - wide * rng.uniform(0.2, 0.8)
        soft = soft + 20 * np.clip(muscle / 20, 0, 1) * (form > 0)
    bone = np.zeros(plane.shape, dtype=np.float32)
    for _ in range(int(rng.integers(0, 5))):
        bone += ellipsoid(plane, (rng.uniform(-wide, wide), rng.uniform(-high, high)), (2.5, 1, 2.5)) * (form > 0)
    return np.asarray(soft, dtype=np.float32), bone


def _jaw(plane: Plane, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A panorama of the teeth: two rows on an arc, a jaw below, a bright spine in the middle."""
    wide, high = _size(plane)
    soft = np.full(plane.shape, 60.0, dtype=np.float32) + 15 * _texture(plane, rng, (40, 300))
    bend = rng.uniform(0.1, 0.35) * high * (plane.x / wide) ** 2
    level = plane.z - bend
    bone = 25 * np.exp(-(((level + 0.25 * high) / (0.22 * high)) ** 2)) + 15 * np.exp(-(((level - 0.35 * high) / (0.2 * high)) ** 2))
    pitch = wide / rng.uniform(8, 12)
    tooth = np.clip(1.4 - 2.2 * np.abs(np.mod(plane.x, pitch) / pitch - 0.5) * 2, 0, 1) * (np.abs(plane.x) < 0.62 * wide)
    for centre in (-0.13, 0.13):
        bone = bone + 40 * tooth * np.exp(-(((level - centre * high) / (0.11 * high)) ** 4))
    bone = bone + rng.uniform(0, 60) * np.exp(-((plane.x / (0.06 * wide)) ** 2))
    for side in (-1.0, 1.0):
        bone = bone + tubular_bone(plane, (side * 0.8 * wide, -0.3 * high), (side * 0.9 * wide, 0.8 * high), (0.12 * wide, 0.08 * wide))
    inside = (np.abs(plane.z) < high * rng.uniform(0.7, 1.0)) & (np.abs(plane.x) < 0.97 * wide)
    return np.asarray(soft * inside, dtype=np.float32), np.asarray(bone * inside, dtype=np.float32)


def _skull(plane: Plane, rng: np.random.Generator) -> tuple[Floats, Floats]:
    wide, high = _size(plane)
    size = min(wide, high) * rng.uniform(0.7, 1.1)
    outer = ellipsoid(plane, (0, 0.15 * size), (0.75 * size, 70, 0.9 * size))
    bone = 0.6 * (outer - ellipsoid(plane, (0, 0.15 * size), (0.7 * size, 66, 0.84 * size)))
    for side in (-1.0, 1.0):
        bone += 0.4 * (ellipsoid(plane, (side * 0.3 * size, 0), (0.2 * size, 30, 0.17 * size)))
        bone -= 0.45 * (ellipsoid(plane, (side * 0.3 * size, 0), (0.16 * size, 30, 0.13 * size)))
    bone += 0.4 * capsule(plane, (-0.4 * size, -0.65 * size), (0.4 * size, -0.65 * size), (0.12 * size, 0.12 * size))
    bone += 0.3 * capsule(plane, (0, -0.4 * size), (0, -3 * high), (0.12 * size, 0.14 * size))
    soft = outer + capsule(plane, (0, -0.5 * size), (0, -3 * high), (0.45 * size, 0.5 * size))
    return soft, np.maximum(bone, 0)


def _chart(plane: Plane, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A test object, a blank film, or blobs of any kind."""
    wide, high = _size(plane)
    soft = np.full(plane.shape, rng.uniform(0, 60), dtype=np.float32) + rng.uniform(0, 20) * _texture(plane, rng, (10, 300))
    for _ in range(int(rng.integers(0, 14))):
        radii = rng.uniform(5, 0.6 * wide, 3)
        body = ellipsoid(
            plane,
            (rng.uniform(-wide, wide), rng.uniform(-high, high)),
            (float(radii[0]), 40.0, float(radii[2])),
            turn=float(rng.uniform(0, 3)),
        )
        soft += rng.uniform(-1, 1) * (body if rng.random() < 0.5 else 40.0 * (body > 0))
    if rng.random() < 0.4:
        soft += 40.0 * (np.mod(plane.x * np.cos(0.3) + plane.z * np.sin(0.3), rng.uniform(8, 40)) < rng.uniform(2, 8))
    return np.maximum(soft, 0), np.zeros(plane.shape, dtype=np.float32)


KINDS: dict[str, Draw] = {
    "limb": _limb, "hand": _hand, "abdomen": _abdomen, "pelvis": _pelvis, "breast": _breast, "jaw": _jaw, "skull": _skull, "chart": _chart,
}  # fmt: skip
