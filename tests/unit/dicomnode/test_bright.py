"""Which intensity an enhancing core must exceed, and on whom that is fitted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_heads import write_patients
from small_bundle import volume_of

from dicomnode.analysis.bright import brighten, cut_of, without_orphans
from dicomnode.analysis.components import placed
from dicomnode.analysis.manifest import BrightSection
from dicomnode.findings import Segment
from dicomnode.training.core_cut import with_fitted_cut
from dicomnode.training.recipe import Gliomas, Recipe, load_recipe

RECIPE = Path(__file__).parents[3] / "dicomnode" / "training" / "recipes" / "brain-tumour-mr.toml"


def bright(**changed: float) -> BrightSection:
    return BrightSection.model_validate({"within": "Glioma", "input": "t1c", "above": 0.6, **changed})


def test_the_cut_lies_a_share_of_the_way_from_the_median_to_the_brightest_and_never_too_low() -> None:
    values = torch.linspace(0.0, 10.0, 1001)[torch.randperm(1001, generator=torch.Generator().manual_seed(0))]
    assert cut_of(bright(share=0.25), values) == pytest.approx(5.0 + 0.25 * (9.8 - 5.0))
    assert cut_of(bright(share=0.25), values - 10) == 0.6
    assert cut_of(bright(share=0.25), values[:0]) == 0.6
    assert cut_of(bright(), values) == 0.6


def test_a_brighter_scan_moves_the_cut_with_it() -> None:
    """The same tumour with twice the contrast has the same core."""
    values = torch.from_numpy(np.random.default_rng(1).gamma(2.0, 1.0, 5000).astype(np.float32))
    masks = [scaled > cut_of(bright(share=0.4, above=-8.0), scaled) for scaled in (values, 2 * values + 1)]
    assert torch.equal(masks[0], masks[1])


def fitted(recipe: Recipe, folder: Path, *leave_out: str) -> float | None:
    assert isinstance(recipe.data, Gliomas)
    fold = recipe.model_copy(update={"data": recipe.data.model_copy(update={"leave_out": leave_out})})
    section = with_fitted_cut(fold, folder).package.outputs[1].bright
    assert section is not None
    assert section.above == 0.6  # stays as it is
    return section.share


def test_the_share_is_fitted_without_the_patient_who_is_left_out(tmp_path: Path) -> None:
    """The first one's core is labelled as half of his glioma, the second one's as a twentieth."""
    recipe = load_recipe(RECIPE)
    write_patients(tmp_path, 2, cores=(0.5, 0.95))
    assert fitted(recipe, tmp_path, "head-0") == 0.5
    assert fitted(recipe, tmp_path, "head-1") == 0.2


def test_what_is_no_sure_glioma_has_no_core_however_bright_it_is() -> None:
    manifest = load_recipe(RECIPE).package
    probabilities = torch.zeros(2, 4, 12, 12)
    probabilities[0, :, 1:5, 1:5] = 0.97
    probabilities[0, :, 7:11, 7:11] = 0.7  # marked, and too unsure to be a finding
    image = torch.full((2, 4, 12, 12), 9.0)
    image[:, :, 1:4] = -5.0  # most of the sure one is dark: the rest is bright beside it
    brighten(manifest, probabilities, image)
    assert bool((probabilities[1, :, 4:5, 1:5] > 0.75).all())
    assert float(probabilities[1, :, 6:, 6:].max()) == 0.0


def test_without_a_glioma_there_is_no_core_and_without_a_core_there_may_be_a_glioma() -> None:
    manifest = load_recipe(RECIPE).package
    volume = volume_of(np.zeros((2, 4, 4), dtype=np.float32), np.diag([4.0, 2.0, 2.0, 1.0])[[2, 1, 0, 3]])
    spot = Segment(mask=np.ones((1, 2, 2), dtype=np.bool_), origin=(0, 0, 0))
    glioma, core = (placed(output, spot, 0.95, None, volume) for output in manifest.outputs)
    assert without_orphans([core], manifest) == []
    assert without_orphans([glioma], manifest) == [glioma]
    assert without_orphans([core, glioma], manifest) == [core, glioma]
