"""A package on a volume: what is found lies where it is, is as large as it is, and nothing of a bundle runs that shouldn't."""

import io
import json
import math
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from small_bundle import HALF, IDENTITY, MANIFEST, affine_of, spheres, volume_of, write_package

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.inference import Model, load_model
from dicomnode.analysis.networks import build_network
from dicomnode.analysis.package import digest_of
from dicomnode.analysis.select import select
from dicomnode.analysis.volume import read_volume
from dicomnode.errors import AnalysisFailed, PackageError
from dicomnode.findings import Findings, Volume

AXIAL = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])  # columns: slices to the head, rows to the back, columns to the left
ORIENTATIONS = {
    "axial": AXIAL,
    "axial from head to feet, rows to the front": np.array([[0.0, 0, 1], [0, -1, 0], [-1, 0, 0]]),
    "prone": np.array([[0.0, 0, -1], [0, -1, 0], [1, 0, 0]]),
    "sagittal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "coronal": np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]),
    "oblique by 20 degrees": np.array([[0.0, 0, 1], [-math.sin(0.35), math.cos(0.35), 0], [math.cos(0.35), math.sin(0.35), 0]]),
}


def loaded(folder: Path, **package: Any) -> Model:
    write_package(folder, **package)
    return load_model(folder, digest=digest_of(folder), device="cpu")


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return loaded(tmp_path / "bright")


def ball_volume(
    directions: NDArray[np.float64], spacing: tuple[float, float, float], balls: list[tuple[tuple[float, float, float], float]]
) -> Volume:
    """Return a volume of about 110 mm in each direction around the patient origin."""
    shape = tuple(round(110 / s) for s in spacing)
    affine = affine_of(spacing, (0, 0, 0), directions)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return volume_of(spheres((shape[0], shape[1], shape[2]), affine, balls), affine)


@pytest.mark.parametrize("spacing", [(2.5, 0.7, 0.7), (5.0, 0.9, 0.9), (1.0, 1.0, 1.0), (2.0, 1.5, 1.5)])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_ball_keeps_its_place_and_size_within_half_a_voxel(model: Model, orientation: str, spacing: tuple[float, float, float]) -> None:
    centre, radius = (11.3, -7.7, 5.1), 12.0
    volume = ball_volume(ORIENTATIONS[orientation], spacing, [(centre, radius)])
    findings = model({"image": volume})
    assert len(findings.findings) == 1
    found = findings.findings[0]
    offset = np.linalg.inv(volume.affine[:3, :3]) @ (np.array(found.centre_lps_mm) - np.array(centre))
    assert np.abs(offset).max() < 0.5  # voxels of the image
    radius_found = (found.volume_ml * 1000 * 3 / (4 * math.pi)) ** (1 / 3)
    assert abs(radius_found - radius) < 0.5 * min(spacing)
    assert found.volume_ml == pytest.approx(found.segment.voxel_count * volume.voxel_ml)
    assert abs(found.long_axis.length_mm - 2 * radius) < 2 * max(spacing[1:])


