"""Patches of a data set: the same by number, prepared as the package prepares a study, with truth and region on the same voxels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dicomnode.analysis.preparation import prepare
from dicomnode.errors import ConfigError, UsageError
from dicomnode.findings import Volume
from dicomnode.training.dataset import DataSet, State, load_dataset, read_case, write_case, write_dataset
from dicomnode.training.dataset_patches import LabelledPatches
from dicomnode.training.recipe import DatasetPatches, Recipe, load_recipe
from dicomnode.training.streams import stream_of

SHAPE = (14, 40, 36)
AFFINE = np.array([[0, 0, 1.0, -20], [0, 1.0, 0, -18], [2.0, 0, 0, -14], [0, 0, 0, 1]], dtype=np.float64)
RECIPE = """
[data]
kind = "dataset"
patch = [8, 16, 16]
channels = ["flair", "t1c"]
labels = ["Tumour"]

[network]
name = "UNet"
[network.arguments]
spatial_dims = 3

[training]
seed = 5
steps = 10
batch = 2
learning_rate = 1e-3
weight_decay = 0.0
warm_up_steps = 0
ema_decay = 0.9
bce_weight = 1.0
worst_weight = 0.0
worst_share = 0.1
dice_weight = 1.0
clip_norm = 1.0
checkpoint_every = 10

[package]
schema = 1
name = "small"
version = "1"
title = "t"
manufacturer = "m"
algorithm_name = "a"
licence = "l"
intended_use = "RESEARCH USE ONLY"
training_data = "t"
kind = "segmentation"

[[package.inputs]]
name = "flair"
modality = "MR"
sop_classes = ["1.2.840.10008.5.1.4.1.1.4"]

[[package.inputs]]
name = "t1c"
optional = true
modality = "MR"
sop_classes = ["1.2.840.10008.5.1.4.1.1.4"]

[package.preprocessing]
spacing_mm = [2.0, 1.0, 1.0]
intensity = "z-score"

[package.inference]
window = [8, 16, 16]

