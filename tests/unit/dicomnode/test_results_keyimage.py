"""The outline is around the finding, on the finding's image, and what it surrounds stays visible."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset

from dicomnode.findings import Finding, Segment
from dicomnode.results.display import grey_values
from dicomnode.results.keyimage import draw_outline, draw_plain, draw_result
from dicomnode.results.segmentation import encode_segmentation
from results_cases import LIDC, Case, box_of, enhanced, finding_of, heat_map_of, lidc, projection, sphere, synthetic

YELLOW = (255, 210, 0)
FACTOR = 16  # 50 x 60 pixels become 800 x 960


def pixels(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


def outline(png: bytes, rows: int) -> NDArray[np.bool_]:
    """Where the picture has the outline's colour, above the caption."""
    return np.asarray((pixels(png)[:rows] == YELLOW).all(axis=-1))


def as_files(case: Case, folder: Path) -> list[Path]:
    """Write a case as CT files whose pixels count up with the slice."""
    files = []
    for k, header in enumerate(case.headers):
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
        header.RescaleIntercept, header.RescaleSlope = -1024, 1
        header.PixelData = np.full((50, 60), 100 * k, dtype=np.int16).tobytes()
        files.append(folder / f"{len(case.headers) - k}.dcm")
        header.save_as(files[-1], enforce_file_format=True)
    return files


def test_the_outline_surrounds_the_mask_and_leaves_its_inside_alone() -> None:
    image = np.full((50, 60), -600, dtype=np.float32)
    mask = np.zeros((50, 60), dtype=np.bool_)
    mask[10:20, 30:35] = True
    drawn = outline(draw_outline(image, mask, caption="c"), 800)
    large = mask.repeat(FACTOR, axis=0).repeat(FACTOR, axis=1)
    assert not (drawn & large).any()
    rows, columns = np.nonzero(drawn)
    assert (rows.min(), rows.max()) == (10 * FACTOR - 2, 20 * FACTOR + 1)
    assert (columns.min(), columns.max()) == (30 * FACTOR - 2, 35 * FACTOR + 1)


def test_a_mask_at_the_border_is_outlined_without_wrapping_around() -> None:
    mask = np.zeros((50, 60), dtype=np.bool_)
    mask[:5, :5] = True
    drawn = outline(draw_outline(np.zeros((50, 60), dtype=np.float32), mask, caption="c"), 800)
    assert drawn.any()
    assert not drawn[10 * FACTOR :].any()
    assert not drawn[:, 10 * FACTOR :].any()


def test_the_window_maps_its_ends_to_black_and_white() -> None:
    image = np.repeat(np.array([[-1350.0, 150.0]], dtype=np.float32), 2, axis=0).repeat(30, axis=0).repeat(30, axis=1)
    picture = pixels(draw_outline(image, np.zeros(image.shape, dtype=np.bool_), caption="c"))
    assert tuple(picture[5, 5]) == (0, 0, 0)
    assert tuple(picture[5, picture.shape[1] - 5]) == (255, 255, 255)


def test_each_segment_is_drawn_on_the_image_it_names(tmp_path: Path) -> None:
    case = synthetic()
    found = [sphere(case, (0, -10, 110), 9), sphere(case, (10, -20, 120), 7, side="right")]
    seg = encode_segmentation(case.findings(*found), case.volume, case.headers, case.identity)
    assert seg is not None
    (tmp_path / "seg").write_bytes(seg.data)
    pictures = draw_result(as_files(case, tmp_path), tmp_path / "seg")
    assert len(pictures) == 2
    for picture, finding in zip(pictures, found, strict=True):
        areas = finding.segment.mask.sum(axis=(1, 2))
        slice_index = finding.segment.origin[0] + int(areas.argmax())
        grey = int(np.median(pixels(picture)[:800]))
        assert abs(grey - (100 * slice_index - 1024 + 1350) / 1500 * 255) < 2
        rows, columns = np.nonzero(outline(picture, 800))
        centre = np.linalg.inv(case.volume.affine) @ [*finding.centre_lps_mm, 1]
        near = (np.abs(rows / FACTOR - centre[1]) < 8) & (np.abs(columns / FACTOR - centre[2]) < 8)
        assert near.sum() > 100


