"""Chest films with opacities: ribs that are seen, opacities that add to a shadow in the lungs, and the training films made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dicomnode.phantoms.chest import ChestScene, chest_scene
from dicomnode.phantoms.opacities import (
    BODY,
    IN_LUNG,
    MASS_MM,
    SEEN,
    conspicuity,
    crowd_opacities,
    opacity_at,
    scatter_opacities,
    with_decoys,
    with_opacities,
)
from dicomnode.phantoms.radiograph import Technique, View, dressed, expose, project
from dicomnode.phantoms.shadows import Plane, Shadow
from dicomnode.training.opacities import VIEWS_AT_A_TIME, OpacityFilms
from dicomnode.training.recipe import Opacities, load_recipe

RECIPE = Path(__file__).parents[3] / "dicomnode" / "training" / "recipes" / "chest-xray.toml"
PLANE = Plane(left_mm=-60.0, top_mm=60.0, pixel_mm=1.0, shape=(121, 121))
COARSE = (5.0, 8.0, 5.0)


@pytest.fixture(scope="module")
def scene() -> ChestScene:
    return chest_scene(5)


@pytest.fixture(scope="module")
def bare(scene: ChestScene) -> Shadow:
    return project(scene, View(), pixel_mm=2.0, step_mm=COARSE, bare=True)


def test_ribs_fall_from_the_spine_to_the_front_and_differ_from_film_to_film(scene: ChestScene, bare: Shadow) -> None:
    films = [dressed(bare, scene, View(), np.random.default_rng(seed)) for seed in (1, 2)]
    lungs = bare.right | bare.left
    assert float(bare.bone_cm[lungs].max()) < 0.5  # but for the spine's border nothing is bone there
    for film in films:
        ribs = film.bone_cm - bare.bone_cm
        assert (ribs >= 0).all()
        assert 0.2 < float((ribs[lungs] > 0.05).mean()) < 0.95
        assert float(film.soft_cm.min()) >= 0
    assert np.abs(films[0].bone_cm - films[1].bone_cm).max() > 0.3


def test_a_round_opacity_has_the_path_of_a_ball_and_the_outline_of_its_body() -> None:
    rng = np.random.default_rng(3)
    opacity = opacity_at(PLANE, (5.0, -3.0), 30.0, "round", rng)
    assert opacity is not None
    whole = np.zeros(PLANE.shape, dtype=np.float32)
    whole[opacity.box] = opacity.path_cm
    volume = float(whole.sum()) / 100  # ml of water: cm of path over 1 mm pixels
    assert 0.4 < volume / (4 / 3 * np.pi * 1.5**3) < 1.3
    row, column = np.argwhere(whole == whole.max()).mean(axis=0)
    assert abs(PLANE.x[0, int(column)] - 5) < 8
    assert abs(PLANE.z[int(row), 0] + 3) < 8
    area = float(opacity.body.sum())
    assert 0.6 < area / (np.pi * 15**2) < 1.4
    assert (opacity.path_cm[opacity.body & (opacity.path_cm > 0)] > 0).all()
    assert float(opacity.path_cm[~opacity.body].max()) <= BODY * float(opacity.path_cm.max()) + 1e-6
    assert opacity_at(PLANE, (500.0, 0.0), 30.0, "round", rng) is None


def test_opacities_lie_in_the_lungs_and_make_them_brighter(bare: Shadow) -> None:
    lungs = bare.right | bare.left
    technique = Technique(photons=1e7, scatter=0.2)
    for seed in range(6):
        opacities = crowd_opacities(bare, np.random.default_rng(seed))
        assert 1 <= len(opacities) <= 10
        for opacity in opacities:
            assert float(lungs[opacity.box][opacity.body].mean()) >= IN_LUNG
        shadow = with_opacities(bare, opacities)
        added = shadow.soft_cm - bare.soft_cm
        assert float(added.sum()) == pytest.approx(sum(float(o.path_cm.sum()) for o in opacities), rel=1e-3)
        before, after = (expose(s, technique, np.random.default_rng(0)) for s in (bare, shadow))
        strongest = added > 0.7 * added.max()
        assert float((after - before)[strongest].mean()) > 0.02


def test_a_film_to_measure_on_shows_masses_and_all_of_them_stand_out(bare: Shadow) -> None:
    for seed in range(4):
        opacities = scatter_opacities(bare, np.random.default_rng(seed))
        assert 1 <= len(opacities) <= 6
        assert min(opacity.diameter_mm for opacity in opacities) >= MASS_MM
        assert min(conspicuity(bare, opacity) for opacity in opacities) >= SEEN


def test_conspicuity_is_contrast_to_what_varies_beside_it() -> None:
    opacity = opacity_at(PLANE, (0.0, 0.0), 30.0, "round", np.random.default_rng(3))
    assert opacity is not None
    lung = np.ones(PLANE.shape, dtype=np.bool_)
    varied = np.random.default_rng(1).normal(10, 1, PLANE.shape).astype(np.float32)  # cm of water, a standard deviation of 1 cm
    plain = Shadow(plane=PLANE, soft_cm=varied, bone_cm=np.zeros_like(varied), right=lung, left=np.zeros_like(lung))
    assert conspicuity(plain, opacity) == pytest.approx(float(opacity.path_cm[opacity.body].mean()), rel=0.1)
    rougher = replace(plain, soft_cm=10 + 3 * (varied - 10))
    assert conspicuity(rougher, opacity) == pytest.approx(conspicuity(plain, opacity) / 3, rel=1e-3)
    assert conspicuity(replace(plain, right=~lung), opacity) == 0


def test_decoys_change_a_film_and_no_truth(bare: Shadow) -> None:
    for seed in range(8):
        film = with_decoys(bare, np.random.default_rng(seed))
        assert np.array_equal(film.right, bare.right)
        assert np.array_equal(film.left, bare.left)
        assert float(film.soft_cm.min()) >= 0
        assert float(film.bone_cm.min()) >= 0
    assert np.abs(with_decoys(bare, np.random.default_rng(0)).soft_cm - bare.soft_cm).max() > 0.1


def test_film_i_is_always_the_same_and_its_truth_lies_in_its_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicomnode.training.opacities.STEP_MM", COARSE)
    data = Opacities(kind="chest-opacities", size_px=128, patch_px=96, positive=0.5)
    films = OpacityFilms(data, seed=4, count=100)
    numbers = [0, VIEWS_AT_A_TIME, 2 * VIEWS_AT_A_TIME, 3 * VIEWS_AT_A_TIME, 4 * VIEWS_AT_A_TIME]
    drawn = [films[number] for number in numbers]
    again = OpacityFilms(data, seed=4, count=100)[numbers[2]]
    for first, second in zip(drawn[2], again, strict=True):
        assert torch.equal(first, second)
    for image, truth, region in drawn:
        assert image.shape == truth.shape == region.shape == (1, 96, 96)
        assert -3 <= float(image.min()) < -0.5
        assert 0.5 < float(image.max()) <= 3
        assert not bool((truth.bool() & ~region.bool()).any())
        assert 0.1 < float(region.mean()) < 0.95
    positive = [bool(truth.any()) for _, truth, _ in drawn]
    assert any(positive)
    assert not all(positive)


def test_the_recipe_asks_for_such_films() -> None:
    recipe = load_recipe(RECIPE)
    assert isinstance(recipe.data, Opacities)
    assert recipe.package.preprocessing is not None
    assert recipe.package.inference is not None
    assert recipe.data.size_px == recipe.package.preprocessing.size_px
    assert recipe.package.inference.window == (1, recipe.data.patch_px, recipe.data.patch_px)