[[package.outputs]]
channel = 0
label = "Tumour"
category = { value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }
type = { value = "108369006", scheme = "SCT", meaning = "Neoplasm" }
"""
BUSY = "{ flip_axes = ['slice', 'row', 'column'], affine = 0.9, elastic = 0.5, gamma = 0.5, noise = 0.5, shift = 0.5 }"


def recipe_of(folder: Path, *changes: tuple[str, str]) -> Recipe:
    text = RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file = folder / "recipe.toml"
    file.write_text(text)
    return load_recipe(file)


def data_of(folder: Path, *changes: tuple[str, str]) -> DatasetPatches:
    data = recipe_of(folder, *changes).data
    assert isinstance(data, DatasetPatches)
    return data


def with_more(text: str) -> tuple[str, str]:
    return 'labels = ["Tumour"]', f'labels = ["Tumour"]\n{text}'


def volume_of(voxels: NDArray[Any], modality: str) -> Volume:
    return Volume(
        voxels=voxels, affine=AFFINE, sop_instance_uids=(), series_instance_uid="", study_instance_uid="",
        frame_of_reference_uid="" if modality == "MR" else None, modality=modality,
    )  # fmt: skip


def make_dataset(folder: Path, states: tuple[State, ...] = ("present", "present", "absent", "present"), *, t1c: bool = True) -> DataSet:
    """Cases with a bright box where the tumour is; the last one is for validation."""
    rows = []
    for number, state in enumerate(states):
        rng = np.random.default_rng([number, 8])
        flair = rng.integers(80, 120, SHAPE).astype(np.int16)
        truth = np.zeros((1, *SHAPE), dtype=np.bool_)
        if state == "present":
            truth[0, 4 + number : 7 + number, 5:12, 20:29] = True
            flair[truth[0]] += 300
        row = {
            "case": f"c{number}", "patient": f"p{number}", "study": f"s{number}", "source": "made here",
            "split": "validation" if number == len(states) - 1 else "train",
        }  # fmt: skip
        volumes = {"flair": volume_of(flair, "MR")} | ({"t1c": volume_of(flair * 2, "MR")} if t1c else {})
        rows.append(write_case(folder, row, volumes, truth, {"Tumour": state}))
    return write_dataset(
        DataSet(
            folder=folder, name="boxes", modality="MR", channels=("flair", "t1c"), labels=("Tumour",), terms="", seed=0, cases=tuple(rows)
        )
    )


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxes")
    make_dataset(folder)
    return folder


def test_a_patch_is_the_same_by_its_number_in_any_order(boxes: Path, tmp_path: Path) -> None:
    data = data_of(tmp_path, with_more(f"augmentation = {BUSY}"))
    first = stream_of(data, seed=5, count=40, split="train", dataset=boxes)
    second = stream_of(data, seed=5, count=40, split="train", dataset=boxes)
    numbers = (0, 33, 12)
    there = [first[number] for number in numbers]
    again = [second[number] for number in reversed(numbers)][::-1]
    for patch, same in zip(there, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(patch, same, strict=True))
        assert [tuple(part.shape) for part in patch] == [(2, 8, 16, 16), (1, 8, 16, 16), (1, 8, 16, 16)]
        assert all(part.dtype == torch.float32 and type(part) is torch.Tensor for part in patch)
        assert bool(torch.isfinite(patch[0]).all())
    assert not torch.equal(there[0][0], there[1][0])
    assert not torch.equal(stream_of(data, seed=6, count=40, split="train", dataset=boxes)[0][0], there[0][0])


def test_a_patch_is_a_part_of_what_the_package_would_see(boxes: Path, tmp_path: Path) -> None:
    recipe, dataset = recipe_of(tmp_path), load_dataset(boxes)
    assert isinstance(recipe.data, DatasetPatches)
    image, truth, region = LabelledPatches(recipe.data, seed=5, count=8, split="validation", folder=boxes)[3]
    case = read_case(dataset, dataset.of_split("validation")[0])
    whole = prepare(recipe.package, case.volumes, torch.device("cpu")).image
    windows = whole.unfold(1, 8, 1).unfold(2, 16, 1).unfold(3, 16, 1)  # every place where the patch may lie
    equal = (windows == image[:, None, None, None]).all(dim=(0, 4, 5, 6))
    (place,) = torch.nonzero(equal).tolist()
    inside = tuple(slice(start, start + size) for start, size in zip(place, (8, 16, 16), strict=True))
    assert np.array_equal(truth[0].numpy() > 0, case.truth[0][inside])
    assert bool((region == 1).all())


def test_foreground_is_where_the_recipe_wants_it(boxes: Path, tmp_path: Path) -> None:
    def shown(share: float) -> float:
        data = data_of(tmp_path, with_more(f"foreground = {share}"), ("patch = [8, 16, 16]", "patch = [2, 6, 6]"))
        stream = LabelledPatches(data, seed=5, count=64, split="train", folder=boxes)
        return float(np.mean([bool(stream[number][1].any()) for number in range(64)]))

    assert shown(1.0) > 0.6  # a third of the cases has no tumour
    assert shown(0.0) < 0.25


def test_augmented_truth_stays_on_the_bright_voxels(boxes: Path, tmp_path: Path) -> None:
    changes = "{ flip_axes = ['row', 'column'], affine = 1.0, elastic = 1.0, rotate_degrees = 40 }"
    data = data_of(tmp_path, with_more(f"foreground = 1.0\naugmentation = {changes}"))
    stream = LabelledPatches(data, seed=5, count=40, split="train", folder=boxes)
    bright = dark = 0.0
    for number in range(8):
        image, truth, region = stream[number]
        inside, outside = image[0][truth[0] > 0], image[0][(truth[0] == 0) & (region[0] > 0)]
        if len(inside) > 50:
            bright, dark = bright + float(inside.median()), dark + float(outside.median())
    assert bright > 0
    assert bright > dark + 20


def test_outside_of_the_image_nothing_counts(tmp_path: Path, boxes: Path) -> None:
    data = data_of(tmp_path, ("patch = [8, 16, 16]", "patch = [20, 48, 16]"))
    image, truth, region = LabelledPatches(data, seed=5, count=8, split="validation", folder=boxes)[0]
    assert region[0].sum() == 14 * 40 * 16
    assert not image[:, region[0] == 0].any()
    assert not truth[region == 0].any()


def test_what_is_not_labelled_does_not_count(tmp_path: Path) -> None:
    truth = np.zeros((2, *SHAPE), dtype=np.bool_)
    truth[0, 3:9, 10:20, 10:20] = True
    row = write_case(
        tmp_path, {"case": "c0", "patient": "p0", "study": "s0", "source": "made here", "split": "train"},
        {"flair": volume_of(np.arange(truth[0].size).reshape(SHAPE).astype(np.float32), "MR")}, truth,
        {"Tumour": "present", "Core": "unlabelled"},
    )  # fmt: skip
    labels, channels = ("Tumour", "Core"), ("flair", "t1c")
    write_dataset(DataSet(folder=tmp_path, name="x", modality="MR", channels=channels, labels=labels, terms="", seed=0, cases=(row,)))
    outputs = RECIPE[RECIPE.index("[[package.outputs]]") :]
    second = outputs.replace("channel = 0", "channel = 1").replace('label = "Tumour"', 'label = "Core"')
    data = data_of(tmp_path, ('labels = ["Tumour"]', 'labels = ["Tumour", "Core"]'), (outputs, outputs + second))
    _, shown, region = LabelledPatches(data, seed=5, count=8, split="train", folder=tmp_path)[0]
    assert shown.shape[0] == 2
    assert bool((region[0] == 1).all())
    assert not region[1].any()


def test_an_optional_channel_may_be_absent_or_dropped(tmp_path: Path, boxes: Path) -> None:
    make_dataset(tmp_path, t1c=False)
    image, _, _ = LabelledPatches(data_of(tmp_path), seed=5, count=8, split="train", folder=tmp_path)[0]
    assert image[0].any()
    assert not image[1].any()
    data = data_of(tmp_path, with_more("drop_optional = 0.5"))
    stream = LabelledPatches(data, seed=5, count=32, split="train", folder=boxes)
    dropped = sum(not stream[number][0][1].any() for number in range(32))
    assert 6 < dropped < 26


def test_patches_of_projections_have_no_slices(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows = []
    for number, split in enumerate(("train", "validation")):
        film = rng.integers(0, 4000, (1, 60, 50)).astype(np.int16)
        truth = np.zeros((1, 1, 60, 50), dtype=np.bool_)
        truth[0, 0, 10:20, 20:40] = True
        affine = np.diag([1.0, 0.5, 0.5, 1.0])[[2, 1, 0, 3]]
        volume = replace(volume_of(film, "DX"), affine=affine, calibration="detector")
        row = {"case": f"x{number}", "patient": f"x{number}", "study": f"x{number}", "source": "x", "split": split}
        rows.append(write_case(tmp_path, row, {"flair": volume}, truth, {"Tumour": "present"}))
    films = DataSet(
        folder=tmp_path, name="x", modality="DX", channels=("flair",), labels=("Tumour",), terms="", seed=0, cases=tuple(rows)
    )  # fmt: skip
    write_dataset(films)
    start, end = RECIPE.index('[[package.inputs]]\nname = "t1c"'), RECIPE.index("[package.preprocessing]")
    data = data_of(
        tmp_path, (RECIPE[start:end], ""), ('modality = "MR"', 'modality = "DX"\ndimensions = 2'), ('["flair", "t1c"]', '["flair"]'),
        ("patch = [8, 16, 16]", "patch = [1, 24, 24]"),
        ("spacing_mm = [2.0, 1.0, 1.0]", "size_px = 48"), ('"z-score"', '"percentiles"'),
        with_more(f"augmentation = {BUSY}"),
    )  # fmt: skip
    for split in ("train", "validation"):
        image, truth, region = LabelledPatches(data, seed=5, count=8, split=split, folder=tmp_path)[2]  # type: ignore[arg-type]
        assert [tuple(part.shape) for part in (image, truth, region)] == [(1, 24, 24)] * 3
        assert 0 <= float(image.min()) < float(image.max()) <= 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([('channels = ["flair", "t1c"]', 'channels = ["flair"]')], "data.channels names 1, and the package has 2 input"),
        ([('labels = ["Tumour"]', 'labels = ["Tumour", "Core"]')], "data.labels names 2, and the package has 1 output"),
        ([with_more("inputs = []")], "data.inputs is the package's"),
        ([with_more("augmentation = { gama = 1 }")], "gama"),
    ],
)
def test_a_recipe_that_does_not_fit_its_package_is_refused(tmp_path: Path, changes: list[tuple[str, str]], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        recipe_of(tmp_path, *changes)


def test_a_data_set_that_does_not_fit_the_recipe_is_refused(tmp_path: Path, boxes: Path) -> None:
    def opened(*changes: tuple[str, str]) -> LabelledPatches:
        return LabelledPatches(data_of(tmp_path, *changes), seed=1, count=1, split="train", folder=boxes)

    with pytest.raises(UsageError, match="has no channel t2; it has flair, t1c"):
        opened(('channels = ["flair", "t1c"]', 'channels = ["t2", "t1c"]'))
    with pytest.raises(UsageError, match="has no label Cyst; it has Tumour"):
        opened(('labels = ["Tumour"]', 'labels = ["Cyst"]'))
    content = make_dataset(tmp_path, ("present",))
    write_dataset(replace(content, cases=(content.cases[0].model_copy(update={"split": "train"}),)))
    with pytest.raises(UsageError, match="has no case for validation"):
        LabelledPatches(data_of(tmp_path), seed=1, count=1, split="validation", folder=tmp_path)