def test_the_inset_never_covers_the_finding(tmp_path: Path) -> None:
    image = np.full((512, 512), -600, dtype=np.float32)
    for corner in ((10, 10), (10, 480), (480, 10), (480, 480), (250, 250)):
        mask = np.zeros((512, 512), dtype=np.bool_)
        mask[corner[0] : corner[0] + 20, corner[1] : corner[1] + 20] = True
        plain = outline(draw_outline(image, mask, caption="c"), 1024)
        with_inset = outline(draw_outline(image, mask, caption="c", inset=True), 1024)
        assert (with_inset & plain).sum() == plain.sum()
        assert with_inset.sum() > 2 * plain.sum()


def test_without_a_finding_the_middle_image_is_drawn_plain(tmp_path: Path) -> None:
    case = synthetic()
    picture = draw_plain(as_files(case, tmp_path), "no finding")
    assert not outline(picture, 800).any()
    assert abs(int(np.median(pixels(picture)[:800])) - (600 - 1024 + 1350) / 1500 * 255) < 2


def test_a_source_image_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    case = synthetic()
    seg = encode_segmentation(case.findings(sphere(case, (0, -10, 110), 9)), case.volume, case.headers, case.identity)
    assert seg is not None
    (tmp_path / "seg").write_bytes(seg.data)
    with pytest.raises(KeyError):
        draw_result([], tmp_path / "seg")
    with pytest.raises(ValueError, match="no image"):
        draw_plain([])


def written(header: Dataset, folder: Path, stored: NDArray[np.generic], **attributes: object) -> Path:
    """A header with pixels as a file."""
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 0
    header.Rows, header.Columns = stored.shape[-2:]
    header.PixelData = stored.astype(np.uint16).tobytes()
    for keyword, value in attributes.items():
        setattr(header, keyword, value)
    file = folder / f"{header.SOPInstanceUID}.dcm"
    header.save_as(file, enforce_file_format=True)
    return file


def drawn(case: Case, folder: Path, file: Path, *found: Finding) -> list[bytes]:
    seg = encode_segmentation(case.findings(*found), case.volume, case.headers, case.identity)
    assert seg is not None
    (folder / "seg").write_bytes(seg.data)
    return draw_result([file], folder / "seg")


def test_the_frame_that_the_segmentation_names_is_drawn(tmp_path: Path) -> None:
    case = enhanced("MR", WindowCenter="600", WindowWidth="1200")
    numbers = case.volume.frame_numbers
    assert numbers is not None
    stored = np.repeat(np.arange(len(numbers)) * 100, 50 * 60).reshape(-1, 50, 60)
    file = written(case.headers[0], tmp_path, stored)
    (picture,) = drawn(case, tmp_path, file, box_of(case, (4, 10, 20), (1, 5, 8)))
    assert abs(int(np.median(pixels(picture)[:800])) - (numbers[4] - 1) * 100 / 1200 * 255) < 2


@pytest.mark.parametrize(("interpretation", "bright"), [("MONOCHROME1", "left"), ("MONOCHROME2", "right")])
def test_monochrome1_is_shown_the_right_way_round(interpretation: str, bright: str, tmp_path: Path) -> None:
    """Of MONOCHROME1 the smallest value is white (PS3.3 C.7.6.3.1.2)."""
    case = projection("DX")
    stored = np.tile(np.linspace(0, 4000, 60), (80, 1))
    picture = pixels(draw_plain([written(case.headers[0], tmp_path, stored, PhotometricInterpretation=interpretation)]))
    left, right = float(picture[:400, :100].mean()), float(picture[:400, 600:700].mean())
    assert (left > right + 100) == (bright == "left")
    assert (right > left + 100) == (bright == "right")


def test_a_large_radiograph_is_reduced_and_its_outline_stays_where_it_was(tmp_path: Path) -> None:
    case = projection("DX")
    stored = np.zeros((4000, 3000))
    file = written(case.headers[0], tmp_path, stored)
    case = replace(case, volume=replace(case.volume, voxels=np.zeros((1, 4000, 3000), dtype=np.int16)))
    small = box_of(case, (0, 0, 0), (1, 3, 3))
    found = replace(small, segment=Segment(mask=np.ones((1, 400, 200), dtype=np.bool_), origin=(0, 2000, 500)))
    picture = drawn(case, tmp_path, file, found)[0]
    height, width = pixels(picture).shape[:2]
    assert (width, height) < (1100, 1200)
    rows, columns = np.nonzero((pixels(picture)[:1024, :400] == (0, 200, 255)).all(axis=-1))
    scale = 1024 / 4000
    assert rows.min() == pytest.approx(2000 * scale, abs=4)
    assert rows.max() == pytest.approx(2400 * scale, abs=4)
    assert columns.min() == pytest.approx(500 * scale, abs=4)


