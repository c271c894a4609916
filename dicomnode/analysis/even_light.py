"""An organ's light made even: what changes slowly across it is the coil's and not the organ's.

A polynomial of place, fitted so that what differs much (a tumour, fluid) hardly counts (P. J. Huber, Robust Statistics, 1981).
"""

from __future__ import annotations

from itertools import product

import torch

DEGREE = 3
SAMPLES = 20_000  # voxels that are looked at
ROUNDS = 8  # of fitting, each with the weights that the last one gave
FAR = 3.0  # deviations from the fit: what is further away has no weight


def evened(image: torch.Tensor, organ: torch.Tensor | None) -> torch.Tensor:
    """The image (k, r, c) without the slow changes of its values within `organ`, a mask of its shape, whose mean stays; None: as it is."""
    if organ is None or not bool(organ.any()):
        return image
    size = torch.tensor(image.shape, dtype=torch.float32, device=image.device)
    terms = _terms(2 * organ.nonzero().float() / (size - 1).clamp(min=1) - 1)
    values = image[organ].float()
    step = max(1, len(values) // SAMPLES)
    seen, sampled = terms[::step], values[::step]
    weights = torch.ones_like(sampled)
    for _ in range(ROUNDS):
        fit = torch.linalg.lstsq(seen * weights[:, None], (sampled * weights)[:, None]).solution[:, 0]
        apart = (sampled - seen @ fit).abs()
        deviation = 1.4826 * apart.median().clamp(min=1e-6)
        weights = (1 - (apart / (FAR * deviation)) ** 2).clamp(min=0)  # the root of Tukey's biweight
    slow = terms @ fit
    even = image.clone()
    even[organ] = values - (slow - slow.mean())
    return even


def _terms(places: torch.Tensor) -> torch.Tensor:
    """(n, terms) of places (n, 3) between -1 and 1."""
    powers = [power for power in product(range(DEGREE + 1), repeat=3) if sum(power) <= DEGREE]
    return torch.stack([places[:, 0] ** k * places[:, 1] ** r * places[:, 2] ** c for k, r, c in powers], dim=1)
