"""The package brain-tumour-mr: which series it takes and which not, and what it says of a synthetic glioma."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import pytest

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.inference import load_model
from dicomnode.analysis.package import load_package
from dicomnode.analysis.select import select
from dicomnode.errors import ConfigError
from dicomnode.findings import Findings, Volume
from dicomnode.phantoms.dicom import MR, SeriesHeader, write_ct_series
from dicomnode.phantoms.head import CONTRASTS, head_scene, receive, render_head, signal
from dicomnode.phantoms.shapes import Grid
from dicomnode.phantoms.studies import check_volume, write_glioma
from dicomnode.training.cases import case_from_masks, real_cases
from dicomnode.training.dataset import CaseRow
from dicomnode.training.evaluation.matching import mask_of
from dicomnode.training.leave_one_out import _without  # what a fold's recipe says decides whether its figures are honest
from dicomnode.training.recipe import Gliomas, load_recipe

REAL = Path(__file__).parents[4] / "shared" / "data"
DICOMNODE = Path(__file__).parents[3] / "dicomnode"
PACKAGE = DICOMNODE / "packages" / "brain-tumour-mr" / "0.2.0"
RECIPE = DICOMNODE / "training" / "recipes" / "brain-tumour-mr.toml"
GRID = Grid(origin_lps_mm=(-96.0, -120.0, -92.0), spacing_mm=(3.0, 1.6, 1.6), shape=(58, 150, 120))


def test_flair_and_t1c_of_one_examination_are_a_set_and_flair_alone_is_one_too(tmp_path: Path) -> None:
    manifest = load_package(PACKAGE).manifest
    study = write_glioma(tmp_path)
    headers = read_headers(sorted(study.folder.iterdir()))
    both = select(manifest, headers)
    assert [series.input_name for series in both.series] == ["flair", "t1c"]
    assert [len(series.frames) for series in both.series] == [44, 88]
    alone = select(manifest, headers[:44])
    assert ([series.input_name for series in alone.series], alone.absent) == (["flair"], ("t1c",))
    with pytest.raises(NotEligible, match="Input flair") as refusal:
        select(manifest, headers[44:])
    assert refusal.value.code == "mr-contrast"


def test_series_are_told_by_their_names_where_nothing_else_is_said_and_refused_without(tmp_path: Path) -> None:
    """As converted images come: no times of echo and repetition, DERIVED, the skull taken away."""
    manifest = load_package(PACKAGE).manifest
    voxels = np.zeros((20, 32, 32), dtype=np.float32)
    affine = np.diag([3.0, 2.0, 2.0, 1.0])[[2, 1, 0, 3]]
    places = {}
    for number, name in ((1, "FLAIR"), (2, "T1c"), (3, "brain")):
        header = SeriesHeader(
            seed="converted", series_number=number, series_description=name, body_part="HEAD", sop_class_uid=MR,
            image_type=("DERIVED", "SECONDARY", "OTHER"),
        )  # fmt: skip
        files = write_ct_series(tmp_path / name, voxels, affine, header)
        places[name] = [(path, thin(image)) for path, image in read_headers(files)]
    chosen = select(manifest, places["FLAIR"] + places["T1c"])
    assert [series.input_name for series in chosen.series] == ["flair", "t1c"]
    with pytest.raises(NotEligible) as refusal:
        select(manifest, places["brain"])
    assert refusal.value.code == "unknown-contrast"


def thin(header: Any) -> Any:
    for keyword in ("ScanningSequence", "SequenceVariant", "RepetitionTime", "EchoTime", "InversionTime", "FlipAngle"):
        if keyword in header:
            del header[keyword]
    return header


@pytest.mark.realdata
def test_a_proton_density_series_and_an_image_of_unknown_contrast_are_refused() -> None:
    if not REAL.is_dir():
        pytest.skip("../shared/data is not here")
    manifest = load_package(PACKAGE).manifest
    with pytest.raises(NotEligible) as refusal:
        select(manifest, read_headers(sorted((REAL / "mr_series").iterdir())))
    assert refusal.value.code in ("mr-contrast", "unknown-contrast", "body-part")
    ((name, read),) = real_cases(REAL / "mr_brain_tumour", manifest)
    assert name == "brain1"
    with pytest.raises(NotEligible) as refusal:
        read()
    assert refusal.value.code == "unknown-contrast"


@pytest.mark.realdata
def test_the_same_image_as_dicom_with_a_thin_header_is_refused_for_the_same_reason(tmp_path: Path) -> None:
    file = REAL / "mr_brain_tumour" / "brain1_image.nrrd"
    if not file.exists():
        pytest.skip("../shared/data is not here")
    voxels, header = nrrd.read(str(file))
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(header["space directions"])[::-1].T
    affine[:3, 3] = header["space origin"]
    said = SeriesHeader(seed="thin", series_description="", body_part="HEAD", sop_class_uid=MR, image_type=("ORIGINAL", "PRIMARY", "OTHER"))
    files = write_ct_series(tmp_path, voxels.transpose(2, 1, 0).astype(np.float32), affine, said)
    with pytest.raises(NotEligible) as refusal:
        select(load_package(PACKAGE).manifest, [(path, thin(image)) for path, image in read_headers(files)])
    assert refusal.value.code == "unknown-contrast"


def analysed(volumes: dict[str, Volume]) -> Findings:
    return load_model(PACKAGE, digest=load_package(PACKAGE).digest, device="cpu")(volumes)


@pytest.fixture(scope="module")
def scanned() -> tuple[dict[str, Volume], dict[str, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]]:
    """A head with a glioma of about 55 mm that training didn't draw."""
    shares, _ = render_head(head_scene(4_000_000_001, glioma_mm=55.0), GRID)
    flair = check_volume(modality="MR", contrast="flair")
    volumes = {}
    for number, contrast in enumerate(("flair", "t1c")):
        voxels = np.round(1000 * receive(signal(shares, CONTRASTS[contrast]), np.random.default_rng(number), bias=0.1))
        uids = tuple(f"1.2.{number}.{k}" for k in range(len(voxels)))
        volumes[contrast] = replace(
            flair, voxels=voxels.astype(np.float32), affine=GRID.affine, sop_instance_uids=uids, series_instance_uid=f"1.2.{number}",
            frame_of_reference_uid="1.2.9",
        )  # fmt: skip
    return volumes, {"Glioma": shares["oedema"] + shares["rim"] + shares["necrosis"] > 0.5, "Enhancing core": shares["rim"] > 0.5}


