"""The package chest-xray: what it says of a phantom's film, and of the real films that were looked at while it was made."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.inference import Model, load_model
from dicomnode.analysis.package import load_package
from dicomnode.analysis.select import select
from dicomnode.analysis.volume import read_volume
from dicomnode.findings import Findings, Volume
from dicomnode.phantoms.studies import check_volume
from dicomnode.training.recipe import load_recipe

DICOMNODE = Path(__file__).parents[3] / "dicomnode"
PACKAGE = DICOMNODE / "packages" / "chest-xray" / "0.1.0"
RECIPE = DICOMNODE / "training" / "recipes" / "chest-xray.toml"
REAL = Path(__file__).parents[4] / "shared" / "data" / "xr"


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(PACKAGE, digest=load_package(PACKAGE).digest, device="cpu")


def film_of(model: Model, name: str, folder: Path) -> Volume:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent: real images are not part of the project")
    shutil.copy(REAL / name, folder / "film.dcm")  # its name says nothing
    return read_volume(select(model.manifest, read_headers([folder / "film.dcm"])).series[0])


def said_of(model: Model, name: str, folder: Path) -> Findings:
    return model({"image": film_of(model, name, folder)})


def test_the_package_is_what_its_recipe_says() -> None:
    assert load_package(PACKAGE).manifest == load_recipe(RECIPE).package


def test_a_phantom_s_film_with_two_opacities_is_positive_and_has_boxes(model: Model) -> None:
    findings = model({"image": check_volume(projection=True)})
    (score,) = findings.scores
    assert score.positive
    assert findings.findings
    assert {finding.shape for finding in findings.findings} == {"box"}
    assert all(finding.site is not None and finding.site.value == "39607008" for finding in findings.findings)


@pytest.mark.realdata
def test_a_real_film_with_many_opacities_is_positive_and_its_boxes_lie_in_both_lungs(model: Model, tmp_path: Path) -> None:
    findings = said_of(model, "RG1_J2KI.dcm", tmp_path)
    assert findings.scores[0].positive
    assert {finding.side for finding in findings.findings} >= {"left", "right"}


@pytest.mark.realdata
def test_a_real_film_that_looks_normal_is_negative_with_a_number(model: Model, tmp_path: Path) -> None:
    findings = said_of(model, "gdcm-CR-MONO1-10-chest.dcm", tmp_path)
    assert not findings.scores[0].positive
    assert 0 < findings.scores[0].probability < findings.scores[0].threshold
    assert findings.findings == ()


@pytest.mark.realdata
def test_a_real_film_of_false_polarity_is_refused(model: Model, tmp_path: Path) -> None:
    film = film_of(model, "RG1_J2KI.dcm", tmp_path)
    with pytest.raises(NotEligible) as caught:
        model({"image": replace(film, voxels=film.voxels.max() - film.voxels)})
    assert caught.value.code == "polarity"


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # the panorama has such a UID
@pytest.mark.parametrize(
    ("name", "code"),
    [("MG1_J2KI.dcm", "body-part"), ("CR-ModalitySequenceLUT.dcm", "no-chest"), ("highdicom_dx_image.dcm", "not-human")],
    ids=["mammogram", "teeth", "dog"],
)
def test_what_is_no_human_chest_is_refused_with_its_reason(name: str, code: str, model: Model, tmp_path: Path) -> None:
    with pytest.raises(NotEligible) as caught:
        said_of(model, name, tmp_path)
    assert caught.value.code == code
