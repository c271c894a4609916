"""A segmentation of projections that scores the whole image and gives boxes: by its manifest's own rule, on every backend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_bundle import MANIFEST, write_package

from dicomnode.analysis.backends import available
from dicomnode.analysis.image_score import image_score, marked_share
from dicomnode.analysis.inference import check_package, largest_difference, load_model
from dicomnode.analysis.manifest import ImageScoreSection, Manifest, parse_manifest
from dicomnode.analysis.package import digest_of
from dicomnode.errors import PackageError
from dicomnode.findings import Findings, Volume

RULE = ImageScoreSection(above=0.6, floor=0.001, intercept=6.0, slope=1.5, threshold=0.5)
HEAD, OUTPUT = MANIFEST[: MANIFEST.index("[input]")], MANIFEST[MANIFEST.index("[[outputs]]") :]
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
SCORED = """shape = "box"
image_score = { above = 0.6, floor = 0.001, intercept = 6.0, slope = 1.5, threshold = 0.5 }
"""


def film(bright: tuple[slice, slice], *, calibration: str = "detector") -> Volume:
    pixels = np.zeros((1, 96, 128), dtype=np.float32)
    pixels[0][bright] = 1000.0
    return Volume(
        voxels=pixels, affine=np.array([[0.0, 0, 0.2, 0], [0, 0.5, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]), sop_instance_uids=("1.2.3",),
        series_instance_uid="1.2", study_instance_uid="1", frame_of_reference_uid=None, modality="DX", calibration=calibration,
    )  # type: ignore[arg-type]  # fmt: skip  # one of its literals


LARGE, SMALL, NOTHING = (slice(20, 41), slice(70, 101)), (slice(20, 25), slice(70, 75)), (slice(0, 0), slice(0, 0))


def package(folder: Path, extra: str = SCORED) -> Path:
    """Whatever is bright is marked: p = sigmoid(40 x - 20)."""
    config = {"network_def": {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 1, "kernel_size": 1}}
    weights = {"weight": torch.full((1, 1, 1, 1), 40.0), "bias": torch.full((1,), -20.0)}
    write_package(folder, manifest=HEAD + FILM + OUTPUT + "\n" + extra, config=config, weights=weights)
    return folder


def run(folder: Path, volume: Volume) -> Findings:
    return load_model(folder, digest=digest_of(folder), device="cpu")({"image": volume})


def scored(output_changes: str) -> Manifest:
    return parse_manifest((HEAD + FILM + OUTPUT + "\n" + output_changes).encode(), Path("p"))


def test_the_probability_is_a_logistic_of_the_marked_share_s_logarithm() -> None:
    output = scored(SCORED).outputs[0]
    for share in (0.0, 0.004, 0.02, 1.0):
        score = image_score(output, RULE, share)
        assert score.probability == pytest.approx(1 / (1 + math.exp(-(6.0 + 1.5 * math.log(share + 0.001)))))
        assert score.positive == (score.probability > 0.5)
        assert (score.label, score.threshold) == (output.label, 0.5)
    rising = [image_score(output, RULE, share).probability for share in np.linspace(0, 1, 50)]
    assert rising == sorted(rising)


def test_the_share_is_of_the_region_alone() -> None:
    values = np.zeros((1, 10, 10), dtype=np.float32)
    values[0, :5] = 0.9
    region = np.zeros(values.shape, dtype=np.bool_)
    region[0, 3:7] = True
    assert marked_share(values, region, 0.6) == 0.5
    assert marked_share(values, None, 0.6) == 0.5
    assert marked_share(values, region, 0.95) == 0
    assert marked_share(values, np.zeros_like(region), 0.6) == 0


def test_a_positive_film_has_boxes_with_edges_and_no_outline(tmp_path: Path) -> None:
    findings = run(package(tmp_path / "p"), film(LARGE))
    (score,) = findings.scores
    assert score.positive
    share = 21 * 31 / (96 * 128)
    assert score.probability == pytest.approx(1 / (1 + math.exp(-(6.0 + 1.5 * math.log(share + 0.001)))), abs=0.03)
    (found,) = findings.findings
    assert found.shape == "box"
    assert found.long_axis is None
    assert found.segment.mask.all()
    assert np.abs(np.subtract(found.bounds_px, (69.5, 19.5, 100.5, 40.5))).max() <= 2  # a pixel of the network's grid
    edges = {measurement.name.meaning: measurement for measurement in found.measurements}
    left, top, right, bottom = found.bounds_px
    assert edges["Width"].value == pytest.approx(0.2 * (right - left))
    assert edges["Height"].value == pytest.approx(0.5 * (bottom - top))
    assert edges["Width"].unit.value == "mm"
    pixels = run(tmp_path / "p", film(LARGE, calibration="none")).findings[0].measurements
    assert {measurement.unit.value for measurement in pixels} == {"{pixels}"}


@pytest.mark.parametrize("bright", [SMALL, NOTHING])
def test_a_negative_film_says_so_with_a_number_and_without_a_box(bright: tuple[slice, slice], tmp_path: Path) -> None:
    findings = run(package(tmp_path / "p"), film(bright))
    (score,) = findings.scores
    assert not score.positive
    assert 0 < score.probability < 0.5
    assert findings.findings == ()
    alone = run(package(tmp_path / "q", 'shape = "box"\n'), film(bright))
    assert alone.scores == ()
    assert len(alone.findings) == (bright is SMALL)


def test_a_positive_film_has_a_place_even_if_no_component_is_sure_enough(tmp_path: Path) -> None:
    folder = package(tmp_path / "p", SCORED.replace('shape = "box"', 'shape = "box"\nminimum_mm2 = 5000.0'))
    findings = run(folder, film(LARGE))
    assert findings.scores[0].positive
    assert len(findings.findings) == 1


def test_other_backends_give_the_same_score_and_boxes(tmp_path: Path) -> None:
    folder = package(tmp_path / "p")
    report = check_package(folder, {"image": film(LARGE)}, device="cpu")
    assert report["scores"]["Bright thing"] > 0.5
    for name in available(torch.device("cpu")):
        row = report["backends"][name]
        if name == "torch" or "reason" in row:
            continue
        assert row["passed"] == (row["dice"] >= 0.998 and row["score_difference"] <= 0.002)
    said = load_model(folder, digest=digest_of(folder), device="cpu")({"image": film(LARGE)}).scores
    other = load_model(folder, digest=digest_of(folder), device="cpu")({"image": film(SMALL)}).scores
    assert largest_difference(said, said) == 0
    assert largest_difference(said, other) == 1  # only one of them is positive


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + FILM + OUTPUT + SCORED.replace("above = 0.6", "above = 0.4"), "without a finding"),
        (MANIFEST + SCORED, "segmentation of projections"),
        (HEAD + FILM + OUTPUT + SCORED.replace("slope = 1.5", "slope = -1.0"), "slope"),
        (HEAD + FILM + OUTPUT + SCORED.replace("threshold = 0.5 }", "threshold = 1.5 }"), "threshold"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(text: str, words: str) -> None:
    with pytest.raises(PackageError, match=words):
        parse_manifest(text.encode(), Path("p"))


def any_kind(**changes: Any) -> dict[str, Any]:
    return {"above": 0.5, "intercept": 0.0, "slope": 1.0, "threshold": 0.5, **changes}


def test_a_share_of_zero_has_a_logarithm() -> None:
    assert ImageScoreSection(**any_kind()).floor > 0
    with pytest.raises(ValueError, match="floor"):
        ImageScoreSection(**any_kind(floor=0.0))
