"""Measures of an evaluation against truths worked out by hand, or by another implementation."""

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from numpy.typing import NDArray
from scipy import stats

from dicomnode.training.evaluation import measures


def ball(
    shape: tuple[int, int, int], centre: tuple[float, float, float], radius_mm: float, spacing_mm: tuple[float, float, float]
) -> NDArray[np.bool_]:
    places = np.indices(shape).transpose(1, 2, 3, 0) * np.array(spacing_mm)
    return np.asarray(np.linalg.norm(places - np.array(centre), axis=-1) <= radius_mm)


SPACING = (2.0, 1.0, 1.0)
SHAPE = (24, 44, 44)


def test_two_spheres_have_the_dice_and_the_distances_of_their_geometry() -> None:
    # same centre, radii 15 and 12 mm: Dice 2 * 12^3 / (12^3 + 15^3), every surface 3 mm from the other, within a voxel
    large, small = (ball(SHAPE, (23.0, 21.5, 21.5), radius, SPACING) for radius in (15.0, 12.0))
    assert measures.dice(small, large) == pytest.approx(2 * 12**3 / (12**3 + 15**3), abs=0.02)
    distances = measures.surface_distances(small, large, SPACING)
    assert distances is not None
    assert distances[0] == pytest.approx(3.0, abs=1.0)
    assert distances[1] == pytest.approx(3.0, abs=0.5)


def test_a_shift_across_the_slices_is_measured_in_millimetres() -> None:
    # a slab moved by two slices of 2 mm: each voxel of one end face is 4 mm from the other slab
    first = np.zeros(SHAPE, dtype=np.bool_)
    first[4:14, 10:34, 10:34] = True
    second = np.roll(first, 2, axis=0)
    distances = measures.surface_distances(first, second, SPACING)
    assert distances is not None
    assert distances[0] == pytest.approx(4.0)
    assert measures.dice(first, second) == pytest.approx(0.8)  # 8 of 10 slices in common


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy")  # MONAI's own call
@pytest.mark.parametrize("flat", [False, True])
def test_distances_are_those_of_monai(flat: bool) -> None:
    rng = np.random.default_rng(3)
    first, second = (ball(SHAPE, tuple(rng.uniform(18, 26, 3)), rng.uniform(8, 14), SPACING) for _ in range(2))
    if flat:
        first, second = first[11:12], second[11:12]
    found = measures.surface_distances(first, second, SPACING)
    masks = [torch.from_numpy(mask[0] if flat else mask)[None, None] for mask in (first, second)]
    spacing = SPACING[1:] if flat else SPACING
    hausdorff = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=spacing)
    average = compute_average_surface_distance(*masks, include_background=True, symmetric=True, spacing=spacing)
    assert found == pytest.approx((float(hausdorff), float(average)), abs=1e-4)


def test_a_film_is_measured_in_its_plane() -> None:
    first = np.zeros((1, 40, 40), dtype=np.bool_)
    first[0, 5:20, 5:20] = True
    distances = measures.surface_distances(first, np.roll(first, 5, axis=2), (1.0, 0.4, 0.4))
    assert distances is not None
    assert distances[0] == pytest.approx(2.0)


def test_what_is_empty_has_no_distance_and_an_empty_reference_no_dice() -> None:
    empty, full = np.zeros(SHAPE, dtype=np.bool_), np.ones(SHAPE, dtype=np.bool_)
    assert measures.dice(empty, empty) is None
    assert measures.dice(full, empty) is None
    assert measures.dice(empty, full) == 0
    for pair in ((empty, empty), (empty, full), (full, empty)):
        assert measures.surface_distances(*pair, SPACING) is None


def test_wilson_s_interval_is_that_of_the_books() -> None:
    interval = measures.wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert interval == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert measures.wilson(0, 0) is None


def test_a_froc_of_a_constructed_list() -> None:
    # 8 scans, 4 lesions: one never met; false findings at 0.9, 0.7, 0.3
    known, false = [0.95, 0.8, 0.5, None], [0.9, 0.7, 0.3]
    # at most 1 false finding (1/8): score above 0.7 finds two; at most 2 (1/4): above 0.3 finds three; more never helps
    assert measures.sensitivities(known, false, 8) == [0.5, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75]
    assert measures.froc_curve(known, false, 8) == [
        (0.95, 0.0, 0.25), (0.9, 0.125, 0.25), (0.8, 0.125, 0.5), (0.7, 0.25, 0.5), (0.5, 0.25, 0.75), (0.3, 0.375, 0.75),
    ]  # fmt: skip
    assert measures.sensitivities([], false, 8) is None


