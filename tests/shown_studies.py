"""Small phantom studies, CT, MR and X-ray, with one finding at a known place and what the node's encoders make of it, for viewers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from highdicom.color import CIELabColor
from numpy.typing import NDArray
from pydicom import dcmread

from dicomnode.findings import Code, Finding, Findings, ResultObject, Volume
from dicomnode.phantoms.acquisition import scan
from dicomnode.phantoms.chest import chest_scene
from dicomnode.phantoms.dicom import MR, SeriesHeader, write_ct_series
from dicomnode.phantoms.film import DX, Film, write_film
from dicomnode.phantoms.head import head_scene
from dicomnode.phantoms.shapes import Grid
from dicomnode.phantoms.studies import DEMO_PROTOCOL, ball_in_lung, chest_film, chest_grid, head_images
from dicomnode.pipeline import _encoded as encoded  # what the analyser does with a model's findings
from dicomnode.results.profile import Profile, parts
from results_cases import Case, box_of, identity, sphere


@dataclass(frozen=True, kw_only=True)
class ShownStudy:
    """A study as files, and its one finding."""

    case: Case
    files: list[Path]
    findings: Findings

    @property
    def study_instance_uid(self) -> str:
        """Of the study."""
        return self.case.volume.study_instance_uid

    @property
    def finding(self) -> Finding:
        """The one finding."""
        (finding,) = self.findings.findings
        return finding

    def results(self, profile: Profile) -> list[ResultObject]:
        """What a peer of this profile is given: encoded and proved as the node does it."""
        made = encoded(self.findings, (self.case.volume,), self.case.headers, self.case.identity, frozenset(parts(profile)), supersedes=())
        return [one for part in parts(profile) for one in made.get(part, ())]

    @property
    def colour(self) -> NDArray[np.float64]:
        """The finding's own, red, green and blue: 0 to 255."""
        return np.array(CIELabColor(*self.finding.colour_cielab).to_rgb(clip=True), dtype=np.float64)

    @property
    def inside(self) -> NDArray[np.float64]:
        """The pixels of the finding in its key slice: (n, 2) of (column, row), pixel centres at whole numbers."""
        first, row, column = self.finding.segment.origin
        return np.argwhere(self.finding.segment.mask[self.finding.key_slice - first])[:, ::-1] + np.array([column, row], dtype=np.float64)

    @property
    def scale(self) -> NDArray[np.float64]:
        """Pixels of a key image, whose longer side has 1024, to one of the image: (columns, rows)."""
        (_, row_mm, column_mm), (_, rows, columns) = self.case.volume.spacing_mm, self.case.volume.voxels.shape
        return 1024 / max(rows * row_mm, columns * column_mm) * np.array([column_mm, row_mm])

    @property
    def outline(self) -> NDArray[np.float64]:
        """Where a key image has its outline left and right of each row of the finding: (n, 2) of (column, row) in its own pixels."""
        places, inside = [], self.inside
        for row in np.unique(inside[:, 1]):
            columns = inside[inside[:, 1] == row, 0]
            for edge, beside in ((columns.min(), -1), (columns.max() + 1, 1)):
                places.append(np.array([edge, row + 0.5]) * self.scale - 0.5 + [beside, 0])
        return np.array(places)

    def mirrored(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points of an image, (n, 2) of (column, row), on the other side."""
        return np.array([self.case.volume.voxels.shape[2] - 1, 0]) + points * [-1, 1]

    def mirrored_picture(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points of a key image on the other side."""
        return np.array([round(self.case.volume.voxels.shape[2] * self.scale[0]) - 1, 0]) + points * [-1, 1]

    def other(self, package: str, *found: Finding) -> ShownStudy:
        """The same images as another package sees them; by default it finds nothing."""
        case = replace(self.case, identity=replace(self.case.identity, package=package))
        return replace(self, case=case, findings=replace(case.findings(*found), package=package))


def chest_ct(folder: Path) -> ShownStudy:
    """Ten slices of a chest with a nodule of 18 mm in the right lung."""
    scene = chest_scene(42)
    nodule = ball_in_lung(scene, diameter_mm=18.0, right=True, seed=0)
    grid = chest_grid(scene, pixel_mm=2.9, slice_mm=4.0, pixels=128)
    x, y, _ = grid.origin_lps_mm
    grid = Grid(origin_lps_mm=(x, y, nodule.centre_lps_mm[2] - 20.0), spacing_mm=grid.spacing_mm, shape=(10, 128, 128))
    header = SeriesHeader(seed="shown ct", patient_name="PHANTOM^SHOWN CT", patient_id="PHANTOM-CT", thickness_mm=4.0)
    files = write_ct_series(folder, scan(scene.with_nodules((nodule,)), grid, DEMO_PROTOCOL), grid.affine, header)
    case = _case(files, grid)
    return ShownStudy(case=case, files=files, findings=case.findings(sphere(case, nodule.centre_lps_mm, 18.0, side="right")))


def head_mr(folder: Path) -> ShownStudy:
    """Ten slices of a head, FLAIR, with a glioma of about 50 mm."""
    glioma = head_scene(9, glioma_mm=50.0).glioma
    assert glioma is not None
    centre = np.asarray(glioma.oedema.centre, dtype=np.float64)
    grid = Grid(origin_lps_mm=(-102.0, -128.0, float(centre[2]) - 25.0), spacing_mm=(5.0, 2.0, 2.0), shape=(10, 128, 102))
    voxels = head_images(9, grid.affine, grid.shape, ("flair",), thickness_mm=5.0, glioma_mm=50.0)["flair"]
    header = SeriesHeader(
        seed="shown mr", patient_name="PHANTOM^SHOWN MR", patient_id="PHANTOM-MR", thickness_mm=5.0, sop_class_uid=MR, contrast="flair",
        study_description="Synthetic head", series_description="Synthetic FLAIR", body_part="HEAD",
        image_type=("ORIGINAL", "PRIMARY", "OTHER"),
    )  # fmt: skip
    files = write_ct_series(folder, voxels, grid.affine, header)
    case = _case(files, grid)
    tumour = replace(
        sphere(case, centre.tolist(), 36.0, side=None), label="Glioma", colour_cielab=(60.0, -50.0, 40.0),
        type=Code(value="393564001", scheme="SCT", meaning="Glioma"), site=Code(value="12738006", scheme="SCT", meaning="Brain"),
    )  # fmt: skip
    return ShownStudy(case=case, files=files, findings=case.findings(tumour))


def chest_film_dx(folder: Path) -> ShownStudy:
    """A frontal film of a chest and a box in it, as a detection says it."""
    film = Film(pixels=chest_film(18, pixel_mm=2.0, step_mm=(5.0, 8.0, 5.0), opacities_mm=(42.0,)), pixel_mm=2.0)
    header = SeriesHeader(
        seed="shown dx", patient_name="PHANTOM^SHOWN DX", patient_id="PHANTOM-DX", sop_class_uid=DX, series_description="Synthetic DX",
        image_type=("ORIGINAL", "PRIMARY", ""),
    )  # fmt: skip
    files = write_film(folder, film, header)
    image = dcmread(files[0])
    affine = np.zeros((4, 4))
    affine[0, 2], affine[1, 1], affine[2, 0], affine[3, 3] = film.pixel_mm, film.pixel_mm, 1.0, 1.0
    volume = Volume(
        voxels=image.pixel_array[None].astype(np.float32), affine=affine, sop_instance_uids=(str(image.SOPInstanceUID),),
        series_instance_uid=str(image.SeriesInstanceUID), study_instance_uid=str(image.StudyInstanceUID), frame_of_reference_uid=None,
        modality="DX", calibration="detector",
    )  # fmt: skip
    case = Case(volume=volume, headers=[image], identity=identity(volume.study_instance_uid))
    return ShownStudy(case=case, files=files, findings=case.findings(box_of(case, (0, 50, 30), (1, 24, 30), side="right")))


def _case(files: Sequence[Path], grid: Grid) -> Case:
    """The written series as the encoders get it."""
    images = [dcmread(file) for file in files]
    voxels = np.stack(
        [image.pixel_array * float(image.get("RescaleSlope", 1)) + float(image.get("RescaleIntercept", 0)) for image in images]
    )
    first = images[0]
    volume = Volume(
        voxels=voxels.astype(np.float32), affine=grid.affine, sop_instance_uids=tuple(str(image.SOPInstanceUID) for image in images),
        series_instance_uid=str(first.SeriesInstanceUID), study_instance_uid=str(first.StudyInstanceUID),
        frame_of_reference_uid=str(first.FrameOfReferenceUID), modality=str(first.Modality),
    )  # fmt: skip
    return Case(volume=volume, headers=images, identity=identity(str(first.StudyInstanceUID)))
