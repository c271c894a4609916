"""Training: the same from its seed, through stops, past gradients that are not finite; and out as a package that loads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dicomnode.analysis.inference import load_model
from dicomnode.analysis.package import load_package
from dicomnode.errors import ConfigError, UsageError
from dicomnode.training.export import toml_of, write_package
from dicomnode.training.losses import segmentation_loss
from dicomnode.training.nodules import PhantomPatches
from dicomnode.training.recipe import Recipe, load_recipe
from dicomnode.training.train import checkpoints, train
from dicomnode.training.trainer import Trainer, build_network

RECIPE = Path(__file__).parents[3] / "dicomnode" / "training" / "recipes" / "lung-nodule-ct.toml"
SMALL = {
    "patch = [24, 64, 64]": "patch = [8, 16, 16]",
    "nodules_per_scene = 14": "nodules_per_scene = 2",
    "filters = [8, 16, 32, 64, 96]": "filters = [4, 4, 4]",
    "kernel_size = [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]": "kernel_size = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]",
    "strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]": "strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]",
    "upsample_kernel_size = [[1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]": "upsample_kernel_size = [[1, 2, 2], [2, 2, 2]]",
    'start = "lung-nodule-ct/0.1.0"': 'start = ""',
    "batch = 4": "batch = 2",
    "checkpoint_every = 125": "checkpoint_every = 2",
    "workers = 1": "workers = 0",
    "patches = 64": "patches = 2",
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe of the same kind that trains in a second."""
    text = RECIPE.read_text(encoding="utf-8")
    for old, new in SMALL.items():
        assert old in text, old
        text = text.replace(old, new)
    lines = ["steps = 4" if line.startswith("steps =") else line for line in text.splitlines()]
    file = tmp_path / "small.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def recipe_of(file: Path) -> Recipe:
    return load_recipe(file)


def test_a_training_that_stops_goes_on_to_the_same_result(small: Path, tmp_path: Path) -> None:
    straight = train(small, tmp_path / "straight", device="cpu", quiet=True)
    stopped = train(small, tmp_path / "stopped", device="cpu", stop_after=1, quiet=True)
    assert straight.finished
    assert not stopped.finished
    assert stopped.steps == 1
    resumed = train(small, tmp_path / "stopped", device="cpu", quiet=True)
    assert resumed.finished
    assert [file.name for file in checkpoints(tmp_path / "stopped")] == ["000001.pt", "000002.pt", "000004.pt"]
    first, second = (torch.load(run.last_checkpoint, weights_only=True) for run in (straight, resumed))
    for part in ("network", "average"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])


