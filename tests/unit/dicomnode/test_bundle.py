"""A MONAI Bundle's own pipeline on our volumes: what it finds lies where it was, and nothing of it stays behind."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_bundle import affine_of, spheres, volume_of
from zoo_package import BRIGHT, BRIGHT_WEIGHTS, load, manifest_of, write_zoo_package

from dicomnode.analysis.bundle_age import in_todays_words
from dicomnode.analysis.package import digest_of
from dicomnode.errors import AnalysisFailed, PackageError
from dicomnode.findings import Volume

AXIAL = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])
SHAPE = (22, 52, 60)


def ball(directions: np.ndarray[Any, Any], radius: float = 11.0) -> tuple[Volume, np.ndarray[Any, Any]]:
    """A volume with one bright ball off its middle, and the ball's centre in LPS mm."""
    affine = affine_of((3.0, 1.3, 1.1), (12.0, -40.0, 7.0), directions)
    centre = affine[:3, :3] @ [12.3, 22.4, 33.7] + affine[:3, 3]
    x, y, z = centre
    return volume_of(spheres(SHAPE, affine, [((x, y, z), radius)]), affine), centre


def oblique(seed: int) -> np.ndarray[Any, Any]:
    directions, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return directions


ORIENTATIONS = [
    *(
        AXIAL[:, order] * signs
        for order, signs in zip([(0, 1, 2), (2, 0, 1), (1, 2, 0)], [(1, 1, 1), (-1, 1, 1), (1, -1, -1)], strict=True)
    ),
    *(oblique(seed) for seed in range(3)),
]


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(write_zoo_package(tmp_path_factory.mktemp("zoo") / "p", BRIGHT, BRIGHT_WEIGHTS))


@pytest.mark.parametrize("directions", ORIENTATIONS)
def test_a_ball_stays_where_it_is_through_orientation_spacing_and_cropping(bright: Any, directions: np.ndarray[Any, Any]) -> None:
    volume, centre = ball(directions)
    found = bright({"image": volume})
    (finding,) = found.findings
    off = np.linalg.inv(volume.affine[:3, :3]) @ (np.array(finding.centre_lps_mm) - centre)
    assert np.abs(off).max() <= 0.5
    assert finding.volume_ml == pytest.approx(4 / 3 * np.pi * 1.1**3, rel=0.1)
    assert finding.probability > 0.9
    assert found.omitted == 0
    assert found.device == "cpu fp32 torch"


NET = """import torch
from .other import SIGN


class Net(torch.nn.Conv3d):
    def __init__(self):
        super().__init__(1, 2, 1)

    def forward(self, image):
        from scripts.nets.other import SIGN as late

        return super().forward(image) * SIGN * late * late
"""
PLAIN = {
    "_target_": "Compose",
    "transforms": [
        s for s in BRIGHT["preprocessing"]["transforms"] if s["_target_"] not in ("Orientationd", "Spacingd", "CropForegroundd")
    ],
}


def changed(**parts: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(BRIGHT)), **parts}


def test_the_windows_are_counted_and_between_may_end_the_analysis(bright: Any) -> None:
    volume, _ = ball(AXIAL)
    shares: list[float] = []
    bright({"image": volume}, shares.append)
    assert shares == sorted(shares)
    assert len(shares) > 1
    assert shares[-1] < 1

    class Enough(Exception):
        pass

    def stop(_: float) -> None:
        raise Enough

    with pytest.raises(Enough):
        bright({"image": volume}, stop)


def test_two_bundles_have_their_own_scripts_and_leave_nothing(tmp_path: Path) -> None:
    before = set(sys.path), set(sys.modules), sys.dont_write_bytecode
    target = "scripts.nets.make.Net"
    package = {"scripts/__init__.py": "", "scripts/nets/__init__.py": "from . import other\n", "scripts/nets/other.py": "SIGN = {sign}\n"}
    net = NET
    volume, _ = ball(AXIAL)
    models = []
    for sign in (1, -1):
        scripts = {name: text.format(sign=sign) for name, text in package.items()} | {"scripts/nets/make.py": net}
        folder = write_zoo_package(tmp_path / f"p{sign}", changed(network_def={"_target_": target}), BRIGHT_WEIGHTS, scripts=scripts)
        models.append((load(folder), folder, digest_of(folder)))
    sizes = [sum(f.volume_ml for f in model({"image": volume}).findings) for model, _, _ in models]
    assert sizes[0] < 10 < sizes[1]  # the ball, and all but the ball
    assert [digest_of(folder) for _, folder, _ in models] == [digest for _, _, digest in models]  # no byte code was written
    assert not [name for name in sys.modules if name.partition(".")[0] == "scripts"]
    assert (set(sys.path), sys.dont_write_bytecode) == (before[0], before[2])