@pytest.mark.parametrize("shape", [(23, 61, 50), (20, 64, 48)])
def test_a_coarser_pass_adds_what_the_finer_one_does_not_show(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    fine = loaded(tmp_path / "fine")
    both = loaded(tmp_path / "both", manifest=MANIFEST.replace("batch = 2", "batch = 2\nscales = [1, 2]"))
    affine = affine_of((2.0, 1.5, 1.5), (0, 0, 0), AXIAL)
    voxels = spheres(shape, affine, [((30.0, 40.0, 20.0), 9.0)])
    voxels[:, :, -8:] = np.where(
        np.indices((*shape[:2], 8)).sum(axis=0) % 2, 400, -950
    )  # to the finer pass single voxels, a plate if averaged
    first, second = (model({"image": volume_of(voxels, affine)}).findings for model in (fine, both))
    assert max(finding.volume_ml for finding in second) > 1.9 * max(finding.volume_ml for finding in first)
    ball = [min(found, key=lambda f: abs(f.centre_lps_mm[0] - 30)) for found in (first, second)]
    assert np.allclose(ball[0].centre_lps_mm, ball[1].centre_lps_mm, atol=0.5)  # both passes lie on one another
    assert ball[0].volume_ml <= ball[1].volume_ml < 1.3 * ball[0].volume_ml


def test_the_segment_lies_on_the_bright_voxels_of_the_image(model: Model) -> None:
    volume = ball_volume(AXIAL, (2.0, 1.5, 1.5), [((0.0, 10.0, -20.0), 9.0)])
    segment = model({"image": volume}).findings[0].segment
    k, r, c = segment.origin
    box = volume.voxels[k : k + segment.mask.shape[0], r : r + segment.mask.shape[1], c : c + segment.mask.shape[2]]
    bright = box > -300  # the window's middle; here the network's grid is the image's
    assert np.count_nonzero(bright != segment.mask) <= 0.05 * segment.voxel_count
    assert segment.mask.any(axis=(1, 2)).all()
    assert segment.mask.any(axis=(0, 1)).all()


def test_the_long_axis_lies_in_its_slice_and_its_length_is_that_of_its_points(model: Model) -> None:
    volume = ball_volume(ORIENTATIONS["oblique by 20 degrees"], (2.5, 0.7, 0.7), [((5.0, 5.0, 5.0), 10.0)])
    axis = model({"image": volume}).findings[0].long_axis
    first, second = (np.array(point) for point in axis.points_lps_mm)
    assert np.linalg.norm(first - second) == pytest.approx(axis.length_mm)
    for (column, row), point in zip(axis.points_px, axis.points_lps_mm, strict=True):
        np.testing.assert_allclose(volume.to_lps(np.array([axis.slice_index, row, column], dtype=float)), point, atol=1e-9)


def test_findings_are_sorted_by_probability_numbered_and_capped_with_the_rest_counted(tmp_path: Path) -> None:
    balls = [((30.0 * i - 30, 30.0 * j - 30, 0.0), 5.0 + i) for i in range(3) for j in range(3)]
    model = loaded(tmp_path / "p", manifest=MANIFEST.replace("minimum_ml", "maximum_findings = 4\nminimum_ml"))
    findings = model({"image": ball_volume(AXIAL, (2.0, 1.5, 1.5), balls)})
    assert [f.number for f in findings.findings] == [1, 2, 3, 4]
    assert findings.omitted == 5
    probabilities = [f.probability for f in findings.findings]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 <= p <= 1 for p in probabilities)


def test_an_output_that_is_one_thing_is_one_finding_of_all_its_parts(tmp_path: Path) -> None:
    balls = [((-25.0, 0.0, 0.0), 9.0), ((25.0, 0.0, 10.0), 7.0)]
    volume = ball_volume(AXIAL, (2.0, 1.5, 1.5), balls)
    each = loaded(tmp_path / "each")({"image": volume}).findings
    one = loaded(tmp_path / "one", manifest=MANIFEST.replace("minimum_ml = 0.03", 'minimum_ml = 0.03\ncomponents = "one"'))
    (whole,) = one({"image": volume}).findings
    assert len(each) == 2
    assert whole.segment.voxel_count == sum(part.segment.voxel_count for part in each)
    assert whole.volume_ml == pytest.approx(sum(part.volume_ml for part in each))


def test_what_is_smaller_than_the_manifests_minimum_is_no_finding(tmp_path: Path) -> None:
    model = loaded(tmp_path / "p", manifest=MANIFEST.replace("minimum_ml = 0.03", "minimum_ml = 2.0"))
    findings = model({"image": ball_volume(AXIAL, (2.0, 1.5, 1.5), [((0.0, 0.0, 0.0), 6.0), ((30.0, 0.0, 0.0), 9.0)])})
    assert [round(f.volume_ml) for f in findings.findings] == [3]


def test_a_volume_of_air_has_no_finding_and_says_how_it_was_looked_at(model: Model) -> None:
    findings = model({"image": ball_volume(AXIAL, (2.0, 1.5, 1.5), [])})
    assert findings.findings == ()
    assert (findings.package, findings.version, findings.device, findings.omitted) == ("bright", "1.0", "cpu fp32 torch", 0)
    assert findings.digest == model.digest
    assert set(findings.seconds) == {"region", "inference", "findings"}


