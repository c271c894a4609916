"""The trainer: the same bits after a kill, the best step exported, steps that are not finite skipped, and losses as MONAI has them."""

import json
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss, FocalLoss
from safetensors.torch import load_file
from small_bundle import volume_of
from torch.utils.data import Dataset

from dicomnode.analysis.inference import load_model
from dicomnode.analysis.package import load_package
from dicomnode.analysis.whole_image import WholeImageModel
from dicomnode.cli import run as command
from dicomnode.errors import ConfigError, TrainingFailed, UsageError
from dicomnode.training import streams, train as runs
from dicomnode.training.export import toml_of
from dicomnode.training.losses import Meaning, loss_parts
from dicomnode.training.recipe import TrainingSection, load_recipe
from dicomnode.training.streams import Patch
from dicomnode.training.train import checkpoints, train
from dicomnode.training.trainer import SKIPPED_IN_A_ROW, Trainer, computing_on
from dicomnode.training.validation import best_of, is_exhausted, validate

RECIPE = Path(__file__).parents[3] / "dicomnode" / "training" / "recipes" / "brain-mr.toml"
STEPS = 8
KINDS = streams.KINDS
Change = Callable[[int, Patch], Patch]
Changing = Callable[..., None]
SECTION = {
    "seed": 5, "steps": STEPS, "batch": 2, "learning_rate": 1e-2, "weight_decay": 1e-4, "warm_up_steps": 2, "ema_decay": 0.9,
    "bce_weight": 1.0, "worst_weight": 0.1, "worst_share": 0.05, "dice_weight": 1.0, "clip_norm": 5.0, "checkpoint_every": 2, "workers": 0,
}  # fmt: skip


def recipe_file(folder: Path, *, training: dict[str, Any] | None = None, validation: dict[str, Any] | None = None) -> Path:
    """A recipe that trains in a second; its network draws random numbers (dropout) and keeps statistics (batch normalisation)."""
    network = {
        "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "channels": [4, 8], "strides": [2], "norm": "BATCH", "dropout": 0.3,
    }  # fmt: skip
    content = {
        "data": {"kind": "mr-heads", "spacing_mm": [8.0, 8.0, 8.0], "patch": [32, 32, 32], "others": 0.1},
        "network": {"name": "UNet", "arguments": network},
        "training": SECTION | (training or {}),
        "validation": {"every": 3, "patches": 2} | (validation or {}),
    }
    text = RECIPE.read_text(encoding="utf-8")
    file = folder / "recipe.toml"
    file.write_text(toml_of(content) + text[text.index("[package]") :], encoding="utf-8")
    return file


class Blobs(Dataset[Patch]):
    """Noise with a bright blob, in the place of heads: rendered in no time."""

    def __init__(self, *, seed: int, count: int, change: Change = lambda _, patch: patch) -> None:
        self.seed, self.count, self.change = seed, count, change

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Patch:
        rng = np.random.default_rng([self.seed, index])
        image, truth = rng.random((1, 8, 8, 8), dtype=np.float32), np.zeros((1, 8, 8, 8), dtype=np.float32)
        k, r, c = rng.integers(0, 6, 3)
        truth[0, k : k + 3, r : r + 3, c : c + 3] = 1
        return self.change(index, (torch.from_numpy(image + truth), torch.from_numpy(truth), torch.ones(1, 8, 8, 8)))


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Changing:
    """Let the training patches pass through a change, which is given their number."""

    def changed(how: Change, *, everywhere: bool = False) -> None:
        def opened(_data: Any, *, seed: int, count: int, split: str, dataset: Path | None) -> Dataset[Patch]:
            return Blobs(seed=seed, count=count, change=how) if everywhere or split == "train" else Blobs(seed=seed, count=count)

        kind = replace(streams.KINDS["mr-heads"], open=opened)
        monkeypatch.setattr(streams, "KINDS", {**streams.KINDS, "mr-heads": kind})

    return changed


@pytest.fixture(autouse=True)
def blobs(change: Changing) -> None:
    change(lambda _, patch: patch)