def test_boxes_and_heat_maps_have_colours_of_their_own(tmp_path: Path) -> None:
    case = projection("DX")
    file = written(case.headers[0], tmp_path, np.zeros((80, 60)))
    part = Segment(mask=np.ones((1, 5, 5), dtype=np.bool_), origin=(0, 10, 10))
    pictures = drawn(case, tmp_path, file, finding_of(case, part), box_of(case, (0, 30, 30), (1, 5, 5)), heat_map_of(case, part))
    for picture, colour in zip(pictures, (YELLOW, (0, 200, 255), (255, 140, 0)), strict=True):
        assert (pixels(picture)[:700] == colour).all(axis=-1).any()


def test_an_image_that_cannot_be_decoded_is_a_note_and_no_crash(tmp_path: Path) -> None:
    case = projection("DX")
    file = written(case.headers[0], tmp_path, np.zeros((80, 60)))
    broken = pydicom.dcmread(file)
    broken.PixelData = broken.PixelData[:100]
    broken.save_as(file)
    (picture,) = drawn(case, tmp_path, file, box_of(case, (0, 30, 30), (1, 5, 5)))
    assert (pixels(picture)[:700] == (0, 200, 255)).all(axis=-1).any()
    assert len(draw_plain([file])) > 0


def test_a_study_without_an_image_has_no_picture(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no DICOM", encoding="utf-8")
    with pytest.raises(ValueError, match="no image"):
        draw_plain([tmp_path / "text"])


def test_a_long_reason_is_broken_into_lines_and_cut(tmp_path: Path) -> None:
    case = projection("DX")
    file = written(case.headers[0], tmp_path, np.zeros((80, 60)))
    short, long, endless = (pixels(draw_plain([file], "word " * count)).shape[0] for count in (1, 60, 6000))
    assert short < long < endless < short + 200


def test_no_more_than_twenty_segments_are_drawn(tmp_path: Path) -> None:
    case = projection("DX")
    file = written(case.headers[0], tmp_path, np.zeros((80, 60)))
    assert len(drawn(case, tmp_path, file, *(box_of(case, (0, k, k), (1, 3, 3)) for k in range(25)))) == 20


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name", ["CR-ModalitySequenceLUT.dcm", "MG1_J2KI.dcm", "RG1_J2KI.dcm", "gdcm-CR-MONO1-10-chest.dcm", "highdicom_dx_image.dcm"]
)
def test_real_radiographs_are_shown_with_what_is_dense_bright(name: str) -> None:
    file = LIDC.parent / "xr" / name
    if not file.exists():
        pytest.skip("../shared/data/xr is absent")
    grey = grey_values(file)
    assert grey is not None
    assert np.ptp(grey) == 255
    assert float(np.median(grey)) > float(np.percentile(grey, 1)) + 20  # the body is brighter than the air around it


@pytest.mark.realdata
def test_the_readers_nodule_of_a_real_ct_is_outlined_where_it_is_bright(tmp_path: Path) -> None:
    if not LIDC.is_dir():
        pytest.skip("../shared/data/ct_chest_lidc is absent")
    case, files, nodule = lidc()
    seg = encode_segmentation(case.findings(nodule), case.volume, case.headers, case.identity)
    assert seg is not None
    (tmp_path / "seg").write_bytes(seg.data)
    (picture,) = draw_result(files, tmp_path / "seg")
    rows, columns = np.nonzero(outline(picture, 1024)[400:])
    inside = pixels(picture)[400 + int(rows.mean()), int(columns.mean())]
    assert inside.min() > 200


@pytest.mark.parametrize("shape", [(968, 912), (912, 968), (60, 1024), (30, 30)])
def test_a_finding_as_large_as_its_image_has_no_inset(shape: tuple[int, int]) -> None:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[2:-2, 2:-2] = True
    image = np.zeros(shape, dtype=np.float32)
    assert draw_outline(image, mask, caption="c", inset=True) == draw_outline(image, mask, caption="c")