def test_a_finished_training_leaves_a_package(small: Path, tmp_path: Path) -> None:
    run = train(small, tmp_path / "run", device="cpu", quiet=True)
    package = load_package(run.folder / "package")
    assert package.manifest == recipe_of(small).package
    assert "RESEARCH USE ONLY" in (package.folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_folder_of_another_recipe_is_refused(small: Path, tmp_path: Path) -> None:
    train(small, tmp_path / "run", device="cpu", stop_after=1, quiet=True)
    other = tmp_path / "other.toml"
    other.write_text(small.read_text(encoding="utf-8").replace("seed = 2026", "seed = 2027"), encoding="utf-8")
    with pytest.raises(UsageError, match="another recipe"):
        train(other, tmp_path / "run", device="cpu", stop_after=1, quiet=True)


def test_a_step_without_finite_gradients_is_skipped_and_counted(small: Path) -> None:
    trainer = Trainer(recipe_of(small), "cpu")
    before = {name: value.clone() for name, value in trainer.network.named_parameters()}
    truth = torch.zeros(2, 1, 8, 16, 16)
    assert trainer.learn((torch.full_like(truth, float("nan")), truth, torch.ones_like(truth))) is None
    assert (trainer.step, trainer.skipped) == (1, 1)
    assert all(torch.equal(before[name], value) for name, value in trainer.network.named_parameters())


def test_after_a_skipped_step_training_goes_on_with_finite_numbers(small: Path) -> None:
    trainer = Trainer(recipe_of(small), "cpu")
    truth = torch.zeros(2, 1, 8, 16, 16)
    trainer.learn((torch.full_like(truth, float("inf")), truth, torch.ones_like(truth)))
    loss = trainer.learn((torch.rand(truth.shape), truth, torch.ones_like(truth)))
    assert loss is not None
    assert all(bool(torch.isfinite(value).all()) for value in trainer.average.state_dict().values())


def test_a_checkpoint_brings_everything_back(small: Path, tmp_path: Path) -> None:
    trainer = Trainer(recipe_of(small), "cpu")
    truth = torch.zeros(2, 1, 8, 16, 16)
    trainer.learn((torch.rand(truth.shape), truth, torch.ones_like(truth)))
    trainer.save(tmp_path / "000001.pt")
    other = Trainer(recipe_of(small), "cpu")
    other.restore(tmp_path / "000001.pt")
    assert (other.step, other.skipped) == (trainer.step, trainer.skipped)
    assert other.learning_rate() == trainer.learning_rate()
    pairs = zip(trainer.average.state_dict().values(), other.average.state_dict().values(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)
    assert not list(tmp_path.glob("*.partial"))


def test_the_loss_counts_the_region_alone(small: Path) -> None:
    section = recipe_of(small).training
    logits, truth, region = torch.zeros(1, 1, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4)
    region[..., :2] = 1
    wrong_outside = logits.clone()
    wrong_outside[..., 2:] = 30
    assert torch.equal(segmentation_loss(logits, truth, region, section), segmentation_loss(wrong_outside, truth, region, section))
    right, wrong = (segmentation_loss(torch.full_like(logits, value), truth, region, section) for value in (-9.0, 9.0))
    assert right < 0.2 < wrong
    assert segmentation_loss(logits, truth, torch.zeros_like(region), section) == 0


def test_a_false_mark_in_an_empty_patch_costs_more_where_each_patch_has_its_own_dice(small: Path) -> None:
    section = recipe_of(small).training.model_copy(update={"bce_weight": 0.0, "worst_weight": 0.0})
    truth = torch.zeros(2, 1, 8, 16, 16)
    truth[0] = 1  # beside a mass of 2048 voxels
    right = torch.where(truth > 0, 30.0, -30.0)
    wrong = right.clone()
    wrong[1, :, :2, :8, :8] = 30  # 128 voxels that are none
    cost = {}
    for of in ("batch", "patch"):
        one = section.model_copy(update={"dice_of": of})
        assert float(segmentation_loss(right, truth, torch.ones_like(truth), one)) == pytest.approx(0, abs=1e-6)
        cost[of] = float(segmentation_loss(wrong, truth, torch.ones_like(truth), one))
    smooth = section.dice_smooth
    assert cost["patch"] == pytest.approx((1 - smooth / (128 + smooth)) / 2, rel=1e-4)  # Dice of the empty patch, of two
    assert cost["batch"] == pytest.approx(1 - (2 * 2048 + smooth) / (2 * 2048 + 128 + smooth), rel=1e-4)


def test_a_patch_is_the_same_whenever_it_is_asked_for(small: Path) -> None:
    data = recipe_of(small).data
    first, second = PhantomPatches(data, seed=3, count=40), PhantomPatches(data, seed=3, count=40)
    wanted = [second[i] for i in (33, 2, 17)][1]
    for got, expected in zip(first[2], wanted, strict=True):
        assert torch.equal(got, expected)
    image, truth, region = first[2]
    assert image.shape == truth.shape == region.shape == (1, 8, 16, 16)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    assert set(torch.unique(truth).tolist()) <= {0.0, 1.0}
    assert bool((region[truth > 0] >= 1).all())


def test_most_patches_show_a_nodule(small: Path) -> None:
    data = recipe_of(small).data.model_copy(update={"patch": (8, 48, 48), "nodules_per_scene": 3})
    patches = PhantomPatches(data, seed=4, count=16)
    assert sum(bool(patches[i][1].any()) for i in range(16)) >= 8


def test_a_small_nodule_counts_more_and_what_a_scale_cannot_see_not_at_all(small: Path) -> None:
    data = recipe_of(small).data.model_copy(update={"patch": (16, 48, 48), "nodules_per_scene": 8, "diameters_mm": (5.0, 6.0, 60.0)})
    patches = PhantomPatches(data.model_copy(update={"large_share": 0.0}), seed=4, count=48)
    shown = [patches[i] for i in range(4)]
    weights = torch.cat([weight[truth > 0] for _, truth, weight in shown])
    assert float(weights.min()) > 2  # nothing here is larger than half of what counts once
    assert {float(w) for _, truth, weight in shown for w in torch.unique(weight[truth == 0])} <= {0.0, 1.0}
    coarse = PhantomPatches(data.model_copy(update={"large_share": 0.0, "scales": (4.0,)}), seed=4, count=48)
    assert not any(bool(coarse[i][1].any()) for i in (2, 5, 8, 15))  # 6 mm are too small for voxels of 6 x 4 x 4 mm


def test_a_training_can_begin_with_the_weights_of_a_package(small: Path) -> None:
    recipe = load_recipe(RECIPE)
    start = load_file(RECIPE.parents[2] / "packages" / recipe.training.start / "bundle" / "models" / "model.safetensors")
    begun = Trainer(recipe, "cpu")
    for network in (begun.network, begun.average):
        state = network.state_dict()
        assert all(torch.equal(state[name], value.to(state[name].dtype)) for name, value in start.items())
    section = recipe_of(small).training
    for name, words in (("lung-nodule-ct/9.9.9", "no package"), ("brain-mr/0.1.0", "another network")):
        with pytest.raises(ConfigError, match=words):
            Trainer(recipe_of(small).model_copy(update={"training": section.model_copy(update={"start": name})}), "cpu")


def test_every_mistake_of_a_recipe_is_named(small: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    text = small.read_text(encoding="utf-8")
    bad.write_text(text.replace("batch = 2", "batch = 0", 1).replace("clip_norm = 5.0", "clip = 5.0"), encoding="utf-8")
    with pytest.raises(ConfigError) as mistakes:
        load_recipe(bad)
    for name in ("training.batch", "training.clip_norm", "training.clip:"):
        assert name in str(mistakes.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "absent.toml")


def test_a_network_that_monai_does_not_have_is_a_mistake(small: Path) -> None:
    network = recipe_of(small).network
    with pytest.raises(ConfigError, match="no network called"):
        build_network(network.model_copy(update={"name": "Nonsense"}))
    with pytest.raises(ConfigError, match="arguments"):
        build_network(network.model_copy(update={"arguments": {"colour": 3}}))


def test_an_exported_package_says_what_the_trained_network_says(small: Path, tmp_path: Path) -> None:
    recipe = recipe_of(small)
    trainer = Trainer(recipe, "cpu")
    package = write_package(recipe, trainer.average.state_dict(), tmp_path / "package")
    model = load_model(package.folder, digest=package.digest, device="cpu")
    image = torch.rand(1, 1, 8, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.network(image), trainer.average.eval()(image), atol=2e-2)


def test_an_export_into_a_foreign_folder_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me", encoding="utf-8")
    recipe = recipe_of(small)
    with pytest.raises(UsageError, match="no model package"):
        write_package(recipe, Trainer(recipe, "cpu").average.state_dict(), tmp_path)


def test_toml_reads_back_as_it_was_written() -> None:
    import tomllib

    entries = {"a": 1, "t": 'ü "q"\n', "f": [0.5, 1.0], "s": {"x": True}, "rows": [{"n": 1, "code": {"v": "x"}}, {"n": 2}]}
    assert tomllib.loads(toml_of(entries)) == entries