def test_the_same_volume_gives_the_same_findings_twice(tmp_path: Path) -> None:
    config = {
        "network_def": {"_target_": "monai.networks.nets.BasicUNet", "spatial_dims": 3, "features": [4, 4, 8, 8, 8, 4], "out_channels": 1}
    }
    torch.manual_seed(1)
    weights = build_network(json.dumps(config).encode(), "p").state_dict()
    model = loaded(tmp_path / "p", config=config, weights=weights, manifest=MANIFEST.replace("minimum_score = 0.5", "minimum_score = 0.0"))
    volume = ball_volume(AXIAL, (2.0, 1.5, 1.5), [((0.0, 0.0, 0.0), 20.0)])

    def gist(findings: Findings) -> list[Any]:
        return [(f.probability, f.centre_lps_mm, f.volume_ml, f.long_axis) for f in findings.findings]

    assert gist(model({"image": volume})) == gist(model({"image": volume}))


@pytest.mark.realdata
def test_the_nodule_of_a_real_chest_ct_is_cut_out_of_the_lung_by_its_density_alone(tmp_path: Path) -> None:
    folder = Path(__file__).parents[3].parent / "shared" / "data" / "ct_chest_lidc" / "LIDC-IDRI-0001"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    text = MANIFEST.replace("minimum_slices", 'region = "lung"\nminimum_slices').replace("minimum_ml = 0.03", "minimum_ml = 1.0")
    model = loaded(tmp_path / "p", manifest=text)
    volume = read_volume(select(model.manifest, read_headers(list(folder.glob("*.dcm")))).series[0])
    nodule = np.array([56.2, 86.3, -115.9])  # readers' centre; their sphere of 23.4 mm holds 6.7 ml
    near = [f for f in model({"image": volume}).findings if np.linalg.norm(np.array(f.centre_lps_mm) - nodule) < 3]
    assert [f.side for f in near] == ["left"]
    assert 4 < near[0].volume_ml < 8


def region_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a region in the lung's place: everything with x beyond 5 mm on either side, the right one at smaller x."""

    def lung_region(hu: NDArray[np.float32], spacing_mm: tuple[float, float, float]) -> tuple[NDArray[np.bool_], NDArray[np.int8]]:
        x = (np.arange(hu.shape[2]) - (hu.shape[2] - 1) / 2) * spacing_mm[2]
        side = np.broadcast_to(np.where(x < -5, 1, np.where(x > 5, 2, 0)), hu.shape).astype(np.int8)
        if not (hu > -500).any():
            raise NotEligible("no-lung", "No lung was found in the images.")
        return side > 0, side

    module = types.ModuleType("dicomnode.analysis.lung")
    module.lung_region = lung_region  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dicomnode.analysis.lung", module)


@pytest.mark.parametrize("orientation", ["axial", "prone", "sagittal", "axial from head to feet, rows to the front"])
def test_findings_stay_in_the_region_and_have_the_patients_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: str) -> None:
    region_module(monkeypatch)
    model = loaded(tmp_path / "p", manifest=MANIFEST.replace("minimum_slices", 'region = "lung"\nminimum_slices'))
    balls = [((-30.0, 0.0, 0.0), 7.0), ((30.0, 0.0, 0.0), 9.0), ((0.0, 0.0, 30.0), 3.0)]
    findings = model({"image": ball_volume(ORIENTATIONS[orientation], (2.0, 1.5, 1.5), balls)}).findings
    assert {(f.side, round(f.centre_lps_mm[0] / 30)) for f in findings} == {("right", -1), ("left", 1)}
    with pytest.raises(NotEligible, match="no-lung"):
        model({"image": ball_volume(AXIAL, (2.0, 1.5, 1.5), [])})


def test_what_is_small_counts_in_the_organ_alone_where_there_are_coarser_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def region_and_organ(
        hu: NDArray[np.float32], spacing_mm: tuple[float, float, float]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int8], NDArray[np.bool_]]:
        x = np.broadcast_to((np.arange(hu.shape[2]) - (hu.shape[2] - 1) / 2) * spacing_mm[2], hu.shape)
        return np.ones(hu.shape, dtype=np.bool_), np.ones(hu.shape, dtype=np.int8), x < 0

    module = types.ModuleType("dicomnode.analysis.lung")
    module.lung_with_dents = region_and_organ  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dicomnode.analysis.lung", module)
    text = MANIFEST.replace("minimum_slices", 'region = "lung"\nminimum_slices').replace("batch = 2", "batch = 2\nscales = [1, 4]")
    model = loaded(tmp_path / "p", manifest=text)
    small, large = 3.0, 16.0  # the coarser pass sees the second alone
    inside, outside, mass = (-30.0, 25.0, 20.0), (30.0, 25.0, 20.0), (28.0, -20.0, -10.0)
    findings = model({"image": ball_volume(AXIAL, (2.0, 1.5, 1.5), [(inside, small), (outside, small), (mass, large)])}).findings
    centres = [np.round(np.array(f.centre_lps_mm) / 10).astype(int).tolist() for f in findings]
    assert sorted(centres) == sorted([[-3, 2, 2], [3, -2, -1]])


