"""A manifest's own pipeline beyond one CT: projections, several inputs, classes, and twenty outputs at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_bundle import MANIFEST, affine_of, spheres, volume_of, write_package

from dicomnode.analysis.inference import load_model
from dicomnode.analysis.manifest import PreprocessingSection, parse_manifest
from dicomnode.analysis.package import digest_of
from dicomnode.analysis.preparation import local_contrast, normalised
from dicomnode.errors import AnalysisFailed, PackageError
from dicomnode.findings import Finding, Findings, Volume

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


def test_local_contrast_forgets_what_changes_slowly_and_how_strong_contrast_is() -> None:
    size = 112
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    texture = 0.02 * torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    disc = 0.06 * (torch.hypot(rows - 56.0, columns - 40.0) < 5)
    film = (0.3 + texture + disc)[None]
    plain = local_contrast(film)
    assert plain.shape == film.shape
    assert float(plain.abs().max()) <= 3
    assert float(plain[0][disc > 0].mean()) > 1  # brighter than what is around it by more than that varies
    assert abs(float(plain.mean())) < 0.1
    tilted = local_contrast(film + 0.4 * columns / size)
    assert float((tilted - plain)[0, 20:-20, 20:-20].abs().mean()) < 0.15
    fainter = local_contrast(0.5 * film)
    assert float(fainter[0][disc > 0].mean()) > 0.7 * float(plain[0][disc > 0].mean())
    padded = torch.full((1, size + 20, size), torch.nan)
    padded[:, :size] = film
    beside = local_contrast(padded)
    assert beside[:, size:].eq(0).all()
    assert float(beside[:, :size].mean()) < 0.1  # what is no part of the film doesn't count as dark
    assert local_contrast(torch.full((1, 8, 8), 0.5)).abs().max() < 1e-3


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


def test_an_output_that_needs_an_absent_input_is_not_given_and_the_result_says_so(tmp_path: Path) -> None:
    second = OUTPUT.replace("channel = 0", 'channel = 1\nneeds = ["second"]').replace("Bright thing", "Core")
    both = conv(2, 2, 3, torch.tensor([[40.0, 0.0], [40.0, 0.0]]))  # both outputs say what the first series shows
    alone = run(tmp_path / "p", {"first": ball()}, manifest=HEAD + TWO + OUTPUT + second, **both)
    assert [finding.label for finding in alone.findings] == ["Bright thing"]
    assert [note for note in alone.notes if "Core" in note] == ["Nothing is said of Core: it needs second."]
    other = replace(ball(), series_instance_uid="1.9")
    given = load_model(tmp_path / "p", digest=digest_of(tmp_path / "p"), device="cpu")({"first": ball(), "second": other})
    assert {finding.label for finding in given.findings} == {"Bright thing", "Core"}
    assert given.notes == ()


def test_a_mirrored_image_is_looked_at_too_and_both_answers_are_averaged(tmp_path: Path) -> None:
    """A network that sees only what has something bright at its left: with its mirror it sees half as surely what has it at its right."""
    kernel = torch.zeros(1, 1, 1, 1, 3)
    kernel[..., 0] = 40.0
    config = {
        "network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": [1, 1, 3], "padding": [0, 0, 1]}
    }
    weights = {"weight": kernel, "bias": torch.full((1,), -20.0)}
    affine = affine_of((2.0, 1.5, 1.5), (0, 0, 0), AXIAL)
    voxels = np.full((16, 32, 32), -1000, dtype=np.int16)
    voxels[4:12, 8:24, 16] = 400  # a sheet: to one side of it the network says yes, to the other its mirror does
    volume = volume_of(voxels, affine)
    plain = run(tmp_path / "plain", {"image": volume}, config=config, weights=weights)
    text = MANIFEST.replace("batch = 2", "batch = 2\nmirror = true").replace("minimum_score = 0.5", "minimum_score = 0.4")
    text = text.replace('label = "Bright thing"', 'label = "Bright thing"\nthreshold = 0.4')
    mirrored = run(tmp_path / "mirrored", {"image": volume}, manifest=text, config=config, weights=weights)
    assert [columns_of(f) for f in plain.findings] == [(17, 18)]
    assert sorted(columns_of(f) for f in mirrored.findings) == [(15, 16), (17, 18)]
    assert all(finding.probability == pytest.approx(0.5, abs=0.01) for finding in mirrored.findings)


def columns_of(finding: Finding) -> tuple[int, int]:
    first = finding.segment.origin[2]
    return first, first + finding.segment.mask.shape[2]


def test_intensities_of_an_organ_are_its_quartiles_whatever_the_scale_and_what_is_around_it() -> None:
    settings = PreprocessingSection(spacing_mm=(1.0, 1.0, 1.0), intensity="organ-z-score")
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(50, 5, (20, 20, 20)).astype(np.float32))
    organ = torch.zeros(image.shape, dtype=torch.bool)
    organ[4:16, 4:16, 4:16] = True
    image[~organ] = 3000.0
    image[4:8, 4:8, 4:16] = 200.0  # a bright lesion moves them little
    scored = normalised(image, settings, organ)
    assert float(scored[~organ].abs().max()) == 0
    assert float(scored[organ].median()) == pytest.approx(0, abs=0.01)
    assert float(scored[8:16, 8:16, 4:16].std()) == pytest.approx(1, abs=0.2)
    assert float(scored[4:8, 4:8, 4:16].min()) == 8.0
    torch.testing.assert_close(normalised(7 * image - 90, settings, organ), scored, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('[[outputs]]\nchannel = 0', '[[outputs]]\nneeds = ["third"]\nchannel = 0', "an output needs third, which is no input"),
        ("window = [-1000.0, 400.0]\n[inf", 'intensity = "organ-z-score"\n[inf', "needs the region head"),
        ("[16, 32, 32]\n", "[16, 32, 32]\nmirror = true\n", "mirror doesn't go with an output of one side"),
    ],
)  # fmt: skip
def test_what_doesnt_go_together_in_a_manifest_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (HEAD + TWO + OUTPUT).replace(old, new)
    if "mirror" in new:
        text = text.replace('label = "Bright thing"', 'label = "Bright thing"\nside = "left"')
    with pytest.raises(PackageError, match=message):
        parse_manifest(text.encode(), tmp_path)


def test_the_bright_part_of_another_output_is_found_by_the_intensity_of_an_input(tmp_path: Path) -> None:
    second = OUTPUT.replace(
        "channel = 0", 'channel = 0\nneeds = ["second"]\nbright = { within = "Bright thing", input = "second", above = 0.6 }'
    )
    second = second.replace('label = "Bright thing"', 'label = "Core"')
    text = HEAD + TWO + OUTPUT + second
    first = ball()
    shapes = spheres((24, 40, 40), first.affine, [((30.0, 30.0, 24.0), 7.0), ((12.0, 12.0, 10.0), 6.0)])  # the second one lies outside
    other = replace(first, voxels=shapes, series_instance_uid="1.9")
    findings = run(tmp_path / "p", {"first": first, "second": other}, manifest=text, **conv(2, 1, 3, torch.tensor([40.0, 0.0])))
    thing, core = sorted(findings.findings, key=lambda finding: -finding.volume_ml)
    assert (thing.label, core.label) == ("Bright thing", "Core")
    assert core.volume_ml == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.15)
    with pytest.raises(PackageError, match="bright of Core names"):
        parse_manifest(text.replace('within = "Bright thing"', 'within = "Nothing"').encode(), tmp_path)
