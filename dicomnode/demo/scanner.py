"""The simulated scanner: finds the studies in a folder and sends each over one association."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_preamble

from dicomnode.dimse.contexts import STORAGE_CLASSES
from dicomnode.dimse.scp import StoreRequest, is_uid, part10_prefix
from dicomnode.dimse.scu import Outgoing, send
from dicomnode.errors import UsageError
from storage.records import Peer

TAGS: list[Any] = ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Modality"]
IMAGES = {entry.uid for entry in STORAGE_CLASSES if entry.kind == "image"}


@dataclass(kw_only=True)
class ScannedStudy:
    """A study of the folder, and what became of sending it."""

    study_instance_uid: str
    folder: Path
    outgoing: list[Outgoing] = field(default_factory=list)
    series: dict[str, str] = field(default_factory=dict)  # Series Instance UID -> modality
    series_of: dict[str, str] = field(default_factory=dict)  # SOP Instance UID -> Series Instance UID
    sent: set[str] = field(default_factory=set)
    sent_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    receive_seconds: float = 0.0
    settled_at: datetime | None = None

    @property
    def images_accepted(self) -> int:
        """How many image instances the node took."""
        return sum(item.sop_class_uid in IMAGES for item in self.outgoing if item.sop_instance_uid in self.sent)

    @property
    def files(self) -> list[Path]:
        """The files that the node took."""
        return [item.path for item in self.outgoing if item.sop_instance_uid in self.sent]

    @property
    def instances_sent(self) -> Counter[str]:
        """Instances taken by the node, per Series Instance UID."""
        return Counter(self.series_of[uid] for uid in self.sent)


def scan_folder(folder: Path) -> tuple[list[ScannedStudy], list[dict[str, str]]]:
    """Read the headers of every file below `folder`; return the studies in it and what is no DICOM.

    Raises:
        UsageError: there is no such folder, or no DICOM file in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    studies: dict[str, ScannedStudy] = {}
    not_sent = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
            study = str(header.StudyInstanceUID)
            item = Outgoing(
                sop_class_uid=str(header.SOPClassUID),
                sop_instance_uid=str(header.SOPInstanceUID),
                transfer_syntax_uid=str(header.file_meta.TransferSyntaxUID),
                path=path,
            )
            series, modality = str(header.SeriesInstanceUID), str(header.get("Modality", ""))
        except InvalidDicomError:
            not_sent.append({"file": _name(path, folder), "reason": "not a DICOM file"})
            continue
        except (AttributeError, ValueError, TypeError, OSError, EOFError, KeyError, NotImplementedError) as error:
            not_sent.append({"file": _name(path, folder), "reason": f"not readable as DICOM: {type(error).__name__}"})
            continue
        if all(map(is_uid, (study, series, item.sop_class_uid, item.sop_instance_uid, item.transfer_syntax_uid))):
            found = studies.setdefault(study, ScannedStudy(study_instance_uid=study, folder=folder))
            found.outgoing.append(item)
            found.series[series] = modality
            found.series_of[item.sop_instance_uid] = series
        else:
            not_sent.append({"file": _name(path, folder), "reason": "a UID is malformed"})
    if not studies:
        raise UsageError(f"there is no DICOM file in {folder}")
    return list(studies.values()), not_sent


def send_study(study: ScannedStudy, node: Peer, *, calling_ae_title: str) -> list[dict[str, str]]:
    """Send the study over one association; return what the node didn't take, with its reason."""
    study.sent_at = datetime.now(UTC)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dicomnode-scanner-") as folder:
        claimed = [_as_its_data_set_says(item, Path(folder)) for item in study.outgoing]
        outcomes = send(node, claimed, calling_ae_title=calling_ae_title)
    study.receive_seconds = time.monotonic() - start
    paths = {item.sop_instance_uid: item.path for item in study.outgoing}
    study.sent = {outcome.sop_instance_uid for outcome in outcomes if outcome.state == "sent"}
    return [
        {
            "file": _name(paths[outcome.sop_instance_uid], study.folder),
            "reason": f"0x{outcome.status or 0:04X} {outcome.error or ''}".strip(),
        }
        for outcome in outcomes
        if outcome.state != "sent"
    ]


def _as_its_data_set_says(item: Outgoing, folder: Path) -> Outgoing:
    """Return the object, as a copy in `folder` where the file meta information names another one than the data set does."""
    names = (item.sop_class_uid, item.sop_instance_uid)
    with item.path.open("rb") as file:
        read_preamble(file, force=False)
        meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, _, __: tag >> 16 != 2)
        if (meta.get("MediaStorageSOPClassUID"), meta.get("MediaStorageSOPInstanceUID")) == names:
            return item
        data = file.read()
    prefix = part10_prefix(
        StoreRequest(
            association=0, calling_ae_title="", called_ae_title="", context_sop_class_uid=item.sop_class_uid,
            sop_class_uid=item.sop_class_uid, sop_instance_uid=item.sop_instance_uid, transfer_syntax_uid=item.transfer_syntax_uid,
        )
    )  # fmt: skip
    copy = folder / f"{len(list(folder.iterdir()))}.dcm"
    copy.write_bytes(prefix + data)
    return replace(item, path=copy)


def _name(path: Path, folder: Path) -> str:
    """The path relative to the folder, also if it is no UTF-8."""
    return os.fsencode(path.relative_to(folder)).decode("utf-8", "replace")
