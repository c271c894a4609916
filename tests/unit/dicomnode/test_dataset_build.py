"""Building and checking a data set: split by patient, pseudonymised, refused for each kind of bad label and each kind of overlap."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_files import image, label_map, layout, write_case, write_nifti

from dicomnode.errors import UsageError
from dicomnode.training.dataset import DataSet, load_dataset, read_case
from dicomnode.training.dataset_build import Plan, age_band, build_dataset, split_by_patient
from dicomnode.training.label_maps import label_map_sources, load_layout
from dicomnode.training.leakage import check_dataset

PLAN = Plan(name="tumours", terms="made here", shares=(0.5, 0.25, 0.25), seed=3)


def built(folder: Path, plan: Plan = PLAN) -> DataSet:
    sources = list(label_map_sources(folder, load_layout(layout(folder))))
    return build_dataset(folder / "out", sources, plan).dataset


def four_patients(folder: Path) -> DataSet:
    """Four patients, the first with two studies."""
    for number, case in enumerate(("p1_a", "p1_b", "p2_a", "p3_a", "p4_a")):
        write_case(folder, case, number)
    return built(folder)


def change_rows(dataset: DataSet, change: Any) -> DataSet:
    file = dataset.folder / "dataset.json"
    content = json.loads(file.read_text())
    change(content["cases"])
    file.write_text(json.dumps(content))
    return load_dataset(dataset.folder)


def test_a_patient_stands_in_one_split_and_the_shares_are_met(tmp_path: Path) -> None:
    dataset = four_patients(tmp_path)
    check_dataset(dataset)
    splits = [{row.split for row in dataset.cases if row.patient == patient} for patient in {row.patient for row in dataset.cases}]
    assert sorted(next(iter(split)) for split in splits if len(split) == 1) == ["test", "train", "train", "validation"]
    case = read_case(dataset, dataset.cases[0])
    assert case.volumes["flair"].voxels[case.truth[0]].min() >= 600


def test_no_identifier_is_written(tmp_path: Path) -> None:
    dataset = four_patients(tmp_path)
    text = (dataset.folder / "dataset.json").read_text()
    assert "p1" not in text
    assert str(tmp_path) not in text
    assert built_with_key(tmp_path).cases[0].patient != dataset.cases[0].patient


def built_with_key(folder: Path) -> DataSet:
    sources = list(label_map_sources(folder, load_layout(layout(folder))))
    return build_dataset(folder / "keyed", sources, replace(PLAN, key=b"secret")).dataset


def test_the_split_follows_from_the_seed_and_the_pins() -> None:
    patients = [f"p{number}" for number in range(40)]
    first = split_by_patient(patients, PLAN)
    assert first == split_by_patient(patients[::-1] * 2, PLAN)
    assert first != split_by_patient(patients, replace(PLAN, seed=4))
    assert [list(first.values()).count(split) for split in ("train", "validation", "test")] == [20, 10, 10]
    pinned = split_by_patient(patients, replace(PLAN, pins={"p7": "test", "p8": "test", "p9": "train"}))
    assert (pinned["p7"], pinned["p8"], pinned["p9"]) == ("test", "test", "train")
    assert [list(pinned.values()).count(split) for split in ("train", "validation", "test")] == [20, 10, 10]
    with pytest.raises(UsageError, match="no source is of the patient p99"):
        split_by_patient(patients, replace(PLAN, pins={"p99": "test"}))
    with pytest.raises(UsageError, match="add up to 1"):
        split_by_patient(patients, replace(PLAN, shares=(0.5, 0.5, 0.5)))


@pytest.mark.parametrize(("years", "band"), [(None, None), (0.4, "0-9"), (59.9, "50-59"), (60, "60-69"), (89, "80-89"), (94, "90+")])
def test_ages_become_bands_of_ten_years(years: float | None, band: str | None) -> None:
    assert age_band(years) == band


def test_a_planted_patient_in_two_splits_is_named(tmp_path: Path) -> None:
    dataset = four_patients(tmp_path)
    twice = [number for number, row in enumerate(dataset.cases) if [r.patient for r in dataset.cases].count(row.patient) == 2]

    def move(rows: list[dict[str, Any]]) -> None:
        rows[twice[0]]["split"] = "test" if rows[twice[0]]["split"] != "test" else "train"

    changed = change_rows(dataset, move)
    with pytest.raises(UsageError, match=rf"1 fault.*the same patient in two splits: {dataset.cases[twice[0]].case} \("):
        check_dataset(changed)


def test_a_planted_study_in_two_splits_is_named(tmp_path: Path) -> None:
    dataset = four_patients(tmp_path)
    train, test = dataset.of_split("train")[0], dataset.of_split("test")[0]

    def same_study(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["study"] = train.study if row["case"] == test.case else row["study"]

    with pytest.raises(UsageError, match=rf"1 fault.*the same study in two splits: .*{test.case} \(test\)"):
        check_dataset(change_rows(dataset, same_study))


def test_one_image_under_two_patient_ids_is_found_while_building_and_named(tmp_path: Path) -> None:
    for case in ("p1_a", "p2_a"):
        write_case(tmp_path, case, 7)
    write_case(tmp_path, "p3_a", 8)
    plan = replace(PLAN, pins={"p1": "train", "p2": "test"})
    with pytest.raises(UsageError, match=r"the same pixels in two splits: .* is .*p1_a.* is .*p2_a"):
        built(tmp_path, plan)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    assert len(built(tmp_path, replace(PLAN, pins={"p1": "train", "p2": "train"})).cases) == 3


def test_an_image_that_was_put_in_the_place_of_another_is_found(tmp_path: Path) -> None:
    dataset = four_patients(tmp_path)
    train, test = dataset.of_split("train")[0], dataset.of_split("test")[0]
    (dataset.folder / test.file).write_bytes((dataset.folder / train.file).read_bytes())
    with pytest.raises(UsageError, match=rf"{test.case}\.npz: the hash of the channel flair differs"):
        check_dataset(dataset)
    changed = change_rows(dataset, lambda rows: [row.update(pixels_sha256=train.pixels_sha256) for row in rows if row["case"] == test.case])
    with pytest.raises(UsageError, match="the same pixels in two splits"):
        check_dataset(changed)


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    dataset = four_patients(tmp_path)
    first, second = dataset.cases[:2]
    (dataset.folder / first.file).unlink()
    (dataset.folder / second.file).write_bytes(b"")
    with pytest.raises(UsageError, match=rf"2 fault.*{first.case}\.npz is missing; .*{second.case}\.npz is no readable"):
        check_dataset(dataset)


def test_a_label_that_is_not_there_is_refused_until_somebody_says_what_it_means(tmp_path: Path) -> None:
    write_case(tmp_path, "p1_a", 1)
    write_case(tmp_path, "p2_a", 2)
    (tmp_path / "p2_a" / "labels.nii.gz").unlink()
    with pytest.raises(UsageError, match=r"p2_a/flair\.nii\.gz: the label Tumour is missing"):
        built(tmp_path)
    with pytest.raises(UsageError, match=r"p2_a/flair\.nii\.gz: nothing is known of any label"):
        built(tmp_path, replace(PLAN, missing="unlabelled"))
    rows = built(tmp_path, replace(PLAN, missing="absent")).cases
    assert sorted(row.labels["Tumour"] for row in rows) == ["absent", "present"]


def test_an_empty_label_map_is_refused_until_somebody_says_what_it_means(tmp_path: Path) -> None:
    write_case(tmp_path, "p1_a", 1)
    write_case(tmp_path, "p2_a", 2, label_map() * 0)
    with pytest.raises(UsageError, match=r"p2_a/flair\.nii\.gz: the label Tumour is empty"):
        built(tmp_path)
    rows = built(tmp_path, replace(PLAN, empty="absent")).cases
    assert sorted(row.labels["Tumour"] for row in rows) == ["absent", "present"]


def test_a_label_is_absent_from_a_map_in_which_another_was_drawn(tmp_path: Path) -> None:
    write_case(tmp_path, "p1_a", 1, np.minimum(label_map(), 1))
    assert built(tmp_path).cases[0].labels == {"Tumour": "present", "Core": "absent"}


def test_a_label_outside_of_the_image_is_refused(tmp_path: Path) -> None:
    write_case(tmp_path, "p1_a", 1)
    values = image(1)
    values[4:9, 6:12, 2:5] = 0
    write_nifti(tmp_path / "p1_a" / "flair.nii.gz", values)
    with pytest.raises(UsageError, match=r"p1_a/flair\.nii\.gz: .*the label Tumour lies outside of what the image shows"):
        built(tmp_path)


def test_an_output_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    four_patients(tmp_path)
    with pytest.raises(UsageError, match="out holds something already"):
        built(tmp_path)
