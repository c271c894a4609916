"""Which series a package accepts: by headers and geometry, with one code per reason and no patient data in any."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_series import AXIAL, slice_dataset, write_series
from hypothesis import given, settings, strategies as st
from pydicom.dataset import Dataset
from small_bundle import MANIFEST

from dicomnode.analysis.eligibility import REASONS, NotEligible
from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.geometry import stack_of
from dicomnode.analysis.manifest import Manifest, parse_manifest
from dicomnode.analysis.select import SelectedSeries, select
from dicomnode.errors import AnalysisFailed

PACKAGE = parse_manifest(MANIFEST.encode(), Path("bright"))
Headers = list[tuple[Path, Dataset]]


def select_series(manifest: Manifest, headers: list[tuple[Path, Dataset]]) -> SelectedSeries:
    return select(manifest, headers).series[0]


def series(slices: int = 8, *, spacing: float = 2.0, step: tuple[float, float, float] = (0.0, 0.0, 1.0), **values: Any) -> Headers:
    """Return headers of a plain axial chest CT; slice k lies at k * spacing * step."""
    plane = np.zeros((4, 4), dtype=np.int16)
    images = [slice_dataset(plane, np.array(step) * spacing * k, k, spacing=(0.7, 0.7), **values) for k in range(slices)]
    return [(Path(f"{values.get('SeriesNumber', 0)}-{k}"), image) for k, image in enumerate(images)]


def change(keyword: str, value: Any, only: int | None = None) -> Callable[[Headers], None]:
    def apply(headers: Headers) -> None:
        for k, (_, header) in enumerate(headers):
            if only is None or k == only:
                if value is None:
                    delattr(header, keyword)
                else:
                    setattr(header, keyword, value)

    return apply


def remove(k: int) -> Callable[[Headers], None]:
    def apply(headers: Headers) -> None:
        del headers[k]

    return apply


def refusal(headers: Headers) -> NotEligible:
    with pytest.raises(NotEligible) as caught:
        select_series(PACKAGE, headers)
    assert caught.value.code in REASONS
    assert "Doe" not in caught.value.reason
    assert "SECRET" not in caught.value.reason
    return caught.value


@pytest.mark.parametrize(
    ("code", "spoil"),
    [
        ("modality", change("Modality", "MR")),
        ("sop-class", change("SOPClassUID", "1.2.840.10008.5.1.4.1.1.7")),
        ("image-type", change("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])),
        ("image-type", change("ImageType", ["DERIVED", "SECONDARY", "MPR"])),
        ("image-type", change("ImageType", ["ORIGINAL", "PRIMARY", "AXIAL", "SCREEN SAVE"])),
        ("body-part", change("BodyPartExamined", "HEAD")),
        ("pixel-format", change("SamplesPerPixel", 3)),
        ("pixel-format", change("NumberOfFrames", 5)),
        ("pixel-format", change("BitsAllocated", 32)),
        ("pixel-format", change("PhotometricInterpretation", "PALETTE COLOR")),
        ("not-hu", change("RescaleSlope", None, only=3)),
        ("not-hu", change("RescaleIntercept", None)),
        ("not-hu", change("RescaleType", "EDW")),
        ("missing-geometry", change("ImagePositionPatient", None, only=2)),
        ("missing-geometry", change("ImageOrientationPatient", None)),
        ("missing-geometry", change("ImageOrientationPatient", [1, 0, 0, 1, 0, 0])),
        ("missing-geometry", change("ImageOrientationPatient", [2, 0, 0, 0, 2, 0])),
        ("missing-geometry", change("ImagePositionPatient", [0, 0])),
        ("missing-geometry", change("PixelSpacing", None)),
        ("missing-geometry", change("PixelSpacing", [0, 0.7])),
        ("missing-geometry", change("FrameOfReferenceUID", None, only=1)),
        ("missing-geometry", change("Rows", None)),
        ("mixed-size", change("Rows", 5, only=4)),
        ("mixed-size", change("PixelSpacing", [0.8, 0.7], only=4)),
        ("mixed-orientation", change("ImageOrientationPatient", [0, 1, 0, 0, 0, -1], only=4)),
        ("mixed-orientation", change("ImageOrientationPatient", [0.9998477, 0.0174524, 0, -0.0174524, 0.9998477, 0], only=4)),
        ("mixed-frame-of-reference", change("FrameOfReferenceUID", "2.25.9", only=4)),
        ("too-large", change("Columns", 60000)),
        ("duplicate-positions", change("ImagePositionPatient", [0, 0, 4], only=3)),
        ("gantry-tilt", change("GantryDetectorTilt", 12.5)),
        ("gantry-tilt", change("ImagePositionPatient", [3, 0, 6], only=3)),
        ("missing-slices", remove(4)),
        ("uneven-spacing", change("ImagePositionPatient", [0, 0, 6.8], only=3)),
        ("spacing", change("PixelSpacing", [2.0, 2.0])),
    ],
)
def test_a_series_that_does_not_fit_is_refused_with_its_code(code: str, spoil: Callable[[Headers], None]) -> None:
    headers = series()
    spoil(headers)
    assert refusal(headers).code == code


def test_a_series_that_fits_is_sorted_by_position_whatever_the_instance_numbers_say() -> None:
    headers = series()
    for k, (_, header) in enumerate(headers):
        header.InstanceNumber = 100 - 7 * k % 5
    selected = select_series(PACKAGE, headers[::2] + headers[1::2])
    assert [float(h.ImagePositionPatient[2]) for h in selected.headers] == [2.0 * k for k in range(8)]
    assert [f.name for f in (frame.file for frame in selected.frames)] == [f"0-{k}" for k in range(8)]


@pytest.mark.parametrize(("slices", "spacing", "code"), [(3, 2.0, "too-few-slices"), (8, 10.0, "spacing"), (8, 0.1, "spacing")])
def test_slice_count_and_distance_must_be_in_the_manifests_range(slices: int, spacing: float, code: str) -> None:
    assert refusal(series(slices, spacing=spacing)).code == code


def test_more_slices_than_the_package_reads_are_refused() -> None:
    few = parse_manifest(MANIFEST.replace("minimum_slices = 4", "minimum_slices = 4\nmaximum_slices = 7").encode(), Path("bright"))
    with pytest.raises(NotEligible) as caught:
        select_series(few, series(8))
    assert caught.value.code == "too-many-slices"


def test_a_tilted_gantry_is_seen_by_the_shear_alone() -> None:
    tilt = np.deg2rad(10)
    orientation = [1, 0, 0, 0, float(np.cos(tilt)), float(-np.sin(tilt))]  # tilted planes that move along the table
    assert refusal(series(ImageOrientationPatient=orientation)).code == "gantry-tilt"


def test_an_oblique_series_along_its_own_normal_is_no_tilt() -> None:
    tilt = np.deg2rad(10)
    orientation = [1, 0, 0, 0, float(np.cos(tilt)), float(-np.sin(tilt))]
    headers = series(ImageOrientationPatient=orientation, step=(0.0, float(np.sin(tilt)), float(np.cos(tilt))))
    assert stack_of([h for _, h in headers]).spacing_mm[0] == pytest.approx(2.0, abs=1e-4)


def test_two_acquisitions_at_the_same_positions_are_not_one_volume() -> None:
    headers = series(AcquisitionNumber=1)
    again = series(AcquisitionNumber=2)
    assert refusal(headers + again).code == "several-acquisitions"


def test_acquisitions_that_follow_each_other_are_one_volume() -> None:
    headers = series()
    for k, (_, header) in enumerate(headers):
        header.AcquisitionNumber = k // 2 + 1  # axial step and shoot
    assert len(select_series(PACKAGE, headers).frames) == 8


def test_a_body_part_that_is_absent_is_accepted_where_the_manifest_says_so() -> None:
    headers = series(BodyPartExamined=None)
    assert select_series(PACKAGE, headers)
    strict = parse_manifest(MANIFEST.replace("minimum_slices", "body_part_may_be_absent = false\nminimum_slices").encode(), Path("bright"))
    with pytest.raises(NotEligible) as caught:
        select_series(strict, headers)
    assert caught.value.code == "body-part"


def test_a_localizer_within_the_series_is_left_out_and_said() -> None:
    headers = series()
    headers[0][1].ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    headers[0][1].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    selected = select_series(PACKAGE, headers)
    assert len(selected.frames) == 7
    assert "1 other image(s) of the series left out" in selected.why


def test_a_later_reconstruction_marked_original_secondary_is_accepted() -> None:
    assert select_series(PACKAGE, series(ImageType=["ORIGINAL", "SECONDARY", "AXIAL"]))


@pytest.mark.parametrize(
    ("first", "second", "chosen", "rule"),
    [
        ({"SliceThickness": 5.0}, {"SliceThickness": 1.0}, 2, "thinnest slices"),
        ({"slices": 8}, {"slices": 12}, 2, "most images"),
        ({}, {}, 1, "lowest series number"),
        ({"spacing": 1.0, "SliceThickness": 3.0}, {"SliceThickness": 2.0}, 2, "thinnest slices"),  # overlapping slices aren't thin
    ],
)
def test_of_two_that_fit_the_rule_chooses_and_is_named(first: dict[str, Any], second: dict[str, Any], chosen: int, rule: str) -> None:
    selected = select_series(PACKAGE, series(SeriesNumber=1, **first) + series(SeriesNumber=2, **second))
    assert selected.headers[0].SeriesNumber == chosen
    assert "chosen among 2" in selected.why
    assert rule in selected.why


def test_what_does_not_fit_is_named_beside_what_does() -> None:
    selected = select_series(PACKAGE, series(SeriesNumber=1) + series(SeriesNumber=2, Modality="SR"))
    assert "Series 1: 8 slices, 2.00 mm apart" in selected.why
    assert "1 series modality" in selected.why


def test_the_refusal_is_that_of_the_closest_candidate_and_names_the_others() -> None:
    gap = series(SeriesNumber=2)
    del gap[4]
    caught = refusal(series(SeriesNumber=1, Modality="MR") + gap + series(3, SeriesNumber=3))
    assert caught.code == "missing-slices"
    assert caught.reason.startswith("Series 2: ")
    assert "1 series modality" in caught.reason
    assert "1 series too-few-slices" in caught.reason


def test_a_study_without_images_is_refused() -> None:
    assert refusal([]).code == "no-images"


def test_positions_rounded_to_a_tenth_are_even_enough() -> None:
    headers = series(40)
    for k, (_, header) in enumerate(headers):
        header.ImagePositionPatient = [0, 0, round(0.625 * k, 1)]
    assert len(select_series(PACKAGE, headers).frames) == 40


def test_headers_are_read_without_pixels_and_a_file_that_is_no_dicom_is_an_error(tmp_path: Path) -> None:
    files = write_series(tmp_path, np.zeros((4, 3, 3), dtype=np.int16), orientation=AXIAL)
    headers = read_headers(files)
    assert [f for f, _ in headers] == files
    assert all("PixelData" not in h for _, h in headers)
    (tmp_path / "other").write_bytes(b"no DICOM")
    with pytest.raises(AnalysisFailed, match="other"):
        read_headers([tmp_path / "other"])


def test_a_code_outside_the_table_cannot_be_raised() -> None:
    with pytest.raises(ValueError, match="no code of REASONS"):
        NotEligible("bad-luck", "x")


@settings(max_examples=50, deadline=None)
@given(order=st.permutations(range(8)), offset=st.floats(-1000, 1000), spacing=st.floats(0.5, 5.0))
def test_the_stack_is_the_same_in_every_order_of_images(order: list[int], offset: float, spacing: float) -> None:
    headers = [h for _, h in series(spacing=spacing)]
    for header in headers:
        header.ImagePositionPatient = [0, 0, round(float(header.ImagePositionPatient[2]) + offset, 6)]
    stack, shuffled = stack_of(headers), stack_of([headers[i] for i in order])
    np.testing.assert_array_equal(stack.affine, shuffled.affine)
    assert [order[i] for i in shuffled.order] == list(stack.order)
