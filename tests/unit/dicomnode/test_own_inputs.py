"""A manifest's own pipeline beyond one CT: projections, several inputs, classes, and twenty outputs at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_bundle import MANIFEST, affine_of, spheres, volume_of, write_package

from dicomnode.analysis.inference import load_model
from dicomnode.analysis.manifest import PreprocessingSection
from dicomnode.analysis.package import digest_of
from dicomnode.analysis.preparation import normalised
from dicomnode.errors import AnalysisFailed
from dicomnode.findings import Findings, Volume

AXIAL = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])
OUTPUT = MANIFEST[MANIFEST.index("[[outputs]]") :]
FILM = """
[input]
modality = "DX"
sop_classes = ["1.2.840.10008.5.1.4.1.1.1.1"]
dimensions = 2
[preprocessing]
size_px = 64
window = [0.0, 1000.0]
[inference]
window = [1, 32, 32]
"""
HEAD = MANIFEST[: MANIFEST.index("[input]")]
TWO = """
[[inputs]]
name = "first"
modality = "MR"
sop_classes = ["1.2.840.10008.5.1.4.1.1.4"]
[[inputs]]
name = "second"
modality = "MR"
sop_classes = ["1.2.840.10008.5.1.4.1.1.4"]
optional = true
[preprocessing]
spacing_mm = [2.0, 1.5, 1.5]
window = [-1000.0, 400.0]
[inference]
window = [16, 32, 32]
"""


def run(folder: Path, volumes: dict[str, Volume], **package: Any) -> Findings:
    write_package(folder, **package)
    return load_model(folder, digest=digest_of(folder), device="cpu")(volumes)


def film(*, rows: int = 96, columns: int = 128) -> Volume:
    pixels = np.zeros((1, rows, columns), dtype=np.float32)
    pixels[0, 20:41, 70:101] = 1000.0
    return Volume(
        voxels=pixels, affine=np.array([[0.0, 0, 0.2, 0], [0, 0.2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]), sop_instance_uids=("1.2.3",),
        series_instance_uid="1.2", study_instance_uid="1", frame_of_reference_uid=None, modality="DX", calibration="detector",
    )  # fmt: skip


def ball(centre: tuple[float, float, float] = (30.0, 30.0, 24.0)) -> Volume:
    affine = affine_of((2.0, 1.5, 1.5), (0, 0, 0), AXIAL)
    return volume_of(spheres((24, 40, 40), affine, [(centre, 12.0)]), affine)


def conv(channels: int, outputs: int, dimensions: int, weight: torch.Tensor, bias: float = -20.0) -> dict[str, Any]:
    name = f"torch.nn.Conv{dimensions}d"
    config = {"network_def": {"_target_": name, "in_channels": channels, "out_channels": outputs, "kernel_size": 1}}
    shape = (outputs, channels, *[1] * dimensions)
    return {"config": config, "weights": {"weight": weight.reshape(shape).float(), "bias": torch.full((outputs,), bias)}}


def test_a_bright_rectangle_of_a_film_is_found_where_it_is_by_a_network_of_two_dimensions(tmp_path: Path) -> None:
    findings = run(tmp_path / "p", {"image": film()}, manifest=HEAD + FILM + OUTPUT, **conv(1, 1, 2, torch.tensor([40.0])))
    (found,) = findings.findings
    left, top, right, bottom = found.bounds_px
    assert np.abs(np.subtract((left, top, right, bottom), (69.5, 19.5, 100.5, 40.5))).max() <= 2  # a pixel of the network's grid
    assert found.centre_lps_mm is None
    assert found.segment.mask.shape[0] == 1


def test_two_series_are_two_channels_of_one_grid(tmp_path: Path) -> None:
    first = ball()
    fine = affine_of((1.0, 1.0, 1.0), (0, 0, 0), AXIAL)
    second = volume_of(spheres((48, 60, 60), fine, [((38.0, 30.0, 24.0), 12.0)]), fine)
    second = replace(second, series_instance_uid="1.9", frame_of_reference_uid=first.frame_of_reference_uid)
    both = conv(2, 1, 3, torch.tensor([40.0, 40.0]), bias=-60.0)  # bright where both are
    findings = run(tmp_path / "p", {"first": first, "second": second}, manifest=HEAD + TWO + OUTPUT, **both)
    (found,) = findings.findings
    assert found.centre_lps_mm is not None
    assert np.linalg.norm(np.subtract(found.centre_lps_mm, (34.0, 30.0, 24.0))) < 1.0  # between the two balls
    assert found.volume_ml < 7.2  # of 12 mm radius: the part that both share
    assert findings.other_series == ("1.9",)
    assert findings.notes == ()


def test_an_absent_optional_input_is_zeros_and_is_said(tmp_path: Path) -> None:
    alone = conv(2, 1, 3, torch.tensor([40.0, 0.0]))
    findings = run(tmp_path / "p", {"first": ball()}, manifest=HEAD + TWO + OUTPUT, **alone)
    assert len(findings.findings) == 1
    assert len(findings.notes) == 1
    assert "second is absent" in findings.notes[0]
    with pytest.raises(AnalysisFailed, match="needs the input first"):
        load_model(tmp_path / "p", digest=digest_of(tmp_path / "p"), device="cpu")({"second": ball()})


def test_a_class_has_a_score_and_a_place_and_the_whole_image_was_seen(tmp_path: Path) -> None:
    text = (HEAD + FILM + OUTPUT).replace('kind = "segmentation"', 'kind = "classification"').replace("[1, 32, 32]", "[1, 48, 48]")
    text = text.replace('label = "Bright thing"', 'label = "Bright thing"\nactivation = "sigmoid"').replace("minimum_score = 0.5\n", "")
    config = {
        "network_def": {
            "_target_": "monai.networks.nets.DenseNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "init_features": 4,
            "growth_rate": 4, "block_config": [2, 2],
        }
    }  # fmt: skip
    import json

    from dicomnode.analysis.networks import build_network

    torch.manual_seed(0)
    weights = build_network(json.dumps(config).encode(), "p").state_dict()
    for bias, positive in ((9.0, True), (-9.0, False)):
        weights["class_layers.out.bias"] = torch.tensor([bias])
        findings = run(tmp_path / f"p{positive}", {"image": film()}, manifest=text, config=config, weights=weights)
        (score,) = findings.scores
        assert (score.label, score.positive) == ("Bright thing", positive)
        assert (score.probability > 0.5) is positive
        assert [f.shape for f in findings.findings] == ["heat map"] * positive
        for found in findings.findings:
            k, r, c = found.segment.origin
            _, rows, columns = found.segment.mask.shape
            assert (k, len(found.segment.mask)) == (0, 1)
            assert r + rows <= 96
            assert c + columns <= 128


def test_of_twenty_outputs_each_finds_its_own_and_the_cap_holds_for_all_together(tmp_path: Path) -> None:
    head = HEAD.replace('kind = "segmentation"', 'kind = "segmentation"\nmaximum_findings = 15')
    outputs = "".join(
        OUTPUT.replace("channel = 0", f"channel = {i}").replace("Bright thing", f"Thing {i}").replace("minimum_ml = 0.03\n", "")
        for i in range(20)
    )
    body = MANIFEST[MANIFEST.index("[input]") : MANIFEST.index("[[outputs]]")]
    findings = run(tmp_path / "p", {"image": ball()}, manifest=head + body + outputs, **conv(1, 20, 3, torch.full((20,), 40.0)))
    assert len(findings.findings) == 15
    assert findings.omitted == 5
    assert [f.number for f in findings.findings] == list(range(1, 16))
    assert len({f.label for f in findings.findings}) == 15
    assert len({f.segment.voxel_count for f in findings.findings}) == 1


def test_softmax_outputs_share_one_probability(tmp_path: Path) -> None:
    outputs = OUTPUT.replace('label = "Bright thing"', 'label = "Bright thing"\nactivation = "softmax"').replace(
        "channel = 0", "channel = 1"
    )
    body = MANIFEST[MANIFEST.index("[input]") : MANIFEST.index("[[outputs]]")]
    weight = torch.tensor([-20.0, 20.0])
    package = conv(1, 2, 3, weight, bias=0.0)
    package["weights"]["bias"] = torch.tensor([10.0, -10.0])
    findings = run(tmp_path / "p", {"image": ball()}, manifest=HEAD + body + outputs, **package)
    sigmoid = run(tmp_path / "q", {"image": ball()}, manifest=HEAD + body + OUTPUT, **conv(1, 1, 3, torch.tensor([40.0])))
    assert findings.findings[0].segment.voxel_count == sigmoid.findings[0].segment.voxel_count


def test_intensities_as_the_manifest_names_them() -> None:
    values = torch.arange(-100.0, 901.0)
    window = normalised(values, PreprocessingSection(spacing_mm=(1, 1, 1), window=(0.0, 500.0)))
    assert (window[100], window[350], window[-1]) == (0, 0.5, 1)
    z = normalised(values, PreprocessingSection(spacing_mm=(1, 1, 1), intensity="z-score"))
    assert z[:101].eq(0).all()
    assert z[101:].mean().abs() < 1e-5
    assert abs(z[101:].std(correction=0) - 1) < 1e-5
    percentiles = normalised(values, PreprocessingSection(spacing_mm=(1, 1, 1), intensity="percentiles"))
    assert (percentiles[:11].eq(0).all(), percentiles[-11:].eq(1).all()) == (True, True)
    assert percentiles[500] == pytest.approx(0.5)
    flat = torch.zeros(5)
    for intensity in ("z-score", "percentiles"):
        section = PreprocessingSection.model_validate({"spacing_mm": (1, 1, 1), "intensity": intensity})
        assert normalised(flat, section).eq(0).all()


def test_an_output_may_be_one_finding_however_many_parts_it_has(tmp_path: Path) -> None:
    affine = affine_of((2.0, 1.5, 1.5), (0, 0, 0), AXIAL)
    volume = volume_of(spheres((24, 40, 40), affine, [((15.0, 15.0, 24.0), 8.0), ((42.0, 40.0, 24.0), 10.0)]), affine)
    body = MANIFEST[MANIFEST.index("[input]") : MANIFEST.index("[[outputs]]")]
    each = run(tmp_path / "p", {"image": volume}, manifest=HEAD + body + OUTPUT, **conv(1, 1, 3, torch.tensor([40.0])))
    one = OUTPUT.replace("channel = 0", 'channel = 0\ncomponents = "one"')
    both = run(tmp_path / "q", {"image": volume}, manifest=HEAD + body + one, **conv(1, 1, 3, torch.tensor([40.0])))
    assert len(each.findings) == 2
    (found,) = both.findings
    assert found.segment.voxel_count == sum(f.segment.voxel_count for f in each.findings)
    assert found.volume_ml == pytest.approx(sum(f.volume_ml for f in each.findings))
    assert min(f.probability for f in each.findings) <= found.probability <= max(f.probability for f in each.findings)
