"""The format of data sets: what is written is read again, and everything that doesn't hold is named with its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dicomnode.errors import UsageError
from dicomnode.findings import Volume
from dicomnode.training.dataset import DataSet, load_dataset, pixels_sha256, read_case, write_case, write_dataset

AFFINE = np.array([[0, 0, 0.7, -40], [0, 0.7, 0, -50], [2.5, 0, 0, 10], [0, 0, 0, 1]], dtype=np.float64)


def volume_of(voxels: NDArray[Any], affine: NDArray[np.float64] = AFFINE, modality: str = "MR") -> Volume:
    return Volume(
        voxels=voxels, affine=affine, sop_instance_uids=tuple(f"1.2.{k}" for k in range(len(voxels))), series_instance_uid="1.2",
        study_instance_uid="1.3", frame_of_reference_uid="1.4", modality=modality,
    )  # fmt: skip


def small_dataset(folder: Path) -> DataSet:
    """One case with two channels, a label that is there, one that isn't, and one that nobody looked for."""
    rng = np.random.default_rng(5)
    flair = rng.integers(0, 900, (6, 12, 10)).astype(np.int16)
    t1c = rng.normal(0, 1, flair.shape).astype(np.float32)
    truth = np.zeros((3, *flair.shape), dtype=np.bool_)
    truth[0, 2:4, 3:7, 4:6] = True
    row = write_case(
        folder,
        {
            "case": "a-1", "patient": "a", "study": "s", "split": "train", "source": "made here",
            "attributes": {"scanner": "ACME One", "slice_thickness_mm": 2.5, "sex": "F", "age_band": "60-69"},
        },
        {"flair": volume_of(flair), "t1c": volume_of(t1c)}, truth, {"Tumour": "present", "Cyst": "absent", "Metal": "unlabelled"},
    )  # fmt: skip
    return write_dataset(
        DataSet(
            folder=folder, name="small", modality="MR", channels=("flair", "t1c"), labels=("Tumour", "Cyst", "Metal"), terms="free",
            seed=1, cases=(row,),
        )
    )  # fmt: skip


def change_array(dataset: DataSet, **changes: Any) -> None:
    file = dataset.folder / dataset.cases[0].file
    with np.load(file) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez_compressed(file, **{name: array for name, array in (arrays | changes).items() if array is not None})


def change_row(dataset: DataSet, **changes: Any) -> DataSet:
    file = dataset.folder / "dataset.json"
    content = json.loads(file.read_text())
    content["cases"][0].update(changes)
    file.write_text(json.dumps(content))
    return load_dataset(dataset.folder)


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path)
    case = read_case(dataset, dataset.cases[0])
    assert list(case.volumes) == ["flair", "t1c"]
    assert case.volumes["flair"].voxels.dtype == np.int16
    assert case.volumes["t1c"].voxels.dtype == np.float32
    assert np.array_equal(case.volumes["t1c"].affine, AFFINE)
    assert case.truth.shape == (3, 6, 12, 10)
    assert case.truth[0].sum() == 16
    assert not case.truth[1:].any()
    assert case.labels == {"Tumour": "present", "Cyst": "absent", "Metal": "unlabelled"}
    assert case.attributes["age_band"] == "60-69"
    assert dataset.of_split("train") == dataset.cases
    assert dataset.of_split("test") == ()


def test_one_image_has_one_hash_whichever_way_its_axes_run() -> None:
    voxels = np.random.default_rng(1).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    turned = voxels.transpose(2, 1, 0)[::-1, :, ::-1].astype(np.float32)
    affine = AFFINE @ np.array([[0, 0, -1, 3], [0, 1, 0, 0], [-1, 0, 0, 5], [0, 0, 0, 1]], dtype=np.float64)
    assert pixels_sha256(turned, affine) == pixels_sha256(voxels, AFFINE)
    assert pixels_sha256(voxels[::-1], AFFINE) != pixels_sha256(voxels, AFFINE)


def test_a_missing_case_is_named(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path)
    (tmp_path / "cases" / "a-1.npz").unlink()
    with pytest.raises(UsageError, match=r"cases/a-1\.npz is missing"):
        read_case(dataset, dataset.cases[0])


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path)
    file = tmp_path / "cases" / "a-1.npz"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UsageError, match=r"a-1\.npz is no readable \.npz"):
        read_case(dataset, dataset.cases[0])


