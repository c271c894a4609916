"""A stored object as a peer takes it that doesn't accept it as it is: in another transfer syntax, or a report in the simpler class.

Native, little endian, and the same bytes each time. Every element and every pixel is compared with the stored object, which was proved
when it was made, before it may leave. Must never lose anything.
"""

from __future__ import annotations

import io
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID

from dicomnode.dimse.contexts import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

EXPLICIT, IMPLICIT, RLE_LOSSLESS = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.5"
DEFLATED = "1.2.840.10008.1.2.1.99"
COMPREHENSIVE_3D_SR, COMPREHENSIVE_SR = "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.88.33"
_NAMESPACE = uuid.UUID("7f0c5a0e-52a6-4c0f-8f0b-3c2d4a7e9b11")  # of the names of simpler objects (RFC 9562 5.5)


def other_syntaxes(transfer_syntax_uid: str) -> tuple[str, ...]:
    """Return the transfer syntaxes that an object of this one can be written in without loss, the best first."""
    known = transfer_syntax_uid in {EXPLICIT, RLE_LOSSLESS, DEFLATED}
    return tuple(syntax for syntax in (EXPLICIT, IMPLICIT) if known and syntax != transfer_syntax_uid)


def simpler_class(sop_class_uid: str, sop_instance_uid: str) -> tuple[str, str] | None:
    """Return the SOP class that an object can be written in as it is, and its SOP Instance UID there, which derives from its own.

    A Comprehensive 3D SR without coordinates in space is a Comprehensive SR but for its name (PS3.3 A.35.3, A.35.13).
    """
    if sop_class_uid != COMPREHENSIVE_3D_SR:
        return None
    return COMPREHENSIVE_SR, f"2.25.{uuid.uuid5(_NAMESPACE, f'{sop_instance_uid} as {COMPREHENSIVE_SR}').int}"


def recoded(path: Path, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """Return a Part 10 file of the object in `path` under these names, in Explicit or Implicit VR Little Endian.

    Raises:
        ValueError: it cannot be written without a difference; what pydicom raises for a file that it can't read comes through.
    """
    dataset, stored = dcmread(path), dcmread(path)
    if UID(dataset.file_meta.TransferSyntaxUID).is_encapsulated:
        dataset.decompress(generate_instance_uid=False)
    named = {"SOPClassUID": sop_class_uid, "SOPInstanceUID": sop_instance_uid}
    if sop_class_uid != stored.SOPClassUID:
        named_as = (sop_class_uid, sop_instance_uid)
        if simpler_class(stored.SOPClassUID, stored.SOPInstanceUID) != named_as or any(_coordinates_in_space(stored)):
            raise ValueError("it would not say the same in another SOP class")
    for keyword, uid in named.items():
        setattr(dataset, keyword, uid)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = UID(sop_class_uid), UID(sop_instance_uid)
    dataset.file_meta.TransferSyntaxUID = UID(transfer_syntax_uid)
    dataset.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    dataset.file_meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    buffer = io.BytesIO()
    dataset.save_as(buffer, implicit_vr=transfer_syntax_uid == IMPLICIT, little_endian=True, enforce_file_format=True)
    again = dcmread(io.BytesIO(buffer.getvalue()))
    if not _says_the_same(stored, again, apart_from=named):
        raise ValueError("it would not say the same in another transfer syntax")
    return buffer.getvalue()


@contextmanager
def recoded_file(path: Path, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> Iterator[Path]:
    """Give, for a while, a file of what `recoded` returns. Raises as it does."""
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        file.write(recoded(path, sop_class_uid, sop_instance_uid, transfer_syntax_uid))
        file.flush()
        yield Path(file.name)


def _coordinates_in_space(item: Dataset) -> Iterator[bool]:
    for child in item.get("ContentSequence", ()):
        yield child.get("ValueType") == "SCOORD3D"
        yield from _coordinates_in_space(child)


def _says_the_same(stored: Dataset, again: Dataset, *, apart_from: Mapping[str, str]) -> bool:
    if "PixelData" in stored and not np.array_equal(stored.pixel_array, again.pixel_array):
        return False
    if any(again.get(keyword) != uid for keyword, uid in apart_from.items()):
        return False
    for dataset in (stored, again):
        for keyword in ("PixelData", *apart_from):
            dataset.pop(keyword, None)
    return stored == again
