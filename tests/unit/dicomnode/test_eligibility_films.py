"""Films that a model of the human chest must not see are refused with the right reason, by header and by pixels; real chests are not."""

import warnings
from pathlib import Path

import pytest
from eligible_series import CHEST_FILM_INPUT, Headers, manifest_of

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.manifest import Manifest
from dicomnode.analysis.pixels import check_pixels_fit
from dicomnode.analysis.radiograph import chest_radiograph_region
from dicomnode.analysis.select import select
from dicomnode.analysis.volume import read_volume

FILMS = Path(__file__).parents[4] / "shared" / "data" / "xr"
pytestmark = [pytest.mark.realdata, pytest.mark.skipif(not FILMS.is_dir(), reason="../shared/data/xr is absent")]
CHEST = manifest_of(CHEST_FILM_INPUT)
# What is left of the checks where a header says nothing, or anything.
PIXELS_ALONE = manifest_of(
    CHEST_FILM_INPUT.replace('body_parts = ["CHEST"]', "animals = true").replace('view_positions = ["PA", "AP"]', "")
)
CHESTS = ("RG1_J2KI.dcm", "gdcm-CR-MONO1-10-chest.dcm")
TRAPS = {"MG1_J2KI.dcm": "body-part", "CR-ModalitySequenceLUT.dcm": "no-chest", "highdicom_dx_image.dcm": "not-human"}


def headers_of(name: str, **values: str) -> Headers:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's: a UID of the panorama is none
        headers = read_headers([FILMS / name])
        for keyword, value in values.items():
            setattr(headers[0][1], keyword, value)
        return headers


def look(manifest: Manifest, headers: Headers) -> None:
    """Take a film the way of the pipeline, up to the network."""
    series = select(manifest, headers).series[0]
    film = read_volume(series)
    check_pixels_fit(manifest.inputs[0], film, series.frames[0].header)
    chest_radiograph_region(film.voxels.astype("float32"), film.spacing_mm)


@pytest.mark.parametrize("name", CHESTS)
def test_a_chest_in_true_monochrome1_is_accepted(name: str) -> None:
    look(CHEST, headers_of(name))
    look(PIXELS_ALONE, headers_of(name))


@pytest.mark.parametrize("name", CHESTS)
def test_a_chest_whose_photometric_interpretation_is_false_is_refused_for_its_polarity(name: str) -> None:
    with pytest.raises(NotEligible) as caught:
        look(CHEST, headers_of(name, PhotometricInterpretation="MONOCHROME2"))
    assert caught.value.code == "polarity"


@pytest.mark.parametrize(("name", "code"), TRAPS.items())
def test_what_is_no_human_chest_is_refused_for_what_its_header_or_else_its_pixels_say(name: str, code: str) -> None:
    with pytest.raises(NotEligible) as caught:
        look(CHEST, headers_of(name))
    assert caught.value.code == code
    with pytest.raises(NotEligible) as caught:
        look(PIXELS_ALONE, headers_of(name, PatientOrientation=["L", "F"]))
    assert caught.value.code == "no-chest"


@pytest.mark.parametrize("name", TRAPS)
def test_the_patients_name_and_the_descriptions_decide_nothing(name: str) -> None:
    renamed = headers_of(name, PatientName="Chest^Human", SeriesDescription="CHEST PA", StudyDescription="CHEST", BodyPartExamined="CHEST")
    with pytest.raises(NotEligible):
        look(CHEST, renamed)