@pytest.fixture
def heads(blobs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's own patches, which another process has too."""
    monkeypatch.setattr(streams, "KINDS", KINDS)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return recipe_file(tmp_path)


def state_of(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(checkpoints(run)[-1], weights_only=True)
    return state


def assert_same(first: Path, second: Path) -> None:
    """Two runs ended alike to the bit: weights, averages, optimiser, random numbers, history and the package."""
    one, other = state_of(first), state_of(second)
    assert one.keys() == other.keys()
    for part in ("network", "average"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    for number, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][number][name]) for name, value in moments.items())
    assert torch.equal(one["random"]["torch"], other["random"]["torch"])
    assert (one["step"], one["skipped"], one["history"]) == (other["step"], other["skipped"], other["history"])
    assert load_package(first / "package").digest == load_package(second / "package").digest
    assert (first / "package" / "training.json").read_bytes() == (second / "package" / "training.json").read_bytes()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of ten steps of the recipe's own patches that nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    assert train(recipe_file(folder, training={"steps": 10}), folder / "run", device="cpu", quiet=True).finished
    return folder


def train_and_signal(recipe: Path, run: Path, number: signal.Signals) -> tuple[int, str]:
    """Train in a process of its own and send it a signal once it has written a checkpoint; return its exit code and what it said."""
    arguments = [sys.executable, "-m", "dicomnode", "train", str(recipe), "--out", str(run), "--device", "cpu"]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        try:
            while not checkpoints(run):
                assert child.poll() is None
                time.sleep(0.02)
            child.send_signal(number)
            said = child.communicate(timeout=300)[1]
        finally:
            child.kill()
    return child.returncode, said


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGTERM, signal.SIGINT))]
)
def test_a_training_that_was_ended_goes_on_to_the_same_bits(number: signal.Signals, straight: Path, tmp_path: Path, heads: None) -> None:
    file = straight / "recipe.toml"
    for attempt in range(5):  # on a busy machine the ten steps can be over before the signal comes
        ended = tmp_path / f"run{attempt}"
        returncode, said = train_and_signal(file, ended, number)
        step = state_of(ended)["step"]
        if step < 10:
            break
    assert 2 <= step < 10
    if number == signal.SIGKILL:
        assert returncode == -number
        (ended / "checkpoints" / "000009.partial").write_bytes(b"cut off while it was written")
    else:
        assert returncode == 1
        assert f"stopped by {number.name} after step {step}" in said
    assert train(file, ended, device="cpu", quiet=True).finished
    assert_same(ended, straight / "run")


def test_a_damaged_checkpoint_is_passed_over(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "straight", device="cpu", quiet=True)
    train(recipe, tmp_path / "damaged", device="cpu", stop_after=5, quiet=True)
    newest = checkpoints(tmp_path / "damaged")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    train(recipe, tmp_path / "damaged", device="cpu", quiet=True)
    assert_same(tmp_path / "straight", tmp_path / "damaged")


def spoilt(patch: Patch) -> Patch:
    return torch.full_like(patch[0], float("nan")), patch[1], patch[2]


def test_a_step_that_is_not_finite_is_skipped_and_told(
    recipe: Path, tmp_path: Path, change: Changing, capsys: pytest.CaptureFixture[str]
) -> None:
    change(lambda index, patch: spoilt(patch) if index == 7 else patch)  # in the fourth step
    assert command(["train", str(recipe), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "1 skipped because loss or gradients were not finite" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "package" / "training.json").read_text(encoding="utf-8"))["skipped_steps"] == 1
    assert all(bool(torch.isfinite(value).all()) for value in state_of(tmp_path / "run")["average"].values())


def test_too_many_steps_that_are_not_finite_end_it(tmp_path: Path, change: Changing) -> None:
    change(lambda index, patch: spoilt(patch) if index >= 4 else patch)
    with pytest.raises(TrainingFailed, match=f"step {2 + SKIPPED_IN_A_ROW}: .* not finite in {SKIPPED_IN_A_ROW} steps"):
        train(recipe_file(tmp_path, training={"steps": 100}), tmp_path / "run", device="cpu", quiet=True)


def test_the_best_step_is_exported_and_patience_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = iter([0.5, 0.7, 0.6, 0.7, 0.9])
    monkeypatch.setattr(runs, "validate", lambda *given: replace(validate(*given), metric=next(metrics)))
    file = recipe_file(tmp_path, training={"steps": 50}, validation={"every": 2, "patience": 2})
    run = train(file, tmp_path / "run", device="cpu", quiet=True)
    assert run.finished
    assert (run.steps, run.exported_step, run.metric) == (8, 4, ("dice", 0.7))
    record = json.loads((run.folder / "package" / "training.json").read_text(encoding="utf-8"))
    assert (record["steps_done"], record["stopped_early"], record["exported_step"]) == (8, True, 4)
    average = torch.load(run.folder / "checkpoints" / "000004.pt", weights_only=True)["average"]
    exported = load_file(run.folder / "package" / "bundle" / "models" / "model.safetensors")
    assert all(torch.equal(exported[name], value.half() if value.is_floating_point() else value) for name, value in average.items())
    again = train(file, tmp_path / "run", device="cpu", quiet=True)
    assert (again.steps, again.exported_step) == (8, 4)


