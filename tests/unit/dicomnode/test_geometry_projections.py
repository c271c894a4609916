"""A projection's millimetres: at the detector, in the patient, or nowhere (PS3.3 10.7.1)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.frames import Frame, frames_of, read_headers
from dicomnode.analysis.geometry import plane_of

REAL = Path(__file__).parents[3].parent / "shared" / "data"


def radiograph(**values: Any) -> Frame:
    header = Dataset()
    for keyword, value in {"Rows": 2000, "Columns": 1600, **values}.items():
        setattr(header, keyword, value)
    return Frame(file=Path("x"), image=header, number=None, header=header)


@pytest.mark.parametrize(
    ("values", "spacing", "calibration"),
    [
        ({}, (1.0, 1.0), "none"),
        ({"ImagerPixelSpacing": [0.2, 0.1]}, (0.2, 0.1), "detector"),
        ({"PixelSpacing": [0.2, 0.2]}, (0.2, 0.2), "detector"),  # of old CR: nobody says that it was calibrated
        ({"NominalScannedPixelSpacing": [0.2, 0.2]}, (0.2, 0.2), "detector"),
        ({"PixelSpacing": [0.2, 0.2], "ImagerPixelSpacing": [0.2, 0.2]}, (0.2, 0.2), "detector"),
        ({"PixelSpacing": [0.16, 0.16], "ImagerPixelSpacing": [0.2, 0.2]}, (0.16, 0.16), "patient"),
        ({"PixelSpacing": [0.2, 0.2], "PixelSpacingCalibrationType": "GEOMETRY"}, (0.2, 0.2), "patient"),
        ({"PixelSpacing": [0.2, 0.2], "PixelSpacingCalibrationType": "FIDUCIAL"}, (0.2, 0.2), "patient"),
        ({"PixelSpacing": [0.2, 0.2], "PixelSpacingCalibrationType": "GUESS"}, (0.2, 0.2), "detector"),
        ({"ImagerPixelSpacing": [0.2, 0.2], "EstimatedRadiographicMagnificationFactor": 1.25}, (0.16, 0.16), "patient"),
        ({"ImagerPixelSpacing": [0.2, 0.2], "EstimatedRadiographicMagnificationFactor": 1}, (0.2, 0.2), "detector"),
        ({"ImagerPixelSpacing": [0.2, 0.2], "EstimatedRadiographicMagnificationFactor": 0}, (0.2, 0.2), "detector"),
        ({"ImagerPixelSpacing": [0.2, 0.2], "EstimatedRadiographicMagnificationFactor": 50}, (0.2, 0.2), "detector"),
        ({"PixelSpacing": [0.4, 0.4], "ImagerPixelSpacing": [0.2, 0.2]}, (1.0, 1.0), "none"),  # nothing shrinks on its way to the detector
        ({"PixelSpacing": [0.16, 0.3], "ImagerPixelSpacing": [0.2, 0.2]}, (1.0, 1.0), "none"),
        ({"PixelSpacing": [0.04, 0.04], "ImagerPixelSpacing": [0.2, 0.2]}, (1.0, 1.0), "none"),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.2, 0.2]}, (0.2, 0.2), "detector"),
        ({"PixelSpacing": [0.2, 0.2], "ImagerPixelSpacing": [0, 0]}, (0.2, 0.2), "detector"),
        ({"ImagerPixelSpacing": [0, 0]}, (1.0, 1.0), "none"),
        ({"ImagerPixelSpacing": [-0.2, 0.2]}, (1.0, 1.0), "none"),
        ({"ImagerPixelSpacing": [1, 1]}, (1.0, 1.0), "none"),  # two metres
        ({"ImagerPixelSpacing": [0.2, 0.5]}, (1.0, 1.0), "none"),
        ({"ImagerPixelSpacing": 0.2}, (1.0, 1.0), "none"),
        ({"ImagerPixelSpacing": []}, (1.0, 1.0), "none"),
    ],
)
def test_the_spacing_of_a_projection_lies_where_the_header_says(
    values: dict[str, Any], spacing: tuple[float, float], calibration: str
) -> None:
    plane = plane_of(radiograph(**values))
    assert (plane.spacing_mm, plane.calibration) == (pytest.approx(spacing), calibration)
    np.testing.assert_allclose(plane.affine @ [0, 3, 5, 1], [5 * spacing[1], 3 * spacing[0], 0, 1])  # x along the rows, y along the columns
    assert abs(np.linalg.det(plane.affine)) > 0


@pytest.mark.parametrize(
    ("values", "code"), [({"Rows": None}, "missing-geometry"), ({"Rows": 0}, "missing-geometry"), ({"Columns": 60000}, "too-large")]
)
def test_a_projection_without_a_size_is_refused(values: dict[str, Any], code: str) -> None:
    with pytest.raises(NotEligible) as caught:
        plane_of(radiograph(**values))
    assert caught.value.code == code


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("file", "calibration", "row_mm"),
    [("RG1_J2KI.dcm", "none", 1.0), ("gdcm-CR-MONO1-10-chest.dcm", "none", 1.0), ("highdicom_dx_image.dcm", "detector", 1.2)],
)
def test_real_radiographs_have_the_calibration_of_their_headers(file: str, calibration: str, row_mm: float) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent")
    (frame,) = frames_of(read_headers([REAL / "xr" / file]))
    plane = plane_of(frame)
    assert (plane.calibration, plane.spacing_mm[0]) == (calibration, row_mm)