def test_windows_without_region_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def corner(hu: NDArray[np.float32], _spacing: tuple[float, float, float]) -> tuple[NDArray[np.bool_], NDArray[np.int8]]:
        side = np.zeros(hu.shape, dtype=np.int8)
        side[:3, :3, :3] = 1
        side[-3:, -3:, -3:] = 2
        return side > 0, side

    module = types.ModuleType("dicomnode.analysis.lung")
    module.lung_region = corner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dicomnode.analysis.lung", module)
    model = loaded(tmp_path / "p", manifest=MANIFEST.replace("minimum_slices", 'region = "lung"\nminimum_slices'))
    seen: list[int] = []
    model.network.register_forward_hook(lambda _module, arguments, _result: seen.append(arguments[0].shape[0]))
    model({"image": ball_volume(AXIAL, (2.0, 1.5, 1.5), [])})
    assert sum(seen) == 2  # of dozens


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        (IDENTITY | {"stride": 2}, "window's size"),
        (IDENTITY | {"kernel_size": 3}, "window's size"),
        (IDENTITY | {"in_channels": 2}, "failed"),
    ],
)
def test_a_network_of_another_shape_fails_with_a_sentence(tmp_path: Path, definition: dict[str, Any], words: str) -> None:
    weights = build_network(json.dumps({"network_def": definition}).encode(), "p").state_dict()
    model = loaded(tmp_path / "p", config={"network_def": definition}, weights=dict(weights))
    with pytest.raises(AnalysisFailed, match=words):
        model({"image": ball_volume(AXIAL, (2.0, 1.5, 1.5), [])})


def test_numbers_that_are_not_finite_are_a_failure(model: Model) -> None:
    with torch.no_grad():
        model.network.get_parameter("bias").fill_(float("nan"))
    with pytest.raises(AnalysisFailed, match="not finite"):
        model({"image": ball_volume(AXIAL, (2.0, 1.5, 1.5), [])})


def test_another_digest_than_the_one_consented_to_is_not_loaded(tmp_path: Path) -> None:
    folder = write_package(tmp_path / "p")
    digest = digest_of(folder)
    (folder / "bundle/configs/metadata.json").write_text('{"version": "2"}')
    with pytest.raises(PackageError, match="digest"):
        load_model(folder, digest=digest)


@pytest.mark.parametrize(
    "config",
    [
        {"network_def": IDENTITY, "imports": ["$import os"]},
        {"network_def": IDENTITY, "trainer": "$__import__('os').system('true')"},
        {"network_def": IDENTITY | {"padding": "$__import__('os').getpid()"}},
        {"network_def": {"_target_": "os.system", "command": "true"}},
        {"network_def": {"_target_": "subprocess.Popen", "args": "true"}},
        {"network_def": {"_target_": "monai.bundle.scripts.download", "name": "x"}},
        {"network_def": {"_target_": "monai.networks.utils.torch.hub.load", "repo_or_dir": "x"}},
        {"network_def": {"_target_": "torch.nn.functional.importlib.import_module", "name": "os"}},
        {"network_def": {"_target_": "torch.nn.functional.relu", "input": 1}},
        {"network_def": {"_target_": "torch.nn.Parameter"}},
        {"network_def": {"_target_": ["torch.nn.Conv3d"]}},
        {"network_def": {"_target_": "Conv3d"}},
        {"network_def": IDENTITY | {"_mode_": "debug"}},
        {"network_def": IDENTITY | {"_mode_": ["debug"]}},
        {"network_def": IDENTITY | {"_requires_": {"a": "b"}}},
        {"network_def": IDENTITY | {"bias": {"_target_": "os.getcwd"}}},
        {"network_def": IDENTITY | {"bias": [[{"_target_": "os.getcwd"}]]}},
        {"network_def": IDENTITY | {"bias": "%/etc/passwd"}},
        {"network_def": IDENTITY | {"bias": "@other"}, "other": {"_target_": "os.getcwd"}},
        {"network_def": {"_target_": "monai.networks.nets.ResNet", "pretrained": True}},
        {"network_def": {"_target_": "torch.nn.Conv3d"}},
        {"network_def": {"_target_": "torch.nn.Nonesuch"}},
        {"network_def": {"in_channels": 1}},
        {"network_def": "torch.nn.Conv3d"},
        {},
        [],
    ],
)
def test_a_bundle_that_asks_for_more_than_a_network_is_refused(config: Any) -> None:
    with pytest.raises(PackageError):
        build_network(json.dumps(config).encode(), "p")