def test_the_best_of_equals_is_the_first_and_old_checkpoints_go(tmp_path: Path) -> None:
    history = [(10, 0.5), (20, 0.7), (30, 0.7), (40, 0.1)]
    assert best_of(history) == (20, 0.7)
    assert [is_exhausted(history[:n], 2) for n in range(5)] == [False, False, False, False, True]
    assert not is_exhausted(history, 0)
    file = recipe_file(tmp_path, training={"steps": 12, "checkpoint_every": 1}, validation={"every": 100})
    run = train(file, tmp_path / "run", device="cpu", quiet=True)
    assert [int(checkpoint.stem) for checkpoint in checkpoints(run.folder)] == [10, 11, 12]


def test_another_seed_is_another_training(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "own", device="cpu", stop_after=1, quiet=True)
    train(recipe, tmp_path / "other", device="cpu", seed=6, stop_after=1, quiet=True)
    weights = [next(iter(state_of(tmp_path / name)["network"].values())) for name in ("own", "other")]
    assert not torch.equal(*weights)
    for other in ({"seed": 6}, {"long": True}):
        with pytest.raises(UsageError, match="another recipe, seed, length or data set"):
            train(recipe, tmp_path / "own", device="cpu", quiet=True, **other)


def test_a_long_training_has_more_steps(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, training={"steps": 2, "long_factor": 3})
    assert train(file, tmp_path / "run", device="cpu", long=True, quiet=True).steps == 6


def test_what_cannot_be_used_is_one_sentence(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="read no data set"):
        train(recipe, tmp_path / "run", dataset=tmp_path, quiet=True)
    with pytest.raises(UsageError, match="auto, cpu or cuda"):
        train(recipe, tmp_path / "run", device="tpu", quiet=True)
    with pytest.raises(ConfigError, match="must not be 0"):
        load_recipe(recipe_file(tmp_path, training={"bce_weight": 0, "worst_weight": 0, "dice_weight": 0}))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no GPU"):
        train(recipe, tmp_path / "run", device="cuda", quiet=True)
    assert computing_on("auto").name == "cpu, fp32"


def test_log_and_tensorboard_tell_what_happened(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = recipe_file(tmp_path, training={"steps": 50}, validation={"every": 25})
    train(file, tmp_path / "run", device="cpu", stop_after=49, quiet=True)
    with (tmp_path / "run" / "log.jsonl").open("a", encoding="utf-8") as log:  # of steps that a kill made undone
        log.write('{"step": 75, "loss": 9}\n{"step": 1')
    train(file, tmp_path / "run", device="cpu", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [25, 25, 50, 50]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    tags = board.Tags()
    assert {"loss/loss", "loss/dice", "loss/cross_entropy", "gradient_norm", "learning_rate", "skipped_steps"} <= set(tags["scalars"])
    assert [event.step for event in board.Scalars("validation/dice")] == [25, 50]
    assert len(tags["images"]) == 1


def section_of(**weights: float) -> TrainingSection:
    return TrainingSection.model_validate({**SECTION, "bce_weight": 0, "worst_weight": 0, "dice_weight": 0, **weights})


def test_the_losses_are_those_of_monai() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator)
    overlapping = (torch.rand(logits.shape, generator=generator) > 0.5).float()
    everywhere = torch.ones(2, 1, 4, 5, 6)
    settings = {"batch": True, "smooth_nr": 1.0, "smooth_dr": 1.0}
    parts = loss_parts(logits, overlapping, everywhere, section_of(bce_weight=1, dice_weight=1))
    assert torch.isclose(parts["cross_entropy"], torch.nn.functional.binary_cross_entropy_with_logits(logits, overlapping))
    assert torch.isclose(parts["dice"], DiceLoss(sigmoid=True, **settings)(logits, overlapping))
    focal = loss_parts(logits, overlapping, everywhere, section_of(focal_weight=3, focal_gamma=1.5))["focal"]
    assert torch.isclose(focal, 3 * FocalLoss(gamma=1.5)(logits, overlapping))
    labels = torch.randint(0, 3, (2, 1, 4, 5, 6), generator=generator)
    exclusive = torch.cat([(labels == 1).float(), (labels == 2).float()], dim=1)  # channel 0 is background
    meaning = Meaning(channels=(1, 2), exclusive=True)
    parts = loss_parts(logits, exclusive, everywhere, section_of(bce_weight=1, dice_weight=1), meaning)
    theirs = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, **settings)
    expected = theirs.dice(logits, labels) + theirs.ce(logits, labels)
    assert torch.isclose(parts["cross_entropy"] + parts["dice"], expected)


