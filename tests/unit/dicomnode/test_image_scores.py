"""How the rule for whole films is fitted, and the films that it is fitted and measured on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dicomnode.training.image_scores import ABOVE, FALSE_SHARE, fitted
from dicomnode.training.unseen_phantoms import opacity_case


def test_the_threshold_for_pixels_that_tells_best_is_taken_and_a_tenth_of_the_clear_films_is_called_positive() -> None:
    rng = np.random.default_rng(5)
    positive = np.arange(200) % 2 == 0
    shares = rng.uniform(0, 0.05, (200, len(ABOVE)))
    shares[:, 2] += 0.03 * positive
    rule = fitted(shares, positive)
    assert rule.above == ABOVE[2]
    said = 1 / (1 + np.exp(-(rule.intercept + rule.slope * np.log(shares[:, 2] + rule.floor))))
    assert float(np.mean(said[~positive] > rule.threshold)) <= FALSE_SHARE
    assert float(np.mean(said[positive] > rule.threshold)) > 0.4
    half = 1 / (1 + math.exp(-(rule.intercept + rule.slope * math.log(0.04 + rule.floor))))
    assert 0.3 < half < 0.7  # where both kinds are about as frequent


def test_a_pair_of_films_is_of_one_chest_and_the_truth_is_where_the_opacities_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicomnode.training.opacities.STEP_MM", (5.0, 8.0, 5.0))
    shown, clear = (opacity_case(3_000_000_002, clear=without) for without in (False, True))
    assert shown.patient == clear.patient
    assert shown.name != clear.name
    assert (shown.positive, clear.positive) == ({"Lung opacity": True}, {"Lung opacity": False})
    assert clear.known == ()
    assert 1 <= len(shown.known) <= 8
    rows, columns = shown.volume.voxels.shape[1:]
    for lesion in shown.known:
        assert lesion.truth is not None
        _, row, column = lesion.truth.origin
        _, height, width = lesion.truth.mask.shape
        assert 0 <= row < row + height <= rows
        assert 0 <= column < column + width <= columns
        assert 8 <= lesion.diameter_mm <= 55