def test_a_synthetic_glioma_is_outlined_and_without_t1c_nothing_is_said_of_its_core(
    scanned: tuple[dict[str, Volume], dict[str, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]],
) -> None:
    volumes, truth = scanned
    both = analysed(volumes)
    for label, least in (("Glioma", 0.7), ("Enhancing core", 0.5)):
        found = mask_of([finding for finding in both.findings if finding.label == label], volumes["flair"])
        assert 2 * (found & truth[label]).sum() / (found.sum() + truth[label].sum()) > least
    alone = analysed({"flair": volumes["flair"]})
    assert {finding.label for finding in alone.findings} == {"Glioma"}
    assert any("t1c is absent" in note for note in alone.notes)
    assert any("Nothing is said of Enhancing core" in note for note in alone.notes)


def test_of_what_nothing_is_said_nothing_is_measured(
    scanned: tuple[dict[str, Volume], dict[str, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]],
) -> None:
    volumes, truth = scanned
    manifest = load_package(PACKAGE).manifest
    assert set(case_from_masks("both", volumes, truth, manifest).truth) == {"Glioma", "Enhancing core"}
    assert set(case_from_masks("alone", {"flair": volumes["flair"]}, truth, manifest).truth) == {"Glioma"}


def test_a_fold_is_trained_by_the_recipe_without_its_case_and_nothing_else(tmp_path: Path) -> None:
    row = CaseRow.model_construct(case="head-7")
    recipe, fold = load_recipe(RECIPE), load_recipe(_without(RECIPE, tmp_path, row))
    assert isinstance(fold.data, Gliomas)
    assert fold.data.leave_out == ("head-7",)
    assert fold.data.model_copy(update={"leave_out": ()}) == recipe.data
    assert (fold.network, fold.training, fold.validation, fold.package) == (
        recipe.network, recipe.training, recipe.validation, recipe.package,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="leave_out"):  # brains of phantoms alone leave nobody out
        _without(DICOMNODE / "training" / "recipes" / "brain-mr.toml", tmp_path, row)
