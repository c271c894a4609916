"""Cases from DICOM images and the SEG objects that were made on them: files in, cases out.

Segments become labels by name; several segments of one label in one or several SEG objects are taken together. A SEG belongs to the
images that it names; one that names images which aren't there is refused. Which label a missing segment is (absent, or nobody looked)
the files can't say: `dataset_build.Plan.missing` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.uid import SegmentationStorage

from dicomnode.analysis.attributes import text_of, value_of
from dicomnode.analysis.candidates import SelectedSeries
from dicomnode.analysis.eligibility import number_of
from dicomnode.analysis.frames import frames_of, read_headers
from dicomnode.analysis.geometry import stacks_of
from dicomnode.analysis.grid import resample_to
from dicomnode.analysis.manifest import Manifest
from dicomnode.analysis.select import select
from dicomnode.analysis.subject import age_years
from dicomnode.analysis.volume import read_volume
from dicomnode.errors import AnalysisFailed, UsageError
from dicomnode.findings import Volume
from dicomnode.training.dataset import Mask
from dicomnode.training.dataset_build import age_band
from dicomnode.training.segmentations import SegFile, SegmentRule, masks_of, read_seg
from dicomnode.training.sources import AnnotatedCase, Source

CHANNEL = "image"  # where no manifest names one
NOBODY = ""  # images without a Patient ID are taken for one patient: then nothing of anybody can stand in two splits

HALF = 0.5  # of a voxel that another channel's mask covers

Headers = Sequence[tuple[Path, Dataset]]


def dicom_files(folder: Path) -> list[Path]:
    """Return the DICOM files (PS3.10 7.1) below a folder.

    Raises:
        UsageError: there is none.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "DICOMDIR" and _is_dicom(path)]
    if not files:
        raise UsageError(f"{folder} holds no DICOM file; label maps in NIfTI or NRRD need a layout")
    return files


def dicom_sources(files: Sequence[Path], *, manifest: Manifest | None, rules: Sequence[SegmentRule]) -> Iterator[Source]:
    """Yield the cases of images and SEG objects.

    With a manifest each study is one: the series that the package would be given are its channels. Without, each series that a SEG
    was made on is one of a single channel, and so is the only series of a study.

    Raises:
        UsageError: a file isn't readable, or a SEG names none of the images.
    """
    try:
        headers = read_headers(files)
    except AnalysisFailed as error:
        raise UsageError(str(error)) from error
    images = [(file, header) for file, header in headers if text_of(header, "SOPClassUID") != SegmentationStorage]
    series_of = {text_of(header, "SOPInstanceUID"): text_of(header, "SeriesInstanceUID") for _, header in images}
    segs: dict[str, list[SegFile]] = {}
    for file, header in headers:
        if text_of(header, "SOPClassUID") == SegmentationStorage:
            read = read_seg(file, rules)
            named = {series_of[uid] for uid in read.images if uid in series_of}
            if not named:
                raise UsageError(f"{file} refers to images that aren't there")
            for series in named:
                segs.setdefault(series, []).append(read)
    for study in _by(images, "StudyInstanceUID").values():
        yield from _chosen(study, segs, manifest) if manifest else _marked(study, segs, rules)


def _chosen(study: Headers, segs: Mapping[str, Sequence[SegFile]], manifest: Manifest) -> Iterator[Source]:
    marked = [entry for entry in study if text_of(entry[1], "SeriesInstanceUID") in segs]
    considered = marked if marked and len(manifest.inputs) == 1 else study  # of several series that fit, the one that was marked
    channels, labels = ([each.name for each in manifest.inputs], [output.label for output in manifest.outputs])
    yield _source(study, channels, labels, lambda: _read(select(manifest, considered).series, segs))


def _marked(study: Headers, segs: Mapping[str, Sequence[SegFile]], rules: Sequence[SegmentRule]) -> Iterator[Source]:
    by_series = {uid: headers for uid, headers in _by(study, "SeriesInstanceUID").items() if frames_of(headers)}
    for uid, headers in by_series.items():
        if uid in segs or len(by_series) == 1:
            labels = [rule.label for rule in rules] or [label for seg in segs.get(uid, ()) for label in seg.labels.values()]
            yield _source(headers, [CHANNEL], labels, partial(_read_series, uid, headers, segs))


def _read_series(uid: str, headers: Headers, segs: Mapping[str, Sequence[SegFile]]) -> AnnotatedCase:
    named = frozenset[str]().union(*(seg.images for seg in segs.get(uid, ())))
    parts = stacks_of(frames_of(headers))
    part = max(parts, key=lambda part: sum(text_of(frame.image, "SOPInstanceUID") in named for frame in part.frames))
    return _read([SelectedSeries(input_name=CHANNEL, series_instance_uid=uid, frames=part.frames, why="")], segs)


def _read(chosen: Sequence[SelectedSeries], segs: Mapping[str, Sequence[SegFile]]) -> AnnotatedCase:
    volumes: dict[str, Volume] = {}
    masks: dict[str, Mask] = {}
    for series in chosen:
        volume = read_volume(series)
        first = next(iter(volumes.values()), volume)
        volumes[series.input_name] = resample_to(volume, first)
        for seg in segs.get(series.series_instance_uid, ()):
            for label, mask in masks_of(seg, volume).items():
                placed = mask if volume is first else resample_to(replace(volume, voxels=mask.astype(np.float32)), first).voxels > HALF
                masks[label] = masks[label] | placed if label in masks else placed
    return AnnotatedCase(volumes=volumes, masks=masks, attributes=_attributes(chosen[0].frames[0].header, next(iter(volumes.values()))))


def _source(headers: Headers, channels: Sequence[str], labels: Sequence[str], read: Callable[[], AnnotatedCase]) -> Source:
    file, header = headers[0]
    study = text_of(header, "StudyInstanceUID")
    return Source(
        name=f"{file.parent}, series {text_of(header, 'SeriesInstanceUID')}",
        patient=text_of(header, "PatientID").strip() or NOBODY, study=study, kind="DICOM", modality=text_of(header, "Modality"),
        channels=tuple(channels), labels=tuple(dict.fromkeys(labels)), read=read,
    )  # fmt: skip


def _attributes(header: Dataset, volume: Volume) -> dict[str, str | float | None]:
    thickness = number_of(value_of(header, "SliceThickness"))
    return {
        "scanner": " ".join(filter(None, (text_of(header, "Manufacturer"), text_of(header, "ManufacturerModelName")))) or None,
        "slice_thickness_mm": None if volume.is_projection else round(thickness or volume.spacing_mm[0], 3),
        "sex": text_of(header, "PatientSex") or None,
        "age_band": age_band(age_years(header)),
    }


def _by(headers: Headers, keyword: str) -> dict[str, list[tuple[Path, Dataset]]]:
    """The headers by a UID, each SOP instance once, in the files' order."""
    groups: dict[str, list[tuple[Path, Dataset]]] = {}
    seen: set[str] = set()
    for file, header in headers:
        uid = text_of(header, "SOPInstanceUID")
        if uid not in seen:
            seen.add(uid)
            groups.setdefault(text_of(header, keyword), []).append((file, header))
    return groups


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"
