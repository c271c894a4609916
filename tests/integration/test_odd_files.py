"""Odd and malformed files of other projects, each data set sent raw to a receiver: stored byte for byte, or refused as the table says.

DCMTK's dcmdump is the second opinion: what it can't read to the end must never be acknowledged.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from dimse_cases import CT, EXPLICIT, IMPLICIT, SHARED_DATA, associate, closing_connections, received, split_part10, store

from dicomnode.config import ListenerSection, NodeSection, Settings
from dicomnode.dimse.contexts import storage_class
from dicomnode.dimse.scp import part10_prefix
from dicomnode.receiver import Receiver
from storage import Storage, open_storage, prepare_storage
from storage.records import Peer

pytestmark = pytest.mark.realdata

FOLDER = SHARED_DATA / "odd_files"
SCANNER = Peer(ae_title="SCANNER", host="127.0.0.1", port=104, sends=True, receives=False, tls=False, client_cert=None)

# What is refused, with the check of contract 3 that refuses it. Everything else is stored.
REFUSED = {
    # dcmdump can't read these either
    "fodicom/GH1339.dcm": (0xC002, "the last fragment is cut off"),
    "fodicom/GH364.dcm": (0xC001, "what follows the fragments is no element"),
    "fodicom/GH626.dcm": (0xC001, "cut off amid an element"),
    "pydicom/MR_truncated.dcm": (0xC001, "cut off amid the pixel data"),
    "pydicom/no_meta.dcm": (0xC001, "starts amid an element"),
    "pydicom/rtplan_truncated.dcm": (0xC001, "cut off amid a sequence"),
    # dcmdump reads these
    "charsets/chrJapMultiExplicitIR6.dcm": (0xC002, "an image without pixel data"),
    "charsets/chrKoreanMulti.dcm": (0xC002, "an image without pixel data"),
    "charsets/chrSQEncoding1.dcm": (0xA900, "the data set has no SOP Class UID"),
    "fodicom/GH179A.dcm": (0xC001, "an element whose VR is two spaces"),
    "fodicom/GH487.dcm": (0xC001, "no Study Instance UID"),
    "fodicom/chrJapMulti.dcm": (0xC002, "an image without pixel data"),
    "fodicom/chrKoreanMulti.dcm": (0xC002, "an image without pixel data"),
    "fodicom/chrSQEncoding1.dcm": (0xA900, "the data set has no SOP Class UID"),
    "pydicom/JLSL_16_15_1_1F.dcm": (0xC001, "no Study Instance UID"),
    "pydicom/JPEGLSNearLossless_08.dcm": (0xC001, "no Study Instance UID"),
    "pydicom/SC_rgb_jls_lossy_line.dcm": (0xC001, "no Study Instance UID"),
    "pydicom/priv_SQ.dcm": (0xA900, "the data set has no SOP Class UID"),
}  # fmt: skip
# What can't be put on the wire: no SOP class is named, or none that the node negotiates.
NO_CONTEXT = {
    "fodicom/GH220.dcm": "a private SOP class",
    "fodicom/GH340.dcm": "ACR-NEMA 1.0, before there were SOP classes",
    "fodicom/GH355.dcm": "a private SOP class",
    "fodicom/genFile.dcm": "a private SOP class",
    "pydicom/nested_priv_SQ.dcm": "no SOP class",
}
# What only a person sees of a file that nothing reads: SOP class and transfer syntax.
GUESSED = {"pydicom/no_meta.dcm": (CT, EXPLICIT)}


@dataclass(frozen=True, kw_only=True)
class OddFile:
    """What a sender has that reads its file as DCMTK's storescu does: UIDs from the data set, else from the file meta information."""

    name: str
    sop_class: str
    uid: str
    syntax: str
    data: bytes
    declared: tuple[str, str]  # SOP class and instance by the file meta information


def odd_files() -> list[OddFile]:
    if not FOLDER.is_dir():
        pytest.skip(f"{FOLDER} is absent")
    return [read_odd(file) for file in sorted(FOLDER.rglob("*.dcm"))]


def read_odd(file: Path) -> OddFile:
    content = file.read_bytes()
    meta, offset = split_meta(content)
    data = content[offset:]
    name = file.relative_to(FOLDER).as_posix()
    guessed = GUESSED.get(name, ("", IMPLICIT))
    syntax = meta.get(0x0010) or guessed[1]
    declared = meta.get(0x0002, ""), meta.get(0x0003, "")
    sop_class, uid = uids_of(data, syntax)
    return OddFile(
        name=name,
        sop_class=sop_class or declared[0] or guessed[0],
        uid=uid or declared[1] or "1.2.3",
        syntax=syntax,
        data=data,
        declared=declared,
    )


