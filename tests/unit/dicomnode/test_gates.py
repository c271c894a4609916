"""What the pixels say: a frontal chest of the right polarity, a head, or neither. Never the header, a name or the size of an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.head import brain_in_head, head_region, without_background
from dicomnode.analysis.manifest import InputSection
from dicomnode.analysis.package import load_package
from dicomnode.analysis.radiograph import chest_radiograph_region, lung_field_region
from dicomnode.analysis.select import select
from dicomnode.analysis.volume import read_volume
from dicomnode.findings import Volume
from dicomnode.phantoms.chest import chest_scene
from dicomnode.phantoms.head import CONTRASTS, head_scene, receive, render_head, signal
from dicomnode.phantoms.other_films import KINDS, film_of
from dicomnode.phantoms.radiograph import Technique, expose, project_sideways
from dicomnode.phantoms.shapes import Floats, Grid
from dicomnode.phantoms.studies import check_volume

REAL = Path(__file__).parents[4] / "shared" / "data"
XR = Path(__file__).parents[3] / "dicomnode" / "packages" / "lung-field-xr" / "0.1.0"
SPACING = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def chest() -> Floats:
    return np.asarray(check_volume(projection=True).voxels, dtype=np.float32)


def reason(image: Floats) -> str:
    with pytest.raises(NotEligible) as refusal:
        chest_radiograph_region(np.ascontiguousarray(image), SPACING)
    return refusal.value.code


def test_a_chest_film_passes_whatever_its_size_and_grey_scale(chest: Floats) -> None:
    for image in (chest, 3 * chest - 500, chest.repeat(3, axis=1).repeat(3, axis=2), chest[:, ::2, ::2]):
        region, side = chest_radiograph_region(image, SPACING)
        assert region.all()
        assert side.shape == image.shape
        assert side[0, 0, 0] == 1  # the patient's right at the image's left
        assert side[0, 0, -1] == 2
        assert float((side == 1).mean()) == pytest.approx(0.5, abs=0.12)


def test_exchanged_black_and_white_is_told_as_that(chest: Floats) -> None:
    assert reason(-chest) == "polarity"


def test_a_chest_on_its_side_or_a_half_of_it_is_no_frontal_chest(chest: Floats) -> None:
    film = chest[0]
    for part in (np.rot90(film), np.rot90(film, 3), film[:, : film.shape[1] // 2], film[: film.shape[0] // 3]):
        assert reason(part[None]) == "no-chest"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_films_are_refused_in_either_polarity(kind: str) -> None:
    rng = np.random.default_rng(77)
    film = expose(film_of(kind, rng), Technique(), rng)[None]
    assert reason(film) == "no-chest"
    assert reason(-film) == "no-chest"


def test_what_holds_nothing_is_no_chest() -> None:
    for image in (np.zeros((1, 200, 200)), np.ones((1, 40, 900)), np.random.default_rng(0).random((1, 150, 170))):
        assert reason(image.astype(np.float32)) == "no-chest"
    lateral = expose(project_sideways(chest_scene(5)), Technique(), np.random.default_rng(0))
    assert reason(lateral[None]) == "no-chest"


def test_a_head_is_found_in_each_contrast_and_a_chest_is_none() -> None:
    for contrast in ("t1", "flair"):
        volume = check_volume(modality="MR", contrast=contrast)
        region, side = head_region(np.asarray(volume.voxels, dtype=np.float32), volume.spacing_mm)
        assert 1200 < float(region.sum()) * volume.voxel_ml < 2600  # the brain and 12 mm around it
        assert set(np.unique(side)) == {1, 2}
    chest_ct = check_volume()
    with pytest.raises(NotEligible, match="no-head"):
        head_region(np.asarray(chest_ct.voxels, dtype=np.float32), chest_ct.spacing_mm)
    with pytest.raises(NotEligible, match="no-head"):
        head_region(np.zeros((20, 64, 64), dtype=np.float32), (5.0, 3.0, 3.0))


def film_in(name: str) -> Volume:
    """A real film as the node reads it, whatever its header says it is."""
    file = REAL / "xr" / name
    if not file.exists():
        pytest.skip("../shared/data is not here")
    manifest = load_package(XR).manifest
    anything = {"modalities": ("CR", "DX", "RG"), "sop_classes": (*manifest.inputs[0].sop_classes, "1.2.840.10008.5.1.4.1.1.7")}
    accepts = InputSection(
        name="image", dimensions=2, pixel_spacing_may_be_absent=True, animals=True, exclude_image_types=(), **anything  # type: ignore[arg-type]  # values by name
    )  # fmt: skip
    chosen = select(manifest.model_copy(update={"inputs": (accepts,)}), read_headers([file])).series[0]
    return read_volume(chosen)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["RG1_J2KI.dcm", "gdcm-CR-MONO1-10-chest.dcm"])
def test_real_chest_films_pass_and_inverted_ones_are_told(name: str) -> None:
    film = np.asarray(film_in(name).voxels, dtype=np.float32)
    region, _ = chest_radiograph_region(film, SPACING)
    assert region.all()
    assert reason(-film) == "polarity"


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # the panorama has such a UID
@pytest.mark.parametrize("name", ["MG1_J2KI.dcm", "CR-ModalitySequenceLUT.dcm", "highdicom_dx_image.dcm"])
def test_a_mammogram_a_panorama_of_teeth_and_a_dog_are_no_human_chest(name: str) -> None:
    film = np.asarray(film_in(name).voxels, dtype=np.float32)
    assert reason(film) == "no-chest"
    assert reason(-film) == "no-chest"


def test_a_body_that_is_wider_than_deep_is_no_head() -> None:
    y, x = np.mgrid[-60:60, -48:48] * 2.0
    body = np.broadcast_to(np.hypot(x / 90, y / 70) < 1, (40, 120, 96)).astype(np.float32)
    with pytest.raises(NotEligible, match="no-head"):
        head_region(500 * body + np.random.default_rng(0).rayleigh(10, body.shape).astype(np.float32), (4.5, 2.0, 2.0))


def test_findings_may_lie_in_the_lung_fields_alone_where_a_package_says_so(chest: Floats) -> None:
    region, side = lung_field_region(chest, SPACING)
    assert region.shape == chest.shape
    assert 0.2 < float(region.mean()) < 0.6
    for row in region[0]:  # each side has no dents along its rows
        for half in (row & (side[0, 0] == 1), row & (side[0, 0] == 2)):
            inside = np.flatnonzero(half)
            assert len(inside) == 0 or len(inside) >= 0.9 * (inside[-1] - inside[0] + 1)
    assert float(chest[region].mean()) < float(chest[~region].mean())
    with pytest.raises(NotEligible):
        lung_field_region(-chest, SPACING)


@pytest.fixture(scope="module")
def head() -> tuple[Floats, Floats, Floats]:
    """A head with a glioma on FLAIR, the shares of its brain, and those of its tumour; 3 mm."""
    grid = Grid(origin_lps_mm=(-100.0, -126.0, -110.0), spacing_mm=(3.0, 3.0, 3.0), shape=(68, 84, 67))
    shares, brain = render_head(head_scene(11, glioma_mm=55.0), grid)
    image = receive(signal(shares, CONTRASTS["flair"]), np.random.default_rng(3), bias=0.1)
    return image, brain, np.asarray(shares["oedema"] + shares["rim"] + shares["necrosis"], dtype=np.float32)


def test_the_brain_itself_is_outlined_with_a_tumour_in_it(head: tuple[Floats, Floats, Floats]) -> None:
    image, brain, tumour = head
    region, _, organ = brain_in_head(image, (3.0, 3.0, 3.0))
    assert not (organ & ~region).any()
    assert organ[brain > 0.5].mean() > 0.95
    assert organ[tumour > 0.5].mean() > 0.98
    assert (organ & (brain <= 0.5)).sum() < 0.2 * (brain > 0.5).sum()


@pytest.mark.parametrize("background", [0.0, -5.0, 40.0])
def test_a_brain_without_its_skull_is_found_whatever_value_is_around_it(head: tuple[Floats, Floats, Floats], background: float) -> None:
    """Normalised images have a background in the middle of the brain's own values, at their lower end, or anywhere."""
    image, brain, _ = head
    inside = brain > 0.5
    scored = (image - image[inside].mean()) / image[inside].std()
    stripped = np.where(inside, scored, np.float32(background))
    region, _, organ = brain_in_head(stripped, (3.0, 3.0, 3.0))
    assert organ[inside].mean() > 0.95
    assert not organ[~inside].any()
    assert region[inside].mean() > 0.95


def test_an_image_with_noise_around_the_head_has_no_background_of_one_value(head: tuple[Floats, Floats, Floats]) -> None:
    assert without_background(head[0]) is None
    assert without_background(np.zeros((5, 6, 7), dtype=np.float32)) is None