def test_a_classification_learns_from_whole_images() -> None:
    logits = torch.tensor([[2.0, -1.0], [-3.0, 0.5]])
    masks = torch.zeros(2, 2, 4, 4)
    masks[0, 0, 1, 1] = masks[1, 1, 2, 2] = 1
    parts = loss_parts(logits, masks, torch.ones(2, 2, 4, 4), section_of(bce_weight=1, dice_weight=1), Meaning(channels=(0, 1), whole=True))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.eye(2))
    assert set(parts) == {"cross_entropy"}
    assert torch.isclose(parts["cross_entropy"], expected)


def test_a_network_that_does_not_fit_the_data_is_one_sentence() -> None:
    truth = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ConfigError, match="the network answers"):
        loss_parts(torch.zeros(1, 1, 4, 4), truth, truth, section_of(bce_weight=1))
    with pytest.raises(ConfigError, match="1 output"):
        loss_parts(torch.zeros(1, 2, 4, 4), truth, truth, section_of(bce_weight=1), Meaning(channels=(0,)))


def retold(file: Path, kind: str, network: dict[str, Any]) -> Path:
    """The recipe with a package of another kind and another network."""
    entries = tomllib.loads(file.read_text(encoding="utf-8"))
    entries["network"], entries["package"]["kind"] = network, kind
    package = entries.pop("package")
    inner = {key: package.pop(key) for key in ("input", "preprocessing", "inference")}
    outputs = package.pop("outputs")
    text = toml_of(entries | {"package": package | inner | {"outputs": outputs}})
    file.write_text(text, encoding="utf-8")
    return file


def test_a_classification_learns_what_an_image_shows(tmp_path: Path, change: Changing) -> None:
    settings = {"steps": 30, "batch": 4, "worst_weight": 0}
    network = {
        "block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [4, 4, 8, 8], "spatial_dims": 3, "n_input_channels": 1,
        "num_classes": 1, "conv1_t_size": 3, "conv1_t_stride": 1, "no_max_pool": True,
    }  # fmt: skip
    change(lambda number, patch: patch if number % 2 else (patch[0] - patch[1], patch[1] * 0, patch[2]), everywhere=True)
    file = retold(
        recipe_file(tmp_path, training=settings, validation={"patches": 16}), "classification", {"name": "ResNet", "arguments": network}
    )
    run = train(file, tmp_path / "run", device="cpu", quiet=True)
    assert run.metric is not None
    assert run.metric[0] == "auc"
    assert run.metric[1] > 0.8
    package = load_package(run.folder / "package")
    model = load_model(package.folder, digest=package.digest, device="cpu")
    assert isinstance(model, WholeImageModel)


def with_a_ball(number: int) -> Patch:
    """Noise with a ball brighter than it, but for every fourth."""
    rng = np.random.default_rng([7, number])
    image = rng.normal(0.3, 0.1, (1, 16, 32, 32)).astype(np.float32)
    centre = rng.uniform((4, 6, 6), (11, 25, 25)).reshape(3, 1, 1, 1)
    ball = ((np.indices(image.shape[1:]) - centre) ** 2).sum(0) < rng.uniform(2.5, 4.5) ** 2 if number % 4 else np.zeros(image.shape[1:])
    truth = ball[None].astype(np.float32)
    return torch.from_numpy(image + truth / 2), torch.from_numpy(truth), torch.ones(truth.shape)


def detection_recipe(folder: Path, **training: Any) -> Path:
    network = {"anchors": [[6.0, 6.0, 6.0], [9.0, 9.0, 9.0]], "widths": [8, 16], "pyramid": 16}
    settings = {"steps": 40, "batch": 4, "learning_rate": 3e-3, "warm_up_steps": 5, "worst_weight": 0, "checkpoint_every": 20}
    file = recipe_file(folder, training=settings | training, validation={"every": 40, "patches": 8})
    file.write_text(
        file.read_text(encoding="utf-8")
        .replace('intensity = "percentiles"', 'intensity = "window"\nwindow = [0.0, 1.0]')
        .replace("window = [48, 64, 48]", "window = [16, 32, 32]"),
        encoding="utf-8",
    )
    return retold(file, "detection", {"name": "RetinaNet", "arguments": network})


