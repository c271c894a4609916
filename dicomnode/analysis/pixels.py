"""Whether the pixels are what the header says: values that mean what they should, an image at all, black and white not exchanged.

What can be told by numbers alone; anatomy is judged where the manifest names a region (`lung`, `radiograph`). Must never decide by an
image's size, or import torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy import ndimage

from dicomnode.analysis.attributes import text_of
from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.manifest import InputSection
from dicomnode.findings import Volume

SAMPLES = 400_000  # voxels that are looked at: percentiles of so many are good to a tenth of a percent
SATURATED = 0.6  # of the pixels at one end of their range; films have up to a third there, where the beam met nothing or lead
AIR_HU = -200.0  # below: air, lung, or what lies outside the reconstructed circle
UNSCALED_TISSUE = (850.0, 1350.0)  # where tissue lies in values to which no intercept of -1024 was added
PEAK = 0.03  # of the range of values, at each end
BACKGROUND = 0.06  # of the image: less may be a lung's apex, a stomach bubble or the label of a side
WHOLE = 0.9  # of a row or column: a collimator's edge may be slightly turned
LARGEST_HU = 3100.0  # of 12 bits; only metal lies above


def check_pixels_fit(accepts: InputSection, volume: Volume, header: Dataset) -> None:
    """Compare the voxels with what the header says of them; `header` is that of the first image.

    Raises:
        NotEligible: "empty-image", "saturated", "not-hu" (CT) or "polarity" (projections; of a region that the manifest names, the
            network that finds it tells).
    """
    values = _sample(volume.voxels)
    low, high = float(volume.voxels.min()), float(volume.voxels.max())
    if not np.isfinite(low) or not np.isfinite(high) or low == high:
        raise NotEligible("empty-image", f"All pixels have the value {low:g}.")
    if volume.modality == "CT":
        _check_hounsfield(values, high - low)
    elif volume.is_projection:
        _check_range_used(values)
        _check_polarity(accepts, volume.voxels[0], header)
    else:
        share = float(np.mean(values == high))
        if share > SATURATED:
            raise NotEligible("saturated", f"{share:.0%} of the pixels have the largest value, {high:g}.")


def _sample(voxels: NDArray[np.int16] | NDArray[np.float32]) -> NDArray[np.float32]:
    flat = voxels.reshape(-1)
    step = max(1, flat.size // SAMPLES) | 1  # odd, so that no column of an image is all that is seen
    return flat[::step].astype(np.float32)


def _check_hounsfield(values: NDArray[np.float32], spread: float) -> None:
    """Raise NotEligible if the values can't be Hounsfield units: PS3.3 C.8.2.1 has water at 0 and air at -1000."""
    unscaled = _share(values, *UNSCALED_TISSUE)
    air = float(np.mean(values < AIR_HU))
    if unscaled > 0.2 and air < 0.01:
        raise NotEligible("not-hu", f"{unscaled:.0%} of the pixels lie at 850 to 1350 and none at air's value: no Hounsfield units.")
    # One value far below is padding that no attribute names; several are something else.
    beyond = float(np.mean((np.abs(values) > LARGEST_HU) & (values != values.min())))
    if beyond > 0.05:
        raise NotEligible("not-hu", f"{beyond:.0%} of the pixels lie beyond {LARGEST_HU:.0f}: no Hounsfield units.")
    if spread < 20:
        raise NotEligible("not-hu", f"The pixels lie within {spread:.1f} units of each other: no Hounsfield units of a body.")


def _share(values: NDArray[np.float32], low: float, high: float) -> float:
    return float(np.mean((values >= low) & (values <= high)))


def _check_range_used(values: NDArray[np.float32]) -> None:
    for end in (float(values.min()), float(values.max())):
        share = float(np.mean(values == end))
        if share > SATURATED:
            raise NotEligible("saturated", f"{share:.0%} of the pixels have the value {end:g}, at the border of their range.")


def _check_polarity(accepts: InputSection, pixels: NDArray[np.int16] | NDArray[np.float32], header: Dataset) -> None:
    """Compare Photometric Interpretation with the rest of the header, and where no network judges the anatomy, with the pixels."""
    photometric, shape = text_of(header, "PhotometricInterpretation"), text_of(header, "PresentationLUTShape").upper()
    if (photometric, shape) in (("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")):
        raise NotEligible("polarity", f"Photometric Interpretation is {photometric} and Presentation LUT Shape {shape}: they contradict.")
    if not accepts.region and air_is_bright(pixels):
        raise NotEligible("polarity", f"With {photometric} the air around the body is bright and the body dark: they are exchanged.")


def air_is_bright(pixels: NDArray[np.int16] | NDArray[np.float32]) -> bool:
    """Whether a projection (rows, columns), bone bright, shows its background of air bright: the sign of a false polarity.

    Where nothing lay before the detector the histogram has a peak at one end of its values, and that area lies at the border with the
    body's outline as its other side. Where a collimator shut the beam out there is a peak at the other end, and that area is whole rows
    and columns. So what counts is the border area of each end without the whole rows and columns of it.
    """
    image = _small(pixels)
    low, high = np.percentile(image, [0.2, 99.8])
    if high <= low:
        return False
    image = (image - low) / (high - low)
    bright, dark = _background(image > 1 - PEAK), _background(image < PEAK)
    return bright > BACKGROUND and dark < bright / 4


def _background(at_one_end: NDArray[np.bool_]) -> float:
    """The share of an image at one end of the values that is connected to the border, without the whole rows and columns there."""
    labels, count = ndimage.label(at_one_end)
    if count == 0:
        return 0.0
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    area = np.isin(labels, np.unique(border[border > 0]))
    rows, columns = area.mean(axis=1) > WHOLE, area.mean(axis=0) > WHOLE
    return float(area[~rows][:, ~columns].sum() / area.size)


def _small(pixels: NDArray[np.int16] | NDArray[np.float32], edge: int = 128) -> NDArray[np.float32]:
    """Return a projection in about `edge` x `edge` block means."""
    rows, columns = (max(1, size // edge) for size in pixels.shape)
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    blocks = pixels[: height * rows, : width * columns].astype(np.float32).reshape(height, rows, width, columns)
    return np.asarray(blocks.mean(axis=(1, 3)), dtype=np.float32)
