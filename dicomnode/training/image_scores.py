"""Fit the rule by which a package scores whole images, on validation phantoms alone; the result is written into its recipe by hand.

Of a few thresholds for pixels the one with the largest area under the ROC curve is taken, the first of equals. The calibration is a
logistic regression on the logarithm of the share, as many images with as without. The image is positive above the probability that a
tenth of the images without anything reach. Must never see a test phantom or a real image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from scipy import optimize

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.image_score import marked_share
from dicomnode.analysis.inference import OwnModel, load_model
from dicomnode.analysis.manifest import ImageScoreSection
from dicomnode.analysis.package import load_package
from dicomnode.errors import UsageError
from dicomnode.training.evaluation.measures import auc
from dicomnode.training.unseen_phantoms import VALIDATION_SEED, unseen_phantoms

ABOVE = (0.5, 0.6, 0.7, 0.8, 0.9)
FLOOR = 1e-3
FALSE_SHARE = 0.1  # of images without anything that may be called positive
RIDGE = 1e-3  # keeps the slope finite where the two kinds don't overlap

Floats = NDArray[np.float64]


def fit_image_score(package_folder: Path, *, scans: int = 60, device: str = "auto") -> ImageScoreSection:
    """Return the rule for the first output of a package, from so many validation phantoms.

    Raises:
        UsageError: the package doesn't run by its manifest's own pipeline.
    """
    package = load_package(package_folder)
    model = load_model(package_folder, digest=package.digest, device=device)
    if not isinstance(model, OwnModel):
        raise UsageError(f"the package {package.manifest.name} isn't run by its manifest's own pipeline: it has no map of probabilities")
    label = package.manifest.outputs[0].label
    shares: list[list[float]] = []
    positive: list[bool] = []
    for _, read in track(list(unseen_phantoms(package.manifest, first_seed=VALIDATION_SEED, scans=scans)), description="validation"):
        case = read()
        try:
            prepared, maps = model.maps(case.volumes)
        except NotEligible:
            continue
        values = maps[0].cpu().numpy()
        shares.append([marked_share(values, prepared.region, above) for above in ABOVE])
        positive.append(case.positive[label])
    return fitted(np.asarray(shares), np.asarray(positive))


def fitted(shares: Floats, positive: NDArray[np.bool_]) -> ImageScoreSection:
    """Return the rule from the shares (images, ABOVE) above each threshold for pixels, and which images show something."""
    areas = []
    for column in shares.T:
        area = auc(column[positive].tolist(), column[~positive].tolist())
        areas.append(area[0] if area else 0.0)
    best = int(np.argmax(areas))
    logarithm = np.log(shares[:, best] + FLOOR)
    sign = np.where(positive, 1.0, -1.0)

    def loss(parameters: Floats) -> float:
        intercept, slope = parameters
        return float(np.logaddexp(0, -sign * (intercept + slope * logarithm)).mean() + RIDGE * slope**2)

    intercept, slope = (round(float(value), 3) for value in optimize.minimize(loss, np.array([0.0, 1.0])).x)
    clear = np.sort(1 / (1 + np.exp(-(intercept + slope * logarithm[~positive]))))
    allowed = int(FALSE_SHARE * len(clear))
    threshold = np.ceil(100 * clear[len(clear) - 1 - allowed]) / 100
    return ImageScoreSection(above=ABOVE[best], floor=FLOOR, intercept=intercept, slope=slope, threshold=float(threshold))
