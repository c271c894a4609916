"""Pixels must be what the header says: Hounsfield units, an image at all, black and white not exchanged."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eligible_series import CHEST_FILM_INPUT, CT_INPUT, MR_INPUT, manifest_of
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.pixels import air_is_bright, check_pixels_fit
from dicomnode.analysis.select import select
from dicomnode.analysis.volume import read_volume
from dicomnode.findings import Volume

FILMS = Path(__file__).parents[4] / "shared" / "data" / "xr"
OTHER_FILM_INPUT = CHEST_FILM_INPUT.replace('region = "chest-radiograph"', "").replace('body_parts = ["CHEST"]', "")
INPUTS = {
    name: manifest_of(keys).inputs[0]
    for name, keys in {"CT": CT_INPUT, "MR": MR_INPUT, "CR": OTHER_FILM_INPUT, "chest": CHEST_FILM_INPUT}.items()
}


def volume(voxels: NDArray[Any], modality: str) -> Volume:
    return Volume(
        voxels=voxels.astype(np.float32), affine=np.eye(4), sop_instance_uids=("2.25.1",) * len(voxels), series_instance_uid="2.25.2",
        study_instance_uid="2.25.3", frame_of_reference_uid=None if modality == "CR" else "2.25.4", modality=modality,
    )  # fmt: skip


def header(**values: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in ({"PhotometricInterpretation": "MONOCHROME2"} | values).items():
        setattr(dataset, keyword, value)
    return dataset


def body(slices: int = 6, *, size: int = 96) -> NDArray[np.float32]:
    """A cylinder of tissue with two lungs in air, HU with noise."""
    r, c = np.mgrid[:size, :size] / size - 0.5
    plane = np.where(r**2 + c**2 < 0.16, 40.0, -1000.0)
    plane[((np.abs(c) - 0.18) ** 2 + r**2) < 0.01] = -850.0
    plane[(r - 0.25) ** 2 + c**2 < 0.002] = 400.0
    return (plane + np.random.default_rng(1).normal(0, 15, (slices, size, size))).astype(np.float32)


def hand(*, polarity: int = 1, size: int = 256) -> NDArray[np.float32]:
    """A projection of a thick disc with a bone in air, bone bright: its air lies at the border."""
    r, c = np.mgrid[:size, :size] / size - 0.5
    thickness = np.sqrt(np.clip(0.12 - (r**2 + c**2), 0, None)) + 0.4 * np.exp(-((c / 0.05) ** 2)) * (np.abs(r) < 0.25)
    image = 3000 * thickness + np.random.default_rng(2).normal(0, 4, r.shape)
    return (polarity * image).astype(np.float32)[None]


@pytest.mark.parametrize(
    ("code", "name", "voxels"),
    [
        ("empty-image", "CT", np.full((4, 32, 32), -1000.0)),
        ("empty-image", "MR", np.zeros((4, 32, 32))),
        ("empty-image", "CR", np.full((1, 64, 64), 4095.0)),
        ("not-hu", "CT", body() + 1024),  # no intercept
        ("not-hu", "CT", body() / 1000 + 1),  # densities
        ("not-hu", "CT", body() * 16),
        ("saturated", "MR", np.minimum(body() + 1000, 90)[:, 20:76, 20:76]),
        ("saturated", "CR", np.where(hand() < 1500, 1500, hand())),
        ("polarity", "CR", hand(polarity=-1)),
    ],
)  # fmt: skip
def test_pixels_that_are_not_what_the_header_says_are_refused(code: str, name: str, voxels: NDArray[Any]) -> None:
    with pytest.raises(NotEligible) as caught:
        check_pixels_fit(INPUTS[name], volume(voxels, name), header())
    assert caught.value.code == code
    assert caught.value.reason.endswith(".")


@pytest.mark.parametrize(
    ("name", "voxels"),
    [
        ("CT", body()),
        ("CT", np.clip(body(), -200, None)[:, 20:76, 20:76]),  # a head or limb that fills the image
        ("CT", np.where(body() > 300, 300, -1000)),  # a small thing in air
        ("CT", np.where(body() < -900, -3024, body())),  # padding that no attribute names
        ("MR", np.abs(body() + 1000)),
        ("CR", hand()),
        ("chest", hand(polarity=-1)),  # a network judges a chest
    ],
)  # fmt: skip
def test_pixels_that_are_what_the_header_says_are_not_refused(name: str, voxels: NDArray[Any]) -> None:
    check_pixels_fit(INPUTS[name], volume(voxels, "CR" if name == "chest" else name), header())


@pytest.mark.parametrize(("photometric", "shape"), [("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")])
def test_a_header_that_contradicts_itself_about_white_is_refused(photometric: str, shape: str) -> None:
    with pytest.raises(NotEligible) as caught:
        check_pixels_fit(INPUTS["CR"], volume(hand(), "CR"), header(PhotometricInterpretation=photometric, PresentationLUTShape=shape))
    assert caught.value.code == "polarity"


def test_a_collimated_film_is_no_false_polarity() -> None:
    film = hand()[0]
    film[:60], film[-60:], film[:, :70], film[:, -70:] = 1500, 1500, 1500, 1500  # lead is white
    assert not air_is_bright(film)
    assert not air_is_bright(-film)  # and where its inside tells nothing, nothing is said


@pytest.mark.realdata
@pytest.mark.skipif(not FILMS.is_dir(), reason="../shared/data/xr is absent")
@pytest.mark.parametrize("name", ["RG1_J2KI.dcm", "gdcm-CR-MONO1-10-chest.dcm"])
def test_true_monochrome1_chests_are_accepted_by_header_and_histogram(name: str) -> None:
    manifest = manifest_of(CHEST_FILM_INPUT)
    selection = select(manifest, read_headers([FILMS / name]))
    film = read_volume(selection.series[0])
    for accepts in (manifest.inputs[0], INPUTS["CR"]):
        check_pixels_fit(accepts, film, selection.series[0].frames[0].header)


@pytest.mark.realdata
@pytest.mark.skipif(not FILMS.is_dir(), reason="../shared/data/xr is absent")
@pytest.mark.parametrize(
    ("name", "code"), [("MG1_J2KI.dcm", "body-part"), ("CR-ModalitySequenceLUT.dcm", "body-part"), ("highdicom_dx_image.dcm", "not-human")]
)
def test_films_that_are_no_chest_are_refused_by_what_their_header_says(name: str, code: str) -> None:
    manifest = manifest_of(CHEST_FILM_INPUT + "body_part_may_be_absent = false\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's: a UID of the panorama is none
        headers = read_headers([FILMS / name])
    with pytest.raises(NotEligible) as caught:
        select(manifest, headers)
    assert caught.value.code == code
