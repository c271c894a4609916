"""NIfTI and NRRD: positions are exact whichever way a file's axes run, and a label map that doesn't lie on its image is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from labelled_files import BOX, LAYOUT, RAS, image, label_map, layout, write_case, write_nifti, write_nrrd

from dicomnode.errors import ConfigError, UsageError
from dicomnode.training.label_maps import label_map_sources, load_layout, read_image

LPS = np.diag([-1.0, -1.0, 1.0, 1.0]) @ RAS


def read_only(folder: Path) -> Any:
    (source,) = label_map_sources(folder, load_layout(layout(folder)))
    return source.read()


@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz", "image.nrrd"])
def test_a_voxel_lies_where_itk_says(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    oblique = LPS.copy()
    turn = np.deg2rad(12)
    oblique[:3, :3] = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]) @ LPS[:3, :3]
    if file.suffix == ".nrrd":
        write_nrrd(file, image(1), oblique)
    else:
        write_nifti(file, image(1), np.diag([-1.0, -1.0, 1.0, 1.0]) @ oblique)
    values, affine = read_image(file)
    judge = SimpleITK.ReadImage(str(file))
    assert np.array_equal(values, SimpleITK.GetArrayFromImage(judge))
    for k, r, c in ((0, 0, 0), (3, 7, 5), (9, 23, 19)):
        assert affine @ (k, r, c, 1) == pytest.approx([*judge.TransformIndexToPhysicalPoint((c, r, k)), 1], abs=1e-4)


def test_the_space_of_an_nrrd_is_honoured(tmp_path: Path) -> None:
    write_nrrd(tmp_path / "ras.nrrd", image(1), RAS, "right-anterior-superior")
    write_nrrd(tmp_path / "las.nrrd", image(1), np.diag([-1.0, 1.0, 1.0, 1.0]) @ RAS, "LAS")
    for name in ("ras", "las"):
        _, affine = read_image(tmp_path / f"{name}.nrrd")
        assert affine[:, [2, 1, 0, 3]] == pytest.approx(LPS)


def test_labels_are_chosen_by_value_and_lie_on_the_image(tmp_path: Path) -> None:
    write_case(tmp_path, "p1_a", 1)
    case = read_only(tmp_path)
    volume = case.volumes["flair"]
    assert volume.voxels.dtype == np.int16
    assert volume.voxels[case.masks["Tumour"]].min() >= 600
    assert case.masks["Tumour"].sum() == 5 * 6 * 3
    assert case.masks["Core"].sum() == 5 * 6
    centre = volume.to_lps(np.argwhere(case.masks["Core"]).mean(axis=0))
    assert centre == pytest.approx((LPS @ (6, 8.5, 4, 1))[:3])


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_a_label_map_may_be_stored_another_way_round(tmp_path: Path, flips: tuple[int, int, int]) -> None:
    turned = label_map()[tuple(slice(None, None, flip) for flip in flips)].transpose(2, 0, 1)
    into = np.eye(4)  # index of the flipped map -> index of the image
    for axis, flip in enumerate(flips):
        into[axis, axis], into[axis, 3] = flip, 0 if flip > 0 else label_map().shape[axis] - 1
    write_case(tmp_path, "p1_a", 1, turned, (RAS @ into)[:, [2, 0, 1, 3]])
    case = read_only(tmp_path)
    assert case.volumes["flair"].voxels[case.masks["Tumour"]].min() >= 600


def test_a_label_map_within_half_a_voxel_is_taken_as_it_is(tmp_path: Path) -> None:
    affine = RAS.copy()
    affine[2, 3] += 0.9  # of 2 mm
    write_case(tmp_path, "p1_a", 1, affine=affine)
    assert read_only(tmp_path).masks["Core"].sum() == 30


@pytest.mark.parametrize("move", [(1.1, 2, 3), (0.03, 2, 2), (5.0, 0, 3)], ids=["half a slice", "spacing", "a row"])
def test_a_label_map_that_is_shifted_is_refused_by_its_name(tmp_path: Path, move: tuple[float, int, int]) -> None:
    affine = RAS.copy()
    distance, row, column = move
    affine[row, column] += distance * (10 if column != 3 else 1)
    write_case(tmp_path, "p1_a", 1, affine=affine)
    with pytest.raises(UsageError, match=r"labels\.nii\.gz is shifted"):
        read_only(tmp_path)


def test_a_label_map_of_another_size_or_obliquity_is_refused(tmp_path: Path) -> None:
    write_case(tmp_path, "p1_a", 1, label_map()[:-1])
    with pytest.raises(UsageError, match=r"labels\.nii\.gz is shifted"):
        read_only(tmp_path)
    write_case(tmp_path, "p1_a", 1, label_map() * 0.3)
    with pytest.raises(UsageError, match="no label map"):
        read_only(tmp_path)


def test_a_file_without_a_place_is_refused(tmp_path: Path) -> None:
    nowhere = nibabel.Nifti1Image(image(1), RAS)
    nowhere.set_sform(None, code=0)
    nowhere.set_qform(None, code=0)
    nibabel.save(nowhere, tmp_path / "nowhere.nii")
    with pytest.raises(UsageError, match=r"nowhere\.nii doesn't say where it lies"):
        read_image(tmp_path / "nowhere.nii")
    write_nrrd(tmp_path / "time.nrrd", image(1), LPS, "scanner-xyz")
    with pytest.raises(UsageError, match=r"time\.nrrd doesn't say where it lies"):
        read_image(tmp_path / "time.nrrd")
    (tmp_path / "broken.nii.gz").write_bytes(b"no gzip")
    with pytest.raises(UsageError, match=r"broken\.nii\.gz cannot be read as an image"):
        read_image(tmp_path / "broken.nii.gz")


def test_a_second_channel_comes_onto_the_first_ones_grid(tmp_path: Path) -> None:
    write_case(tmp_path, "p1_a", 1)
    write_nifti(tmp_path / "p1_a" / "t1c.nii.gz", image(2)[::2], RAS @ np.diag([2.0, 1, 1, 1]))
    text = LAYOUT.replace('flair.nii.gz"', 'flair.nii.gz"\nt1c = "{case}/t1c.nii.gz"')
    (source,) = label_map_sources(tmp_path, load_layout(layout(tmp_path, text)))
    case = source.read()
    assert case.volumes["t1c"].voxels.shape == case.volumes["flair"].voxels.shape
    assert case.volumes["t1c"].voxels[2:5, 6:12, 4:9:2].min() >= 600
    (tmp_path / "p1_a" / "t1c.nii.gz").unlink()
    with pytest.raises(UsageError, match="case p1_a has no file for the channel t1c"):
        list(label_map_sources(tmp_path, load_layout(layout(tmp_path, text))))
    text = f'optional = ["t1c"]\n{text}'
    (source,) = label_map_sources(tmp_path, load_layout(layout(tmp_path, text)))
    assert list(source.read().volumes) == ["flair"]


def test_files_of_one_folder_are_told_apart_by_the_case(tmp_path: Path) -> None:
    for case in ("p1", "p1_2"):
        write_nrrd(tmp_path / f"{case}_image.nrrd", image(1), LPS)
        write_nrrd(tmp_path / f"{case}_label.nrrd", label_map(), LPS)
    text = LAYOUT.replace("{case}/flair.nii.gz", "{case}_image.nrrd").replace("{case}/labels.nii.gz", "{case}_label.nrrd")
    sources = list(label_map_sources(tmp_path, load_layout(layout(tmp_path, text))))
    assert [(source.patient, source.study, source.kind) for source in sources] == [("p1", "p1", "NRRD"), ("p1", "p1_2", "NRRD")]
    assert sources[1].read().masks["Tumour"][BOX[2], BOX[1], BOX[0]].all()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[", "is not TOML"),
        (LAYOUT.replace("[channels]", "[channel]"), "2 mistake"),
        (LAYOUT.replace("{case}/flair", "flair"), "has no {case}"),
        (LAYOUT.replace("(p[0-9]+).*", "("), "patient is no regular expression"),
        (LAYOUT.replace("(p[0-9]+).*", "p.*"), "patient has no group"),
        (f'optional = ["flair"]\n{LAYOUT}', "optional names what is no channel, or the first one"),
    ],
)
def test_a_layout_with_mistakes_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_layout(layout(tmp_path, text))


def test_a_folder_without_a_case_or_with_two_files_for_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no file that fits"):
        list(label_map_sources(tmp_path, load_layout(layout(tmp_path))))
    write_case(tmp_path, "p1_a", 1)
    write_nifti(tmp_path / "p1_a" / "labels2.nii.gz", label_map())
    text = LAYOUT.replace("labels.nii.gz", "lab*.nii.gz")
    with pytest.raises(UsageError, match=r"2 files of case p1_a fit \{case\}/lab"):
        list(label_map_sources(tmp_path, load_layout(layout(tmp_path, text))))