def test_a_missing_library_is_named_and_one_that_only_the_data_wants_is_not_missed(tmp_path: Path) -> None:
    config = changed(imports=["$import nowhere_to_be_found as nw", "$import os"], datalist="$nw.read('x')")
    volume, _ = ball(AXIAL)
    assert load(write_zoo_package(tmp_path / "a", config, BRIGHT_WEIGHTS))({"image": volume}).findings
    config["network_def"] = "$nw.network()"
    with pytest.raises(PackageError, match="needs nowhere_to_be_found, which isn't installed"):
        load(write_zoo_package(tmp_path / "b", config, BRIGHT_WEIGHTS))
    config = changed(network_def={"_target_": "scripts.net.Net"})
    scripts = {"scripts/net.py": "import nowhere_to_be_found\n"}
    with pytest.raises(PackageError, match="needs nowhere_to_be_found, which isn't installed"):
        load(write_zoo_package(tmp_path / "c", config, BRIGHT_WEIGHTS, scripts=scripts))


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"network_def": {"_target_": "ResNet", "pretrained": True}}, "nothing is downloaded"),
        ({"network_def": "$monai.networks.nets.resnet50(pretrained=True)"}, "nothing is downloaded"),
        ({"network_def": {"_target_": "torch.nn.Conv3d", "colour": 3}}, "network_def of the package zoo doesn't build"),
        ({"inferer": None}, "has no inferer|is no inferer"),
    ],
)
def test_what_does_not_build_is_refused_in_one_sentence(tmp_path: Path, parts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PackageError, match=sentence) as refused:
        load(write_zoo_package(tmp_path / "p", changed(**parts), BRIGHT_WEIGHTS))
    assert "\n" not in str(refused.value)


