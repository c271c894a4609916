"""Training volumes of gliomas: what is drawn from few patients, and that it is the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_heads import write_patients
from scipy import ndimage

from dicomnode.errors import UsageError
from dicomnode.training.glioma_heads import SyntheticHead, SyntheticHeads, synthetic_head
from dicomnode.training.glioma_patients import CHANNELS, LABELS, Patient, read_patients, smoothed
from dicomnode.training.gliomas import rendered
from dicomnode.training.recipe import Gliomas, load_recipe

RECIPE = Path(__file__).parents[3] / "dicomnode" / "training" / "recipes" / "brain-tumour-mr.toml"
PATCH = (40, 48, 40)


def section(**changed: object) -> Gliomas:
    drawn = {"kind": "mr-gliomas", "spacing_mm": (4.0, 4.0, 4.0), "patch": PATCH, "own": 1.0, "transplants": (0, 1, 0), "without_t1c": 0.0}
    return Gliomas.model_validate({**drawn, **changed})


def draw(head: SyntheticHead, seed: int, *, with_glioma: bool = True, **changed: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return rendered(head.imaged(rng, with_glioma=with_glioma), (), section(**changed), rng)


@pytest.fixture(scope="module")
def head() -> SyntheticHead:
    return synthetic_head(5, 0)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    folder = tmp_path_factory.mktemp("patients")
    write_patients(folder, 1)
    return read_patients(folder)[0]


def test_a_drawn_volume_shows_the_tumour_bright_and_its_core_inside_of_it(head: SyntheticHead) -> None:
    image, truth, region = draw(head, 1)
    assert image.shape == truth.shape == region.shape == (2, *PATCH)
    assert bool(((truth == 0) | (truth == 1)).all())
    assert not bool((truth[1] > truth[0]).any())
    assert float(truth[0].sum()) > 50
    brain = image[0] != 0
    assert abs(float(image[0][brain].median())) < 0.1
    assert float(image[0][truth[0] > 0].median()) > 1.0
    again = draw(head, 1)
    assert all(torch.equal(first, second) for first, second in zip((image, truth, region), again, strict=True))
    assert not torch.equal(image, draw(head, 2)[0])


def test_a_synthetic_head_is_drawn_without_its_glioma_too_and_elsewhere_it_is_the_same(head: SyntheticHead) -> None:
    ill, sound = (head.imaged(np.random.default_rng(7), with_glioma=with_glioma) for with_glioma in (True, False))
    assert float(sound.truth.max()) == 0
    assert float(ill.truth[0].sum()) * 8 / 1000 > 3  # ml
    apart = (ill.truth[0] == 0) & (ill.outline[0] > 0.5)
    difference = (ill.image[0] - sound.image[0]).abs()
    assert float(difference[ill.truth[0] > 0.9].median()) > 4 * float(difference[apart].median())
    assert SyntheticHeads(seed=5, count=1)[0].name == head.name


def test_a_healed_brain_has_no_tumour_and_a_transplant_brings_one(patient: Patient) -> None:
    def drawn(seed: int, donors: int) -> torch.Tensor:
        return rendered(patient.healed, [patient] * donors, section(), np.random.default_rng(seed))[1]

    assert all(float(drawn(seed, 0).sum()) == 0 for seed in range(3))
    volumes = [float(drawn(seed, 1)[0].sum()) for seed in range(6)]
    assert sum(volume > 10 for volume in volumes) >= 5
    assert len(set(volumes)) == 6


def test_what_lies_around_a_brain_with_its_skull_is_seen_and_is_no_tumour(patient: Patient) -> None:
    bare, shelled = (rendered(patient.own, (), section(shells=shells), np.random.default_rng(4)) for shells in (0.0, 1.0))
    assert int((shelled[0][0] != 0).sum()) > 1.1 * int((bare[0][0] != 0).sum())
    assert float(shelled[1][0].sum()) == pytest.approx(float(bare[1][0].sum()), rel=0.02)


def test_without_t1c_its_channel_is_zero_and_the_core_counts_nowhere(head: SyntheticHead) -> None:
    image, _, region = draw(head, 3, without_t1c=1.0)
    assert float(image[1].abs().max()) == float(region[1].max()) == 0
    assert float(image[0].abs().max()) > 0
    assert float(region[0].max()) == 1


def test_smoothing_keeps_what_there_is_and_spreads_it_to_the_neighbours() -> None:
    point = torch.zeros(1, 5, 5, 5)
    point[0, 2, 2, 2] = 64.0
    spread = smoothed(point)
    assert (float(spread[0, 2, 2, 2]), float(spread[0, 1, 2, 2]), float(spread[0, 1, 1, 1]), float(spread.sum())) == (8.0, 4.0, 1.0, 64.0)


def test_patients_are_read_from_a_data_set_and_healed(tmp_path: Path) -> None:
    write_patients(tmp_path, 1)
    (patient,) = read_patients(tmp_path)
    assert patient.own.step_mm == patient.healed.step_mm == 1.0
    tumour = patient.own.truth[0] > 0.5
    assert float(tumour.sum()) / 1000 == pytest.approx(60**3 * np.pi / 6 / 1000, rel=0.7)  # ml; its shape is drawn
    image, healed = patient.own.image[0], patient.healed.image[0]
    assert float(image[tumour].median()) > 2.0
    assert float(healed[tumour].median()) < 1.0
    near = torch.from_numpy(ndimage.maximum_filter(patient.own.truth[0].numpy(), size=41) > 0)
    far = (patient.own.outline[0] > 0.9) & ~near
    torch.testing.assert_close(image[far], healed[far], rtol=0, atol=0.01)
    with pytest.raises(UsageError, match="holds no patient"):
        read_patients(tmp_path, leave_out=("head-0",))
    with pytest.raises(UsageError, match="no case nobody"):
        read_patients(tmp_path, leave_out=("nobody",))


def test_other_labels_than_those_of_the_package_are_refused(tmp_path: Path) -> None:
    write_patients(tmp_path, 1, labels=("Bone", "Air"))
    with pytest.raises(UsageError, match="the labels Glioma and Enhancing core"):
        read_patients(tmp_path)


def test_the_recipe_names_what_the_stream_draws() -> None:
    recipe = load_recipe(RECIPE)
    assert isinstance(recipe.data, Gliomas)
    assert tuple(accepts.name for accepts in recipe.package.inputs) == CHANNELS
    assert tuple(output.label for output in recipe.package.outputs) == LABELS
    assert recipe.package.preprocessing is not None
    assert recipe.package.preprocessing.spacing_mm == recipe.data.spacing_mm