def test_a_detection_learns_where_something_is(tmp_path: Path, change: Changing) -> None:
    change(lambda number, _: with_a_ball(number), everywhere=True)
    run = train(detection_recipe(tmp_path), tmp_path / "run", device="cpu", quiet=True)
    assert run.metric is not None
    assert run.metric[0] == "average_precision"
    assert run.metric[1] > 0.8
    package = load_package(run.folder / "package")
    model = load_model(package.folder, digest=package.digest, device="cpu")
    image, truth, _ = with_a_ball(1001)
    affine = np.array([[0.0, 0, 4, -60], [0, 4, 0, -50], [4, 0, 0, 7], [0, 0, 0, 1]])  # (slice, row, column) to LPS
    volume = volume_of(image[0].numpy(), affine)
    found = model({package.manifest.inputs[0].name: volume}).findings
    assert [finding.shape for finding in found] == ["box"]
    centre = np.linalg.solve(affine, [*(found[0].centre_lps_mm or ()), 1.0])[:3]
    assert truth[0][tuple(centre.round().astype(int))] == 1
    assert found[0].segment.mask.shape == pytest.approx(np.ptp(np.argwhere(truth[0].numpy()), axis=0) + 1, abs=3)


def test_a_detection_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, change: Changing) -> None:
    change(lambda number, _: with_a_ball(number), everywhere=True)
    file = detection_recipe(tmp_path, steps=6, checkpoint_every=2)
    train(file, tmp_path / "straight", device="cpu", quiet=True)
    train(file, tmp_path / "stopped", device="cpu", stop_after=3, quiet=True)
    train(file, tmp_path / "stopped", device="cpu", quiet=True)
    assert_same(tmp_path / "straight", tmp_path / "stopped")


def test_a_detection_s_recipe_with_mistakes_is_one_sentence(tmp_path: Path) -> None:
    file = detection_recipe(tmp_path)
    text = file.read_text(encoding="utf-8")
    for old, new, said in (
        ('name = "RetinaNet"', 'name = "UNet"', "trained as RetinaNet"),
        ("pyramid = 16", "pyramids = 16", "network.arguments.pyramids"),
    ):
        file.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            train(file, tmp_path / "run", device="cpu", quiet=True)


class Answer(torch.nn.Module):
    """A network that says what stands in the image: its channels as logits, or their maximum."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.flatten(2).amax(2) if self.whole else image


def test_validation_measures_dice_of_all_patches_together_in_the_region() -> None:
    truth = torch.zeros(2, 1, 4, 8, 8)
    truth[0, 0, 1, 2:4, 2:4] = 1
    said = truth.clone()
    said[0, 0, 1, 2, 2] = 0  # one of four missed
    said[1, 0, 3, 7, 7] = 1  # one too many, in the other patch
    said[1, 0, 0, 0, 0] = 1  # and one where nothing counts
    region = torch.ones_like(truth)
    region[1, 0, 0] = 0
    batches = [(20 * said - 10, truth, region)]
    measured = validate(Answer(), batches, Meaning(), computing_on("cpu"))
    assert (measured.name, measured.metric) == ("dice", 2 * 3 / (4 + 4))
    assert measured.picture is not None
    assert measured.picture.shape == (3, 8, 8)
    red, green = (set(map(tuple, torch.nonzero(channel > 0.999).tolist())) for channel in measured.picture[:2])
    assert (2, 2) in green - red
    assert (3, 3) in green & red


def test_validation_of_classes_measures_the_area_under_the_curve() -> None:
    scores = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])[:, :, None, None]
    truth = torch.tensor([[1.0, 0], [0, 0], [1, 0], [0, 0]])
    measured = validate(
        Answer(whole=True), [(scores, truth, torch.ones_like(truth))], Meaning(channels=(0, 1), whole=True), computing_on("cpu")
    )
    assert (measured.name, measured.metric) == ("auc", 0.75)  # 3 of 4 pairs in order; the other class is never there
    assert measured.of_outputs[0] == 0.75


def test_the_average_follows_the_network(recipe: Path) -> None:
    trainer = Trainer(load_recipe(recipe), "cpu")
    before = [mean.clone() for mean in trainer.average.parameters()]
    truth = torch.zeros(2, 1, 8, 8, 8)
    assert trainer.learn((torch.rand(truth.shape), truth, torch.ones_like(truth))) is not None
    for old, mean, value in zip(before, trainer.average.parameters(), trainer.network.parameters(), strict=True):
        assert torch.allclose(mean, old + (1 - 2 / 11) * (value - old), atol=1e-7)  # the second step of eleven