def test_labels_are_not_interpolated_and_nothing_that_writes_or_evaluates_is_resolved(tmp_path: Path) -> None:
    trap = f"$open({str(tmp_path / 'trap')!r}, 'w')"
    transforms = BRIGHT["postprocessing"]["transforms"]
    largest = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
    linear = {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False}
    config = changed(
        network_def={"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 3, "kernel_size": 1},
        postprocessing={"_target_": "Compose", "transforms": [largest, linear, transforms[-1]]},
        evaluator={"_target_": "SupervisedEvaluator", "trap": trap}, run=[trap], initialize=[trap], dataset=trap, handlers=[trap],
    )  # fmt: skip
    weights = {"weight": torch.tensor([0.0, 0.0, 40.0]).reshape(3, 1, 1, 1, 1), "bias": torch.tensor([0.0, -99.0, -20.0])}
    folder = write_zoo_package(tmp_path / "p", config, weights, manifest=manifest_of(outputs=(1, 2)))
    volume, _ = ball(oblique(2))
    found = load(folder)({"image": volume})
    assert [f.label for f in found.findings] == ["thing 2"]  # between 0 and 2 there is no 1
    assert not (tmp_path / "trap").exists()
    assert not list(tmp_path.glob("**/eval"))


def test_overlapping_channels_stay_apart_where_the_bundle_merges_them(tmp_path: Path) -> None:
    steps = [
        {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
        {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
        {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: torch.where(x[[1]] > 0, 4, torch.where(x[[0]] > 0, 1, 0))"},
    ]
    config = changed(postprocessing={"_target_": "Compose", "transforms": steps}, preprocessing=PLAIN)
    weights = {"weight": torch.tensor([40.0, 40.0]).reshape(2, 1, 1, 1, 1), "bias": torch.tensor([-20.0, -30.0])}
    manifest = manifest_of(outputs=(0, 1), activation="sigmoid")
    volume, _ = ball(oblique(1))
    large, small = sorted(
        load(write_zoo_package(tmp_path / "p", config, weights, manifest=manifest))({"image": volume}).findings, key=lambda f: -f.volume_ml
    )
    assert (large.label, small.label) == ("thing 0", "thing 1")
    dk, dr, dc = (a - b for a, b in zip(small.segment.origin, large.segment.origin, strict=True))
    inner = large.segment.mask[tuple(slice(d, d + n) for d, n in zip((dk, dr, dc), small.segment.mask.shape, strict=True))]
    assert (inner & small.segment.mask).sum() == small.segment.voxel_count


def test_thousands_of_specks_are_capped_and_counted(tmp_path: Path) -> None:
    config = changed(preprocessing=PLAIN)
    volume, _ = ball(AXIAL)
    voxels = np.full(volume.voxels.shape, -1000, dtype=np.float32)
    voxels[::2, ::2, ::2] = 400
    found = load(write_zoo_package(tmp_path / "p", config, BRIGHT_WEIGHTS))({"image": volume_of(voxels, volume.affine)})
    assert len(found.findings) == 50
    assert len(found.findings) + found.omitted == np.count_nonzero(voxels > 0)
    assert [f.number for f in found.findings] == list(range(1, 51))


def test_what_lies_beside_the_weights_is_read_on_our_device_as_arrays(tmp_path: Path) -> None:
    config = changed(
        code="$torch.load(@bundle_root + '/models/code.pt', map_location=torch.device('cuda'))",
        network_def={**BRIGHT["network_def"], "out_channels": "$int(@code['channels'].sum())"},
    )
    folder = write_zoo_package(tmp_path / "p", config, BRIGHT_WEIGHTS)
    torch.save({"channels": np.array([1, 1]), "best": np.float64(0.5)}, folder / "bundle/models/code.pt")
    volume, _ = ball(AXIAL)
    assert len(load(folder)({"image": volume}).findings) == 1
    torch.save({"channels": changed}, folder / "bundle/models/code.pt")
    with pytest.raises(PackageError, match=r"doesn't build"):
        load(folder)


def test_a_network_of_slices_goes_through_the_volume(tmp_path: Path) -> None:
    inferer = {"_target_": "SliceInferer", "roi_size": [32, 32], "spatial_dim": 2}
    weights = {"weight": BRIGHT_WEIGHTS["weight"][..., 0], "bias": BRIGHT_WEIGHTS["bias"]}
    config = changed(network_def={**BRIGHT["network_def"], "_target_": "torch.nn.Conv2d"}, inferer=inferer)
    volume, _ = ball(AXIAL)
    shares: list[float] = []
    (finding,) = load(write_zoo_package(tmp_path / "p", config, weights))({"image": volume}, shares.append).findings
    assert finding.volume_ml == pytest.approx(4 / 3 * np.pi * 1.1**3, rel=0.1)
    assert 0 < shares[-1] < 1


def test_channels_that_a_bundle_adds_to_a_volume_are_its_own(tmp_path: Path) -> None:
    config = changed(network_def={**BRIGHT["network_def"], "in_channels": 3})
    adding = {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: torch.cat([x, 0 * x, 0 * x])"}
    config["preprocessing"]["transforms"].insert(-1, adding)
    weights = {"weight": BRIGHT_WEIGHTS["weight"].repeat(1, 3, 1, 1, 1), "bias": BRIGHT_WEIGHTS["bias"]}
    folder = write_zoo_package(tmp_path / "p", config, weights)
    metadata = {"network_data_format": {"inputs": {"image": {"num_channels": 3}}}}
    (folder / "bundle/configs/metadata.json").write_text(json.dumps(metadata))
    volume, _ = ball(AXIAL)
    assert len(load(folder)({"image": volume}).findings) == 1


def test_a_cpu_takes_one_window_at_a_time_and_says_when_memory_runs_out(tmp_path: Path, bright: Any) -> None:
    assert bright.parts.inferer.sw_batch_size == 1
    said = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1936973136 bytes. Error code 12"
    scripts = {"scripts/inferer.py": f"def full(image, network):\n    raise RuntimeError({said!r})\n"}
    config = changed(imports=["$from scripts.inferer import full"], inferer="$full")
    volume, _ = ball(AXIAL)
    with pytest.raises(AnalysisFailed, match=r"ran out of memory when it asked for 1847 MiB more\.$"):
        load(write_zoo_package(tmp_path / "p", config, BRIGHT_WEIGHTS, scripts=scripts))({"image": volume})


@pytest.mark.parametrize(
    ("written", "today"),
    [
        ({"_target_": "SwinUNETR", "img_size": 96, "in_channels": 1}, {"_target_": "SwinUNETR", "in_channels": 1}),
        ({"_target_": "monai.networks.nets.SwinUNETR", "img_size": 96}, {"_target_": "monai.networks.nets.SwinUNETR"}),
        ({"_target_": "UNETR", "img_size": 96, "pos_embed": "conv"}, {"_target_": "UNETR", "img_size": 96, "proj_type": "conv"}),
        ({"_target_": "AddChanneld", "keys": "x"}, {"_target_": "EnsureChannelFirstd", "keys": "x", "channel_dim": "no_channel"}),
        ({"_target_": "AsChannelFirstd", "keys": "x"}, {"_target_": "EnsureChannelFirstd", "keys": "x", "channel_dim": -1}),
        ({"_target_": "EnsureChannelFirstd", "meta_key_postfix": "meta"}, {"_target_": "EnsureChannelFirstd"}),
        ({"_target_": "UNet", "dimensions": 3}, {"_target_": "UNet", "spatial_dims": 3}),
        ({"_target_": "UNet", "depth_of": 3}, {"_target_": "UNet", "depth_of": 3}),  # MONAI refuses it, and says so
        ({"_target_": "scripts.net.SwinUNETR", "img_size": 96}, {"_target_": "scripts.net.SwinUNETR", "img_size": 96}),
    ],
)
def test_what_monai_has_renamed_or_given_up_is_said_in_todays_words(written: dict[str, Any], today: dict[str, Any]) -> None:
    assert in_todays_words(written) == today
