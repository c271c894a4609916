"""Volumes as MONAI's images, and places of its images in volumes.

An image is indexed (x, y, z) = (column, row, slice) and its affine maps to RAS mm, as a reader of NIfTI gives it; of a projection
(x, y), and its affine maps to the image plane. No torch, no MONAI: arrays and matrices alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.findings import Volume

Matrix = NDArray[np.float64]


def image_of(volume: Volume) -> NDArray[np.float32]:
    """Return the voxels as float32 (x, y, z), or (x, y) of a projection."""
    turned = volume.voxels.transpose(2, 1, 0)
    return np.array(turned[:, :, 0] if volume.is_projection else turned, dtype=np.float32, order="C")  # a copy: transforms may write


def affine_of_image(volume: Volume) -> Matrix:
    """Return the 4x4 affine (x, y, z, 1) -> RAS mm; of a projection (x, y, 0, 1) -> mm in its plane, which has no patient axes."""
    affine: Matrix = volume.affine[:, [2, 1, 0, 3]].astype(np.float64)
    if volume.is_projection:
        affine[:, 2] = (0, 0, 1, 0)
        return affine
    affine[:2] *= -1
    return affine


def from_volume(affine: Any, volume: Volume) -> Matrix:
    """Return the 4x4 matrix (k, r, c, 1) of the volume -> (x, y, z, 1) of an image with this affine."""
    inverse = np.linalg.inv(np.asarray(affine, dtype=np.float64))
    swapped = np.eye(4)[:, [2, 1, 0, 3]]
    return np.asarray(inverse @ affine_of_image(volume) @ swapped, dtype=np.float64)


def sampled(values: NDArray[Any], affine: Any, volume: Volume, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return `values` of an image, (x, y, z) or (x, y), at voxels (n, 3) of the volume: linear, and beyond the image its border."""
    matrix = from_volume(affine, volume)[: values.ndim]
    positions = matrix[:, :3] @ indices.T + matrix[:, 3:]
    return np.asarray(ndimage.map_coordinates(values, positions, order=1, mode="nearest", output=np.float32))


def boxes_in_volume(boxes: NDArray[np.floating], affine: Any, volume: Volume) -> tuple[Matrix, Matrix]:
    """Return boxes of an image, (n, 4) or (n, 6) as lower and then upper corners, as lower and upper voxel indices (n, 3) (k, r, c).

    Coordinates are those of pixel centres at whole numbers, as AffineBoxToWorldCoordinate and its inverse take them. A box that lies
    obliquely in the volume becomes the one around it.
    """
    n, dimensions = len(boxes), boxes.shape[1] // 2
    choices = np.array(list(np.ndindex(*(2,) * dimensions)))  # (2**d, d): the lower or upper value of each coordinate
    corners = np.where(choices[None] == 0, boxes[:, None, :dimensions], boxes[:, None, dimensions:])
    positions = np.zeros((n, len(choices), 4))
    positions[..., :dimensions], positions[..., 3] = corners, 1
    indices = (positions @ np.linalg.inv(from_volume(affine, volume)).T)[..., :3]
    return indices.min(axis=1), indices.max(axis=1)


def onto_volume(values: NDArray[Any], affine: Any, volume: Volume, *, order: int = 0) -> NDArray[Any]:
    """Return an image's values (x, y, z) or (x, y) on the volume's grid (k, r, c): nearest (order 0) or linear, zero beyond the image."""
    spatial = volume.voxels.shape[::-1][: values.ndim]
    direct = np.allclose(np.asarray(affine, dtype=np.float64), affine_of_image(volume), atol=1e-3)
    if values.shape == spatial and direct:
        turned = values
    else:
        matrix = np.linalg.inv(np.asarray(affine, dtype=np.float64)) @ affine_of_image(volume)
        n = values.ndim
        turned = ndimage.affine_transform(
            values, matrix[:n, :n], offset=matrix[:n, 3], output_shape=spatial, order=order, mode="grid-constant", cval=0
        )
    return np.ascontiguousarray(turned.T if turned.ndim == 3 else turned.T[None])
