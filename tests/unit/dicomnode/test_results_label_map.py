"""A label map says voxel by voxel what the findings say, in runs that another decoder reads, and a wrong one doesn't leave."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_frames

from dicomnode.errors import ProofFailed
from dicomnode.findings import Findings, ResultObject, Segment
from dicomnode.results.label_map import SOP_CLASS, label_frames
from dicomnode.results.proof import prove
from dicomnode.results.report import encode_report
from dicomnode.results.segmentation import encode_segmentation
from results_cases import Case, enhanced, finding_of, projection, sphere, synthetic, written_again


def labels_of(case: Case, findings: Findings) -> ResultObject:
    made = encode_segmentation(findings, case.volume, case.headers, case.identity, kind="seg-labelmap")
    assert made is not None
    return made


def read(made: ResultObject) -> Dataset:
    return pydicom.dcmread(BytesIO(made.data))


def neighbours(case: Case) -> Findings:
    """Two that touch, one of them at the image's corner, and one far away."""
    rng = np.random.default_rng(1)
    rough = rng.random((3, 9, 12)) < 0.6
    rough[:, 0, 0] = rough[:, -1, -1] = True
    rough[[0, -1]] = True
    return case.findings(
        finding_of(case, Segment(mask=rough, origin=(0, 0, 0))),
        finding_of(case, Segment(mask=np.ones((2, 5, 7), dtype=np.bool_), origin=(1, 2, 12)), side="right"),
        sphere(case, case.volume.to_lps(np.array([8.0, 30.0, 40.0])).tolist(), 6),
    )


def expected(case: Case, findings: Findings) -> np.ndarray:
    volume = np.zeros(case.volume.voxels.shape, dtype=np.uint8)
    for finding in findings.findings:
        k, r, c = finding.segment.origin
        n, h, w = finding.segment.mask.shape
        volume[k : k + n, r : r + h, c : c + w][finding.segment.mask] = finding.number
    return volume


@pytest.mark.parametrize("case", [synthetic(), synthetic("oblique", reverse=True), enhanced("MR")], ids=["axial", "oblique", "frames"])
def test_each_voxel_holds_the_number_of_its_finding(case: Case) -> None:
    findings = neighbours(case)
    made = labels_of(case, findings)
    image, wanted = read(made), expected(case, findings)
    planes = [k for k in range(len(wanted)) if wanted[k].any()]
    np.testing.assert_array_equal(image.pixel_array, wanted[planes])
    assert (image.SOPClassUID, image.SegmentationType, image.file_meta.TransferSyntaxUID) == (SOP_CLASS, "LABELMAP", "1.2.840.10008.1.2.5")
    sources = [frame.DerivationImageSequence[0].SourceImageSequence[0] for frame in image.PerFrameFunctionalGroupsSequence]
    assert [str(source.ReferencedSOPInstanceUID) for source in sources] == [case.volume.sop_instance_uids[k] for k in planes]
    report = encode_report(findings, case.volume, case.headers, case.identity, made)
    prove(made, report, findings, case.volume)
    other = encode_report(findings, case.volume, case.headers, case.identity, encode_segmentation(
        findings, case.volume, case.headers, case.identity))  # fmt: skip
    assert (report.sop_instance_uid, report.series_instance_uid) != (other.sop_instance_uid, other.series_instance_uid)


def test_highdicom_reads_the_same_segments() -> None:
    case = synthetic()
    findings = neighbours(case)
    seg = highdicom.seg.segread(BytesIO(labels_of(case, findings).data))
    wanted = expected(case, findings)
    for number in (1, 2, 3):
        got = seg.get_volume(segment_numbers=[number], combine_segments=True).array
        assert int(np.count_nonzero(got)) == int((wanted == number).sum())


def test_a_second_encoding_gives_the_same_bytes() -> None:
    case = synthetic()
    assert labels_of(case, neighbours(case)).data == labels_of(case, neighbours(case)).data


@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 300])
def test_another_decoder_reads_the_runs(columns: int) -> None:
    """Rows of every length around that of a run; each encoded by itself (PS3.5 G.3.1)."""
    rng = np.random.default_rng(columns)
    case = synthetic(shape=(1, 7, columns))
    masks = rng.random((3, 7, columns)) < 0.5
    wanted = np.where(masks[0], 1, np.where(masks[1], 2, 0)).astype(np.uint8)
    found = [finding_of(case, Segment(mask=np.ones((1, 1, 1), dtype=np.bool_), origin=(0, 0, 0))) for _ in range(2)]
    findings = [replace(one, number=n, segment=Segment(mask=(wanted == n)[None], origin=(0, 0, 0))) for n, one in enumerate(found, start=1)]
    (frame,) = generate_frames(label_frames(findings, [0], (7, columns)), number_of_frames=1)
    decoded = pydicom.pixels.decoders.rle._rle_decode_frame(frame, 7, columns, 1, 8)
    np.testing.assert_array_equal(np.frombuffer(decoded, dtype=np.uint8).reshape(7, columns), wanted)


def test_what_a_label_map_cannot_say_is_binary() -> None:
    case, film = synthetic(), projection("DX")
    block = np.ones((2, 6, 6), dtype=np.bool_)
    overlapping = case.findings(*(finding_of(case, Segment(mask=block, origin=(2, 4, c))) for c in (5, 8)))
    on_film = film.findings(finding_of(film, Segment(mask=block[:1], origin=(0, 10, 10))))
    for this, findings in ((case, overlapping), (film, on_film)):
        binary = encode_segmentation(findings, this.volume, this.headers, this.identity)
        assert labels_of(this, findings) == binary


def test_a_label_map_with_other_voxels_does_not_leave() -> None:
    case = synthetic()
    findings = neighbours(case)
    made = labels_of(case, findings)
    report = encode_report(findings, case.volume, case.headers, case.identity, made)

    def changed(how: str) -> ResultObject:
        image = read(made)
        frames = image.pixel_array.copy()
        if how == "flipped":
            frames = frames[:, :, ::-1]
        if how == "one voxel more":
            frames[0, 30, 30] = 1
        if how == "exchanged":
            frames = np.choose(frames, np.array([0, 2, 1, 3], dtype=np.uint8)).astype(np.uint8)
        if how == "of nobody":
            frames[0, 30, 30] = 9
        if how == "one slice on":
            groups = image.PerFrameFunctionalGroupsSequence
            groups[0].DerivationImageSequence, groups[1].DerivationImageSequence = (
                groups[1].DerivationImageSequence, groups[0].DerivationImageSequence,
            )  # fmt: skip
        encoder = pydicom.pixels.encoders.base.get_encoder("1.2.840.10008.1.2.5")
        options = {"rows": 50, "columns": 60, "samples_per_pixel": 1, "bits_allocated": 8, "bits_stored": 8, "pixel_representation": 0,
                   "photometric_interpretation": "MONOCHROME2", "number_of_frames": 1}  # fmt: skip
        image.PixelData = encapsulate(
            [encoder.encode(np.ascontiguousarray(frame), encoding_plugin="pydicom", **options) for frame in frames]
        )
        return replace(made, parts=(written_again(image),))

    prove(changed("not at all"), report, findings, case.volume)
    for how in ("flipped", "one voxel more", "exchanged", "of nobody", "one slice on"):
        with pytest.raises(ProofFailed):
            prove(changed(how), report, findings, case.volume)