def test_pickles_are_not_read(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path)
    change_array(dataset, truth=np.array([{"code": 1}], dtype=object))
    with pytest.raises(UsageError, match=r"a-1\.npz is no readable \.npz without pickles"):
        read_case(dataset, dataset.cases[0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"flair": np.zeros((6, 12, 10), np.int16)}, "shows"),
        ({"flair": np.ones((5, 12, 10), np.int16)}, r"t1c is float32 of shape \(6, 12, 10\), and flair has the shape \(5, 12, 10\)"),
        ({"t1c": np.full((6, 12, 10), np.nan, np.float32)}, "t1c has values that are not finite"),
        ({"t1c": np.zeros((6, 12, 10), np.float64)}, "t1c is float64"),
        ({"t1c": None}, "t1c is missing"),
        ({"other": np.zeros(3)}, "other is missing from it or from"),
        ({"truth": np.zeros((3, 6, 12, 9), np.uint8)}, r"truth is uint8 of shape \(3, 6, 12, 9\), and the image has the shape"),
        ({"truth": np.zeros((2, 6, 12, 10), np.uint8)}, r"there are 3 label"),
        ({"truth": np.zeros((3, 6, 12, 10), np.uint8)}, "label Tumour is said to be present, and its truth is empty"),
        ({"truth": np.ones((3, 6, 12, 10), np.uint8)}, "label Cyst is said to be absent, and its truth has voxels"),
        ({"truth": np.full((3, 6, 12, 10), 2, np.uint8)}, "other values than 0 and 1"),
        ({"affine": np.eye(3)}, "affine"),
        ({"affine": np.diag([1.0, 1.0, np.inf, 1.0])}, "affine"),
        ({"affine": np.array([[1.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])}, "right angles"),
        ({"affine": np.add(AFFINE, np.diag([0.0, 0, 2], 1))}, "hash of the truth differs"),
    ],
)
def test_what_is_wrong_in_a_case_is_named_with_its_file(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    dataset = small_dataset(tmp_path)
    change_array(dataset, **changes)
    if sentence == "shows":  # nothing but the background, in every channel
        change_array(dataset, t1c=np.zeros((6, 12, 10), np.float32))
    with pytest.raises(UsageError, match=rf"a-1\.npz.*{sentence}"):
        read_case(dataset, dataset.cases[0])


def test_a_changed_voxel_is_noticed(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path)
    case = read_case(dataset, dataset.cases[0])
    image, truth = case.volumes["flair"].voxels.copy(), case.truth.astype(np.uint8)
    image[0, 0, 0] += 1
    change_array(dataset, flair=image)
    with pytest.raises(UsageError, match="hash of the channel flair differs"):
        read_case(dataset, dataset.cases[0])
    image[0, 0, 0] -= 1
    truth[0, 0, 0, 0] = 1
    change_array(dataset, flair=image, truth=truth)
    with pytest.raises(UsageError, match="hash of the truth differs"):
        read_case(dataset, dataset.cases[0])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "is no data set"),
        ("[", "is not JSON"),
        ("[]", "schema None"),
        ('{"schema": 2}', "is of schema 2, and this version reads schema 1 alone"),
        ('{"schema": 1, "name": "x", "extra": 1}', "7 mistake"),
    ],
)
def test_a_file_that_is_no_data_set_is_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"split": "training"}, "split"),
        ({"file": "../../etc/passwd"}, "file of case a-1 must be cases/a-1.npz"),
        ({"case": "../x"}, "case"),
        ({"labels": {"Tumour": "present"}}, "labels of case a-1 aren't those of the data set"),
        ({"pixels_sha256": {"t1c": "0" * 64}}, "channels of case a-1"),
    ],
)
def test_a_row_that_does_not_hold_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    dataset = small_dataset(tmp_path)
    with pytest.raises(UsageError, match=sentence):
        change_row(dataset, **changes)


def test_what_is_no_case_is_not_written(tmp_path: Path) -> None:
    voxels = np.ones((4, 5, 6), dtype=np.int16)
    row = {"case": "b", "patient": "b", "study": "s", "split": "test", "source": "made here"}
    with pytest.raises(UsageError, match="case b: the label Tumour is said to be present, and its truth is empty"):
        write_case(tmp_path, row, {"image": volume_of(voxels)}, np.zeros((1, 4, 5, 6), np.bool_), {"Tumour": "present"})
    assert not (tmp_path / "cases").exists()
