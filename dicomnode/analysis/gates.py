"""The networks that come with the node as gates: what an image shows, whichever package asks.

They run as the packages `lung-field-xr` and `brain-mr` do, on the CPU in single precision, so a gate's answer depends on the node's
version alone. Must never look at a header.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.analysis.networks import build_network, load_weights
from dicomnode.analysis.package import NETWORK_CONFIG, package_files

PACKAGES = Path(__file__).parents[1] / "packages"
LUNG_FIELDS, BRAIN = PACKAGES / "lung-field-xr" / "0.1.0", PACKAGES / "brain-mr" / "0.1.0"


def probabilities(package: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what the package's network says of (n, rows, columns) or (n, slices, rows, columns) scaled images: (n, outputs, ...).

    The images have the size of the package's window.
    """
    contents = {name: path.read_bytes() for name, path in package_files(package).items()}
    network = build_network(contents[NETWORK_CONFIG], package.parent.name)
    load_weights(network, contents, package.parent.name)
    network.eval()
    with torch.inference_mode():
        answer: NDArray[np.float32] = torch.sigmoid(network(torch.from_numpy(np.ascontiguousarray(images))[:, None])).numpy()
    return answer


def fitted(image: NDArray[np.float32], shape: tuple[int, ...]) -> tuple[NDArray[np.float32], tuple[slice, ...]]:
    """Return the image in the middle of zeros of `shape`, or its middle where it is larger, and where in the result it lies."""
    result = np.zeros(shape, dtype=np.float32)
    there, here = [], []
    for size, wanted in zip(image.shape, shape, strict=True):
        count = min(size, wanted)
        there.append(slice((wanted - count) // 2, (wanted - count) // 2 + count))
        here.append(slice((size - count) // 2, (size - count) // 2 + count))
    result[tuple(there)] = image[tuple(here)]
    return result, tuple(there)


def scaled(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """1st and 99th percentile to 0..1, clipped: what the packages ask for as intensity percentiles."""
    low, high = np.percentile(image, (1, 99))
    return np.asarray(np.clip((image - low) / (float(high - low) or 1.0), 0, 1), dtype=np.float32)
