"""Training volumes of gliomas: what is drawn from few patients, and that it is the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from dicomnode.errors import UsageError
from dicomnode.findings import Volume
from dicomnode.phantoms.head import CONTRASTS, head_scene, receive, render_head, signal
from dicomnode.phantoms.shapes import Grid
from dicomnode.training.dataset import DataSet, write_case, write_dataset
from dicomnode.training.gliomas import CHANNELS, LABELS, Patient, phantom_patient, read_patients, rendered
from dicomnode.training.recipe import Gliomas, load_recipe

RECIPE = Path(__file__).parents[3] / "dicomnode" / "training" / "recipes" / "brain-tumour-mr.toml"
PATCH = (40, 48, 40)


def section(**changed: object) -> Gliomas:
    drawn = {"kind": "mr-gliomas", "spacing_mm": (4.0, 4.0, 4.0), "patch": PATCH, "own": 1.0, "transplants": (0, 1, 0), "without_t1c": 0.0}
    return Gliomas.model_validate({**drawn, **changed})


def draw(patient: Patient, seed: int, **changed: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return rendered([patient], [patient], section(**changed), np.random.default_rng(seed))


@pytest.fixture(scope="module")
def patient() -> Patient:
    return phantom_patient(5, 0)


def test_a_drawn_volume_shows_the_tumour_bright_and_its_core_inside_of_it(patient: Patient) -> None:
    image, truth, region = draw(patient, 1)
    assert image.shape == truth.shape == region.shape == (2, *PATCH)
    assert bool(((truth == 0) | (truth == 1)).all())
    assert not bool((truth[1] > truth[0]).any())
    assert float(truth[0].sum()) > 50
    brain = image[0] != 0
    assert abs(float(image[0][brain].median())) < 0.1
    assert float(image[0][truth[0] > 0].median()) > 1.0
    again = draw(patient, 1)
    assert all(torch.equal(first, second) for first, second in zip((image, truth, region), again, strict=True))
    assert not torch.equal(image, draw(patient, 2)[0])


def test_a_healed_brain_has_no_tumour_and_a_transplant_brings_one(patient: Patient) -> None:
    for seed in range(3):
        assert float(draw(patient, seed, own=0.0, transplants=(1, 0, 0))[1].sum()) == 0
    volumes = [float(draw(patient, seed, own=0.0)[1][0].sum()) for seed in range(6)]
    assert sum(volume > 10 for volume in volumes) >= 5
    assert len(set(volumes)) == 6


def test_without_t1c_its_channel_is_zero_and_the_core_counts_nowhere(patient: Patient) -> None:
    image, _, region = draw(patient, 3, without_t1c=1.0)
    assert float(image[1].abs().max()) == float(region[1].max()) == 0
    assert float(image[0].abs().max()) > 0
    assert float(region[0].max()) == 1


def write_patients(folder: Path, count: int, *, labels: tuple[str, ...] = LABELS) -> DataSet:
    """Heads with a glioma as a data set, 4 mm."""
    grid = Grid(origin_lps_mm=(-100.0, -126.0, -126.0), spacing_mm=(4.0, 4.0, 4.0), shape=(57, 62, 50))
    rows = []
    for number in range(count):
        shares, _ = render_head(head_scene(number, glioma_mm=60.0), grid)
        rng = np.random.default_rng(number)
        volumes = {}
        for channel in CHANNELS:
            voxels = np.round(1000 * receive(signal(shares, CONTRASTS[channel]), rng, bias=0.1)).astype(np.int16)
            volumes[channel] = Volume(
                voxels=voxels, affine=grid.affine, sop_instance_uids=tuple(f"{number}.{channel}.{k}" for k in range(len(voxels))),
                series_instance_uid=f"{number}.{channel}", study_instance_uid=f"{number}",
                frame_of_reference_uid=f"{number}", modality="MR",
            )  # fmt: skip
        truth = np.stack([shares["oedema"] + shares["rim"] + shares["necrosis"], shares["rim"]]) > 0.5
        row = {"case": f"head-{number}", "patient": f"p{number}", "study": f"s{number}", "split": "train", "source": "phantom"}
        rows.append(write_case(folder, row, volumes, truth, dict.fromkeys(labels, "present")))
    return write_dataset(
        DataSet(
            folder=folder, name="heads", modality="MR", channels=CHANNELS, labels=labels, terms="none", seed=0, cases=tuple(rows)
        )
    )  # fmt: skip


def test_patients_are_read_from_a_data_set_and_healed(tmp_path: Path) -> None:
    write_patients(tmp_path, 1)
    (patient,) = read_patients(tmp_path)
    assert patient.step_mm == 1.0
    tumour = patient.own[3] > 0.5
    assert float(tumour.sum()) / 1000 == pytest.approx(60**3 * np.pi / 6 / 1000, rel=0.7)  # ml; its shape is drawn
    image, healed = patient.own[0], patient.healed[0]
    assert float(image[tumour].median()) > 2.0
    assert float(healed[tumour].median()) < 1.0
    near = torch.from_numpy(ndimage.maximum_filter(patient.own[3].numpy(), size=41) > 0)
    far = (patient.own[2] > 0.9) & ~near
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