def split_meta(content: bytes) -> tuple[dict[int, str], int]:
    """The elements of group 0002, explicit or (wrongly) implicit, and where the data set begins."""
    position = 132 if content[128:132] == b"DICM" else 0
    meta = {}
    while content[position : position + 2] == b"\x02\x00":
        element, vr = int.from_bytes(content[position + 2 : position + 4], "little"), content[position + 4 : position + 6]
        long = vr in {b"OB", b"UN"}
        begin = position + (12 if long else 8)
        size = content[begin - 4 : begin] if long or not vr.isalpha() else content[begin - 2 : begin]
        position = begin + int.from_bytes(size, "little")
        meta[element] = content[begin:position].decode("ascii", "replace").strip("\x00 ")
    return meta, position


def uids_of(data: bytes, syntax: str) -> tuple[str, str]:
    """SOP Class and SOP Instance UID of a data set, read by pydicom as far as it goes."""
    prefix = part10_prefix(received(b"", uid="1.2.3", syntax=syntax))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read = pydicom.dcmread(BytesIO(prefix + data), specific_tags=["SOPClassUID", "SOPInstanceUID"], stop_before_pixels=True)
            return str(read.get("SOPClassUID") or ""), str(read.get("SOPInstanceUID") or "")
        except Exception:  # noqa: BLE001  what a broken file makes pydicom raise is not the point
            return "", ""


class Nodes:
    """Receivers with a store each: an image that is stored can't be sent again in another encoding, so it goes to the next one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[tuple[Receiver, Storage]] = []

    def without(self, uid: str) -> tuple[Receiver, Storage]:
        """A receiver that doesn't have the instance."""
        for receiver, storage in self._running:
            if storage.index.find(uid) is None:
                return receiver, storage
        folder = self._folder / str(len(self._running))
        folder.mkdir()
        url = f"sqlite:///{folder / 'node.sqlite'}"
        prepare_storage(url, folder)
        storage = open_storage(url, folder)
        storage.registry.add_peer(SCANNER)
        settings = Settings(node=NodeSection(data=folder), listener=ListenerSection(port=0, accept_deflated=True))
        receiver = Receiver(settings, storage)
        receiver.start()
        self._running.append((receiver, storage))
        return receiver, storage

    def close(self) -> None:
        for receiver, storage in self._running:
            receiver.stop(drain_seconds=0)
            storage.database.close()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    logger = logging.getLogger("pynetdicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs refused contexts as errors
    running = Nodes(tmp_path)
    with closing_connections():
        yield running
        running.close()
    logger.setLevel(level)


def send(nodes: Nodes, odd: OddFile, sop_class: str, uid: str) -> int | None:
    """The status of a C-STORE of the data set, None if there is no context for it; what is acknowledged was stored as it is."""
    receiver, storage = nodes.without(uid)
    association: Any = associate(receiver.port, [(sop_class, odd.syntax)])
    if not association.accepted_contexts:
        association.abort() if association.is_established else None
        return None
    status = store(association, odd.data, uid=uid, sop_class=sop_class, syntax=odd.syntax).Status
    assert association.is_established, f"{odd.name}: aborted"
    association.release()
    instance = storage.index.find(uid)
    if status == 0:
        assert instance is not None, odd.name
        assert split_part10(storage.objects.read(instance.stored.object_id))[1] == odd.data, odd.name
    else:
        assert instance is None, odd.name
    return status


def test_each_odd_file_is_stored_byte_for_byte_or_refused_as_the_table_says(nodes):
    files = odd_files()
    assert {odd.name for odd in files} >= REFUSED.keys() | NO_CONTEXT.keys()
    got, wanted = {}, {}
    for odd in files:
        wanted[odd.name] = None if odd.name in NO_CONTEXT else REFUSED.get(odd.name, (0x0000, ""))[0]
        got[odd.name] = send(nodes, odd, odd.sop_class, odd.uid) if odd.sop_class else None
    assert got == wanted


def test_a_file_whose_meta_information_names_another_instance_is_refused_when_sent_under_that_name(nodes):
    lying = [odd for odd in odd_files() if odd.declared[1] and odd.declared != (odd.sop_class, odd.uid) and storage_class(odd.declared[0])]
    assert len(lying) >= 5
    for odd in lying:
        assert send(nodes, odd, *odd.declared) in {0xA900, REFUSED.get(odd.name, (0xA900, ""))[0]}, odd.name


@pytest.mark.system
def test_nothing_that_dcmdump_cannot_read_is_acknowledged(tmp_path):
    if shutil.which("dcmdump") is None:
        pytest.skip("dcmdump is not installed (apt-get install dcmtk)")
    unreadable = set()
    for odd in odd_files():
        file = tmp_path / "object.dcm"
        file.write_bytes(part10_prefix(received(b"", uid=odd.uid, sop_class=odd.sop_class, syntax=odd.syntax)) + odd.data)
        if subprocess.run(["dcmdump", "-q", file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode:
            unreadable.add(odd.name)
    assert unreadable
    assert unreadable <= REFUSED.keys()
