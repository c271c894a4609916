"""DICOM images with SEG objects of the node, highdicom and dcmqi become cases, and a SEG that doesn't fit its images is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom
import nrrd
import numpy as np
import pydicom
import pytest
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from labelled_studies import CENTRES, SHAPE, ball, findings_of, headers_of, read_series, write_seg, write_study
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.analysis.manifest import Manifest
from dicomnode.errors import UsageError
from dicomnode.training.dataset import DataSet, read_case
from dicomnode.training.dataset_build import Plan, build_dataset
from dicomnode.training.dicom_sources import dicom_files, dicom_sources
from dicomnode.training.recipe import load_recipe
from dicomnode.training.segmentations import SegmentRule
from results_cases import Case as ResultCase, box_of

SHARED = Path(__file__).parents[4] / "shared" / "data"
RECIPES = Path(__file__).parents[3] / "dicomnode" / "training" / "recipes"
PLAN = Plan(name="nodules", terms="made here")
NODULE = SegmentRule(label="Lung nodule", pattern="*nodule*")


def built(folder: Path, plan: Plan = PLAN, *, rules: tuple[SegmentRule, ...] = (), manifest: Manifest | None = None) -> DataSet:
    sources = list(dicom_sources(dicom_files(folder / "studies"), manifest=manifest, rules=rules))
    out = folder / f"out{len(list(folder.glob('out*')))}"
    return build_dataset(out, sources, replace(plan, labels=tuple(rule.label for rule in rules))).dataset


def changed_seg(file: Path, change: Callable[[Dataset], object]) -> None:
    seg = pydicom.dcmread(file)
    change(seg)
    seg.save_as(file)


def test_a_seg_of_the_node_becomes_the_truth_to_the_voxel(tmp_path: Path) -> None:
    study = write_study(tmp_path / "studies" / "a", "a", patient_id="SECRET-7", patient_age="067Y")
    write_seg(study, CENTRES)
    dataset = built(tmp_path)
    (row,) = dataset.cases
    case = read_case(dataset, row)
    volume = read_series(study)
    assert dataset.labels == ("Lung nodule",)
    assert np.array_equal(case.volumes["image"].voxels, volume.voxels)
    assert np.allclose(case.volumes["image"].affine, volume.affine)
    assert np.array_equal(case.truth[0], ball(volume, CENTRES[0]) | ball(volume, CENTRES[1]))
    assert row.attributes == {"scanner": "dicomnode phantoms synthetic chest", "slice_thickness_mm": 2.5, "sex": "O", "age_band": "60-69"}
    assert "SECRET" not in (dataset.folder / "dataset.json").read_text()


def test_the_files_may_come_in_any_order_and_twice(tmp_path: Path) -> None:
    study = write_study(tmp_path / "studies" / "a", "a")
    write_seg(study, CENTRES[:1])
    for number, file in enumerate(sorted(study.glob("*.dcm"))):
        (tmp_path / "studies" / f"{(number * 7) % 31:02d}").write_bytes(file.read_bytes())
    (tmp_path / "studies" / "notes.txt").write_text("no DICOM")
    dataset = built(tmp_path)
    assert len(dataset.cases) == 1
    assert np.array_equal(read_case(dataset, dataset.cases[0]).truth[0], ball(read_series(study), CENTRES[0]))


def highdicom_seg(study: Path, masks: NDArray[np.uint8], labels: list[str]) -> Path:
    """A SEG as highdicom itself writes it: all frames, overlapping segments."""
    images = headers_of(study)
    code = highdicom.sr.CodedConcept("27925004", "SCT", "Nodule")
    seg = Segmentation(
        source_images=images, pixel_array=np.moveaxis(masks, 0, -1), segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[
            SegmentDescription(
                segment_number=number, segment_label=label, segmented_property_category=code, segmented_property_type=code,
                algorithm_type=SegmentAlgorithmTypeValues.MANUAL,
            )
            for number, label in enumerate(labels, start=1)
        ],
        series_instance_uid=highdicom.UID(), series_number=9, sop_instance_uid=highdicom.UID(), instance_number=1,
        manufacturer="m", manufacturer_model_name="n", software_versions="1", device_serial_number="1", omit_empty_frames=False,
    )  # fmt: skip
    seg.save_as(study / "highdicom.dcm")
    return study / "highdicom.dcm"


def test_a_seg_of_highdicom_with_overlapping_segments_is_read(tmp_path: Path) -> None:
    study = write_study(tmp_path / "studies" / "a", "a", descending=True)
    volume = read_series(study)
    masks = np.stack([ball(volume, CENTRES[0]), ball(volume, CENTRES[0], 8.0), np.zeros(SHAPE, np.bool_)]).astype(np.uint8)
    order = [volume.sop_instance_uids.index(image.SOPInstanceUID) for image in headers_of(study)]
    highdicom_seg(study, masks[:, order], ["Nodule", "Core", "Cyst 1"])
    with pytest.raises(UsageError, match="the label Cyst is empty"):
        built(tmp_path)
    dataset = built(tmp_path, replace(PLAN, empty="absent"))
    assert dataset.labels == ("Nodule", "Core", "Cyst")
    assert dataset.cases[0].labels == {"Nodule": "present", "Core": "present", "Cyst": "absent"}
    assert np.array_equal(read_case(dataset, dataset.cases[0]).truth, masks.astype(np.bool_))


def test_a_seg_of_dcmqi_is_read(tmp_path: Path) -> None:
    study = write_study(tmp_path / "studies" / "a", "a")
    volume = read_series(study)
    mask = ball(volume, CENTRES[1]).astype(np.uint8)
    affine = volume.affine
    header = {
        "space": "left-posterior-superior", "space directions": affine[:3, [2, 1, 0]].T, "space origin": affine[:3, 3],
    }  # fmt: skip
    nrrd.write(str(tmp_path / "map.nrrd"), np.ascontiguousarray(mask.transpose(2, 1, 0)), header)
    code = {"CodeValue": "27925004", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Nodule"}
    segment = {
        "labelID": 1, "SegmentDescription": "Nodule", "SegmentLabel": "Nodule", "SegmentAlgorithmType": "MANUAL",
        "SegmentedPropertyCategoryCodeSequence": code, "SegmentedPropertyTypeCodeSequence": code,
    }  # fmt: skip
    meta = {
        "ContentCreatorName": "Reader", "SeriesDescription": "x", "SeriesNumber": "9", "InstanceNumber": "1",
        "segmentAttributes": [[segment]], "ContentLabel": "SEG", "ContentDescription": "x", "ClinicalTrialTimePointID": "1",
    }  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    command = [
        Path(sys.executable).parent / "itkimage2segimage", "--inputImageList", tmp_path / "map.nrrd", "--inputDICOMDirectory", study,
        "--inputMetadata", tmp_path / "meta.json", "--outputDICOM", tmp_path / "studies" / "a" / "dcmqi.dcm",
    ]  # fmt: skip
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert (tmp_path / "studies" / "a" / "dcmqi.dcm").exists(), ended.stdout + ended.stderr
    dataset = built(tmp_path)
    assert np.array_equal(read_case(dataset, dataset.cases[0]).truth[0], mask.astype(np.bool_))


def test_segments_are_chosen_by_name_and_by_the_models_codes(tmp_path: Path) -> None:
    study = write_study(tmp_path / "studies" / "a", "a")
    write_seg(study, CENTRES[:1])
    by_name = built(tmp_path, rules=(SegmentRule(label="Tumour", pattern="lung nod*"),))
    manifest = load_recipe(RECIPES / "lung-nodule-ct.toml").package
    output = manifest.outputs[0]
    rules = (SegmentRule(label=output.label, pattern="something else", type=output.type.code()),)
    by_code = built(tmp_path, rules=rules, manifest=manifest)
    assert by_name.labels == ("Tumour",)
    assert by_code.labels == ("Lung nodule",)
    assert by_name.cases[0].truth_sha256 == by_code.cases[0].truth_sha256


def test_with_a_model_the_series_is_the_one_that_the_node_would_take(tmp_path: Path) -> None:
    manifest = load_recipe(RECIPES / "lung-nodule-ct.toml").package
    study = write_study(tmp_path / "studies" / "a", "a")
    write_seg(study, CENTRES)
    write_study(tmp_path / "studies" / "knee", "b", patient_id="P2", body_part="KNEE")
    sources = list(dicom_sources(dicom_files(tmp_path / "studies"), manifest=manifest, rules=[NODULE]))
    result = build_dataset(tmp_path / "out", sources, replace(PLAN, labels=("Lung nodule",), missing="absent"))
    assert [row.labels for row in result.dataset.cases] == [{"Lung nodule": "present"}]
    ((name, why),) = result.refused
    assert "knee" in name
    assert "KNEE" in why or "body" in why.lower()


def test_a_study_without_a_seg_is_no_negative_until_somebody_says_so(tmp_path: Path) -> None:
    write_seg(write_study(tmp_path / "studies" / "a", "a"), CENTRES)
    write_study(tmp_path / "studies" / "b", "b", patient_id="P2")
    with pytest.raises(UsageError, match=r"studies/b, series .*the label Lung nodule is missing"):
        built(tmp_path)
    dataset = built(tmp_path, replace(PLAN, missing="absent"))
    assert sorted(row.labels["Lung nodule"] for row in dataset.cases) == ["absent", "present"]


def test_a_box_is_no_outline(tmp_path: Path) -> None:
    study = write_study(tmp_path / "studies" / "a", "a")
    volume, headers = read_series(study), headers_of(study)
    case = ResultCase(volume=volume, headers=headers, identity=findings_of(volume, headers, CENTRES[:1])[1])
    write_seg(study, (), found=[box_of(case, (3, 20, 20), (2, 6, 6))])
    with pytest.raises(UsageError, match="hold no label"):
        built(tmp_path)


def shift(seg: Any, by_mm: tuple[float, float, float]) -> None:
    for item in seg.PerFrameFunctionalGroupsSequence:
        place = item.PlanePositionSequence[0]
        place.ImagePositionPatient = [float(a) + b for a, b in zip(place.ImagePositionPatient, by_mm, strict=True)]


def widen(seg: Any) -> None:
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1.0, 1.05]


def rename(seg: Any) -> None:
    for series in seg.ReferencedSeriesSequence:
        for instance in series.ReferencedInstanceSequence:
            instance.ReferencedSOPInstanceUID += ".1"
    for item in seg.PerFrameFunctionalGroupsSequence:
        item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID += ".1"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda seg: setattr(seg, "SegmentationType", "FRACTIONAL"), "is a SEG of the type FRACTIONAL"),
        (lambda seg: setattr(seg, "FrameOfReferenceUID", "1.2.3"), "another frame of reference"),
        (lambda seg: setattr(seg, "PixelData", seg.PixelData[:10]), "fewer pixels or functional groups"),
        (lambda seg: delattr(seg, "SegmentSequence"), "no readable SEG"),
        (lambda seg: delattr(seg.SharedFunctionalGroupsSequence[0], "PixelMeasuresSequence"), "malformed SEG"),
        (lambda seg: shift(seg, (0, 0, 2.5)), "is shifted: it lies on no plane"),
        (lambda seg: shift(seg, (0, 0, 1.4)), "is shifted: it lies on no plane"),
        (lambda seg: shift(seg, (1.5, 0, 0)), "is shifted: its pixels don't lie"),
        (widen, "is shifted: its pixels don't lie"),
        (rename, "refers to images that aren't there"),
    ],
)
def test_a_seg_that_does_not_fit_its_images_is_refused_by_its_name(
    tmp_path: Path, change: Callable[[Dataset], object], sentence: str
) -> None:
    file = write_seg(write_study(tmp_path / "studies" / "a", "a"), CENTRES)
    changed_seg(file, change)
    with pytest.raises(UsageError, match=rf"{file}.*{sentence}"):
        built(tmp_path)


def test_a_seg_within_half_a_voxel_is_taken_as_it_is(tmp_path: Path) -> None:
    study = write_study(tmp_path / "studies" / "a", "a")
    changed_seg(write_seg(study, CENTRES[:1]), lambda seg: shift(seg, (0.4, -0.4, 1.1)))
    dataset = built(tmp_path)
    assert np.array_equal(read_case(dataset, dataset.cases[0]).truth[0], ball(read_series(study), CENTRES[0]))


def test_a_seg_whose_images_were_deleted_is_refused(tmp_path: Path) -> None:
    study = write_study(tmp_path / "studies" / "a", "a")
    write_seg(study, CENTRES[:1])
    volume = read_series(study)
    middle = round(float(volume.to_index(np.array(CENTRES[0]))[0]))
    for file in study.glob("*.dcm"):
        header = pydicom.dcmread(file, stop_before_pixels=True)
        if header.Modality == "CT" and volume.sop_instance_uids.index(header.SOPInstanceUID) >= middle:
            file.unlink()
    with pytest.raises(UsageError, match="refers to images that aren't there"):
        built(tmp_path)


def test_images_without_a_patient_id_are_taken_for_one_patient(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_seg(write_study(tmp_path / "studies" / name, name, patient_id=""), CENTRES)
    dataset = built(tmp_path, replace(PLAN, shares=(0.4, 0.3, 0.3)))
    assert len({row.patient for row in dataset.cases}) == 1
    assert len({row.split for row in dataset.cases}) == 1


def test_a_folder_without_dicom_is_refused(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "image.nii").write_bytes(b"x" * 400)
    with pytest.raises(UsageError, match="holds no DICOM file"):
        built(tmp_path)
    (tmp_path / "studies" / "broken").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 40)
    with pytest.raises(UsageError, match="broken cannot be read"):
        built(tmp_path)


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is absent")
def test_a_real_seg_of_dcmqi_is_its_label_map(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    for name in ("dcmqi_01", "dcmqi_02", "dcmqi_03", "dcmqi_liver"):
        (tmp_path / "studies" / name).write_bytes((SHARED / "sr_seg_examples" / f"{name}.dcm").read_bytes())
    dataset = built(tmp_path)
    case = read_case(dataset, dataset.cases[0])
    values, _ = nrrd.read(str(SHARED / "sr_seg_examples" / "dcmqi_liver_seg.nrrd"))
    assert dataset.labels == ("Liver",)
    assert case.truth[0].sum() == (values > 0).sum()
    assert np.array_equal(case.truth[0], values.transpose(2, 1, 0) > 0)
