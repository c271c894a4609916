"""A sphere in the patient stays where it is, and as large, all the way: files, volume, the network's grid, findings, SEG."""

import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from ct_series import write_series
from enhanced_images import SHARED, at, enhanced_image, write_image
from hypothesis import HealthCheck, given, settings, strategies as st
from numpy.typing import NDArray
from pydicom.uid import EnhancedCTImageStorage
from scipy.spatial.transform import Rotation
from small_bundle import MANIFEST, affine_of, spheres, write_package

from dicomnode.analysis.frames import read_headers
from dicomnode.analysis.grid import resample_to
from dicomnode.analysis.inference import Model, load_model
from dicomnode.analysis.manifest import parse_manifest
from dicomnode.analysis.package import digest_of
from dicomnode.analysis.select import SelectedSeries, select
from dicomnode.analysis.volume import read_volume
from dicomnode.findings import Finding, Findings, RunIdentity, Volume
from dicomnode.results.proof import prove
from dicomnode.results.report import encode_report
from dicomnode.results.segmentation import encode_segmentation

TEXT = MANIFEST.replace('["1.2.840.10008.5.1.4.1.1.2"]', f'["1.2.840.10008.5.1.4.1.1.2", "{EnhancedCTImageStorage}"]')
PACKAGE = parse_manifest(TEXT.encode(), Path("bright"))
IDENTITY = RunIdentity(
    study_instance_uid="2.25.5",
    revision=1,
    package="bright",
    version="1.0",
    digest="0" * 64,
    run=1,
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
)
PATIENT: dict[str, Any] = {
    "PatientName": "", "PatientID": "1", "PatientBirthDate": "", "PatientSex": "", "StudyID": "", "StudyDate": "20260101",
    "StudyTime": "120000", "AccessionNumber": "", "ReferringPhysicianName": "", "BodyPartExamined": "CHEST",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A cube of about 60 mm around a point of the patient, turned at random, with one sphere of 400 HU in air."""

    stored: NDArray[np.int16]
    affine: NDArray[np.float64]
    centre: NDArray[np.float64]
    radius: float

    @property
    def spacing(self) -> NDArray[np.float64]:
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))


def scan_of(rng: np.random.Generator, *, near: NDArray[np.float64] | None = None) -> Scan:
    spacing = rng.uniform((1.0, 0.6, 0.6), (3.0, 1.4, 1.4))
    shape = np.ceil(60 / spacing).astype(int)
    turned = Rotation.random(rng=rng).as_matrix()
    if np.linalg.det(np.column_stack([turned[:, 2], turned[:, 1], turned[:, 0]])) < 0:
        turned[:, 0] *= -1  # slices in the direction in which the node sorts them, so that voxels can be compared by index
    affine = affine_of((spacing[0], spacing[1], spacing[2]), (0, 0, 0), turned)
    middle = rng.uniform(-200, 200, 3) if near is None else near
    affine[:3, 3] = middle - affine[:3, :3] @ ((shape - 1) / 2)
    centre, radius = middle + rng.uniform(-8, 8, 3), float(rng.uniform(9, 14))
    values = spheres((shape[0], shape[1], shape[2]), affine, [((centre[0], centre[1], centre[2]), radius)])
    return Scan(stored=np.rint(values).astype(np.int16), affine=affine, centre=centre, radius=radius)


def written(folder: Path, scan: Scan, rng: np.random.Generator, *, enhanced: bool, number: int = 0) -> list[Path]:
    """Write a scan as classic images, shuffled, or as one enhanced image with its frames shuffled."""
    along_row, along_column = (scan.affine[:3, axis] / scan.spacing[axis] for axis in (2, 1))
    pixel_mm, orientation = [round(float(v), 9) for v in scan.spacing[1:]], [round(float(v), 9) for v in (*along_row, *along_column)]
    order = rng.permutation(len(scan.stored))
    positions = [scan.affine[:3, 3] + k * scan.affine[:3, 0] for k in range(len(scan.stored))]
    if enhanced:
        shared = {
            "PlaneOrientationSequence": {"ImageOrientationPatient": orientation},
            "PixelMeasuresSequence": {"PixelSpacing": pixel_mm, "SliceThickness": round(float(scan.spacing[0]), 9)},
            "PixelValueTransformationSequence": {**SHARED["PixelValueTransformationSequence"], "RescaleIntercept": 0},
        }
        image = enhanced_image(
            [at(*positions[k]) for k in order], shared=shared, stored=scan.stored[order], SOPClassUID=EnhancedCTImageStorage, Modality="CT",
            SeriesInstanceUID=f"2.25.6.{number}", SOPInstanceUID=f"2.25.71.{number}", **PATIENT,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        return [write_image(folder / "image.dcm", image)]
    files = write_series(
        folder, scan.stored, spacing=(float(scan.spacing[0]), pixel_mm[0], pixel_mm[1]), orientation=tuple(orientation),
        origin=tuple(float(v) for v in positions[0]), RescaleIntercept=0, SeriesNumber=number, **PATIENT,
    )  # fmt: skip
    return [files[k] for k in order]


def assert_is_the_sphere(finding: Finding, scan: Scan, volume: Volume) -> None:
    """Centre within half a voxel along each axis of the image; volume as of a radius that is off by a quarter of a voxel at most."""
    offset = volume.to_index(np.array(finding.centre_lps_mm)) - volume.to_index(scan.centre)
    assert np.abs(offset).max() <= 0.5
    radius = (finding.volume_ml * 1000 * 3 / (4 * math.pi)) ** (1 / 3)
    assert abs(radius - scan.radius) <= 0.25 * float(scan.spacing.max())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_package(tmp_path_factory.mktemp("package") / "bright", manifest=TEXT)
    return load_model(folder, digest=digest_of(folder), device="cpu")


def analysed(model: Model, files: list[Path]) -> tuple[SelectedSeries, Volume, Findings]:
    (series,) = select(PACKAGE, read_headers(files)).series
    volume = read_volume(series)
    return series, volume, model({"image": volume})


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 100_000), enhanced=st.booleans())
def test_a_sphere_stays_where_it_is_from_its_files_to_its_segmentation(
    tmp_path_factory: pytest.TempPathFactory, model: Model, seed: int, enhanced: bool
) -> None:
    rng = np.random.default_rng(seed)
    scan = scan_of(rng)
    series, volume, findings = analysed(model, written(tmp_path_factory.mktemp("series"), scan, rng, enhanced=enhanced))
    np.testing.assert_allclose(volume.affine, scan.affine, atol=1e-4)
    np.testing.assert_array_equal(volume.voxels, scan.stored)
    (finding,) = findings.findings
    assert_is_the_sphere(finding, scan, volume)

    segmentation = encode_segmentation(findings, volume, series.headers, IDENTITY)
    assert segmentation is not None
    prove(segmentation, encode_report(findings, volume, series.headers, IDENTITY, segmentation), findings, volume)
    seen = highdicom.seg.segread(BytesIO(segmentation.data)).get_volume(combine_segments=True)
    places = np.argwhere(seen.array > 0) @ seen.affine[:3, :3].T + seen.affine[:3, 3]
    np.testing.assert_allclose(places.mean(axis=0), finding.centre_lps_mm, atol=1e-3)
    assert len(places) * abs(np.linalg.det(seen.affine[:3, :3])) / 1000 == pytest.approx(finding.volume_ml, rel=1e-4)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 100_000))
def test_a_sphere_stays_where_it_is_when_its_series_is_brought_onto_anothers_voxels(
    tmp_path_factory: pytest.TempPathFactory, model: Model, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    first = scan_of(rng)
    second = scan_of(rng, near=first.affine[:3, :3] @ ((np.array(first.stored.shape) - 1) / 2) + first.affine[:3, 3])
    volumes = [
        analysed(model, written(tmp_path_factory.mktemp("series"), scan, rng, enhanced=enhanced, number=n))[1]
        for n, (scan, enhanced) in enumerate([(first, False), (second, True)])
    ]
    moved = resample_to(volumes[1], volumes[0])
    (finding,) = model({"image": replace(moved, series_instance_uid=volumes[0].series_instance_uid)}).findings
    offset = volumes[0].to_index(np.array(finding.centre_lps_mm)) - volumes[0].to_index(second.centre)
    assert np.abs(offset).max() <= 0.5
    radius = (finding.volume_ml * 1000 * 3 / (4 * math.pi)) ** (1 / 3)
    assert abs(radius - second.radius) <= 0.25 * max(first.spacing.max(), second.spacing.max())