def test_a_configuration_that_is_no_json_is_refused() -> None:
    with pytest.raises(PackageError, match="not JSON"):
        build_network(b"network_def: !!python/object/apply:os.system [true]", "p")


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched-by-pickle"),))


def with_torch_weights(folder: Path, content: bytes) -> Path:
    write_package(folder)
    (folder / "bundle/models/model.safetensors").unlink()
    (folder / "bundle/models/model.pt").write_bytes(content)
    return folder


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_torch_weights_that_are_tensors_are_loaded(tmp_path: Path) -> None:
    folder = with_torch_weights(tmp_path / "p", saved(HALF))
    assert load_model(folder, digest=digest_of(folder), device="cpu").network.get_parameter("bias").item() == -20


@pytest.mark.parametrize(
    "content",
    [
        saved({"weight": Payload()}),
        pickle.dumps(Payload(), protocol=2),
        saved([1, 2]),
        saved({"weight": 1}),
        b"",
        b"garbage",
        saved(HALF)[:200],
    ],
)
def test_weights_with_code_or_without_tensors_are_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = with_torch_weights(tmp_path / "p", content)
    with pytest.raises(PackageError, match="weights"):
        load_model(folder, digest=digest_of(folder), device="cpu")
    assert not (tmp_path / "touched-by-pickle").exists()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"weight": HALF["weight"]}, "don't fit"),
        (HALF | {"more": torch.zeros(1)}, "don't fit"),
        ({"weight": torch.zeros(2, 2), "bias": HALF["bias"]}, "don't fit"),
        (HALF | {"bias": torch.full((1,), float("inf"))}, "not finite"),
    ],
)
def test_weights_that_are_not_the_networks_are_refused(tmp_path: Path, weights: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(PackageError, match=words):
        loaded(tmp_path / "p", weights=weights)


def test_broken_safetensors_are_refused(tmp_path: Path) -> None:
    folder = write_package(tmp_path / "p")
    (folder / "bundle/models/model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(PackageError, match="weights"):
        load_model(folder, digest=digest_of(folder), device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_an_error_and_auto_is_the_cpu(tmp_path: Path) -> None:
    folder = write_package(tmp_path / "p")
    assert load_model(folder, digest=digest_of(folder)).device.type == "cpu"
    with pytest.raises(AnalysisFailed, match="no GPU"):
        load_model(folder, digest=digest_of(folder), device="cuda")


@settings(max_examples=15, deadline=None)
@given(centre=st.tuples(*[st.floats(-25, 25)] * 3), flips=st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_the_order_in_which_voxels_are_stored_changes_no_finding(
    tmp_path_factory: pytest.TempPathFactory, centre: tuple[float, float, float], flips: tuple[bool, bool, bool]
) -> None:
    model = loaded(tmp_path_factory.mktemp("packages") / "p")
    volume = ball_volume(AXIAL, (2.5, 0.9, 0.9), [(centre, 8.0)])
    steps = tuple(-1 if flip else 1 for flip in flips)
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.where(flips, np.array(volume.voxels.shape) - 1, 0)
    affine[:3, :3] *= steps
    flipped = volume_of(volume.voxels[:: steps[0], :: steps[1], :: steps[2]], affine)
    (first,), (second,) = model({"image": volume}).findings, model({"image": flipped}).findings
    assert first.segment.voxel_count == second.segment.voxel_count
    np.testing.assert_allclose(first.centre_lps_mm, second.centre_lps_mm, atol=1e-6)
    assert first.long_axis.length_mm == pytest.approx(second.long_axis.length_mm)