def test_equal_scores_of_lesion_and_false_finding_don_t_count_as_found_before_it() -> None:
    # with one scan not a single false finding is allowed below 1 a scan
    assert measures.sensitivities([0.5], [0.5], 1) == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


def test_the_area_under_the_curve_and_delong_s_interval_agree_with_the_textbook_formula() -> None:
    positive, negative = [0.9, 0.8, 0.6, 0.35], [0.7, 0.4, 0.3, 0.2, 0.1]
    found = measures.auc(positive, negative)
    assert found is not None
    area, interval, method = found
    assert area == pytest.approx(17 / 20)  # of 20 pairs three are in the wrong order: 0.6 < 0.7, 0.35 < 0.7, 0.35 < 0.4
    # components: positives 1, 1, 4/5, 3/5; negatives 2/4, 3/4, 1, 1, 1
    variance = np.var([1, 1, 0.8, 0.6], ddof=1) / 4 + np.var([0.5, 0.75, 1, 1, 1], ddof=1) / 5
    half = stats.norm.ppf(0.975) * np.sqrt(variance) / (area * (1 - area))
    logit = np.log(area / (1 - area))
    assert interval == pytest.approx((stats.logistic.cdf(logit - half), stats.logistic.cdf(logit + half)))
    assert method.startswith("DeLong")
    assert measures.auc(positive, []) is None


def test_delong_s_interval_covers_the_true_area_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    true = stats.norm.cdf(1 / np.sqrt(2))
    covered = 0
    for _ in range(300):
        found = measures.auc(list(rng.normal(1, 1, 30)), list(rng.normal(0, 1, 40)))
        assert found is not None
        covered += found[1][0] <= true <= found[1][1]
    assert 0.91 <= covered / 300 <= 0.985


def test_a_perfect_order_of_few_is_no_certainty() -> None:
    found = measures.auc([0.9, 0.8, 0.7], [0.1, 0.2, 0.3])
    assert found is not None
    area, (low, high), method = found
    assert (area, high) == (1.0, 1.0)
    assert 0.3 < low < 0.75
    assert method.startswith("Newcombe")
    worst = measures.auc([0.1, 0.2, 0.3], [0.9, 0.8, 0.7])
    assert worst is not None
    assert worst[1] == pytest.approx((0.0, 1 - low), abs=1e-6)


def test_calibration_by_hand() -> None:
    # bin 0.2..0.3: two scores of 0.25, one true; last bin: 0.95 and 1.0, both true
    found = measures.calibration([0.25, 0.25, 0.95, 1.0], [True, False, True, True])
    assert found is not None
    assert [(row["n"], row["mean_score"], row["observed"]) for row in found["bins"]] == [(2, 0.25, 0.5), (2, 0.975, 1.0)]
    assert found["expected_calibration_error"] == pytest.approx((2 * 0.25 + 2 * 0.025) / 4)
    assert found["brier"] == pytest.approx((0.75**2 + 0.25**2 + 0.05**2 + 0) / 4)
    assert measures.calibration([], []) is None


def test_a_bootstrap_is_the_same_each_time_and_draws_patients_whole() -> None:
    values = [0.7, 0.8, 0.9, 0.6, 0.95, 0.85]
    alone = measures.spread(values, list("abcdef"))
    assert alone is not None
    assert alone == measures.spread(values, list("abcdef"))
    low, high = alone["mean_interval"]
    assert low < alone["mean"] < high
    error = np.std(values, ddof=0) / np.sqrt(6)  # of the mean, as the bootstrap sees it
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    pairs = measures.spread([*values, *values], list("abcdefabcdef"))  # two scans of each patient say no more than one
    assert pairs is not None
    assert pairs["mean_interval"] == pytest.approx(alone["mean_interval"])
    assert measures.spread(values, list("aabbbb"))["mean_interval"] is None  # type: ignore[index]  # two patients alone
    assert measures.spread([], []) is None
