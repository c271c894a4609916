"""A node's receiver in this process with objects that it holds, for whoever asks it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dimse_cases import EXPLICIT, a_dataset, encoded, received
from pydicom import Dataset

from dicomnode.config import ListenerSection, NodeSection, Settings
from dicomnode.dimse.scp import part10_prefix, read_header
from dicomnode.receiver import Receiver
from storage import Storage, open_storage, prepare_storage

STUDY, SERIES = "1.2.3.4", "1.2.3.4.5"


@contextmanager
def receiving_node(folder: Path, **listener: Any) -> Iterator[tuple[Storage, Receiver]]:
    """Run a receiver named DICOMNODE over an empty SQLite store; its registry is empty, too."""
    url = f"sqlite:///{folder / 'node.sqlite'}"
    prepare_storage(url, folder)
    storage = open_storage(url, folder)
    receiver = Receiver(Settings(node=NodeSection(data=folder), listener=ListenerSection(port=0, **listener)), storage)
    receiver.start()
    try:
        yield storage, receiver
    finally:
        receiver.stop(0)
        storage.database.close()


def keep(storage: Storage, dataset: Dataset, syntax: str = EXPLICIT, data: bytes | None = None) -> None:
    """Store an object as the receiver does; `data` in place of the encoded data set."""
    data = encoded(dataset, syntax) if data is None else data
    request = received(data, uid=str(dataset.SOPInstanceUID), sop_class=str(dataset.SOPClassUID), syntax=syntax)
    incoming = storage.objects.create(part10_prefix(request))
    incoming.write(memoryview(data))
    with incoming.dataset() as content:
        header = read_header(request, content, incoming.sha256, start=incoming.start)
    assert storage.intake.add(header, incoming)[0] == "stored"


def slices(storage: Storage, count: int, **attributes: Any) -> None:
    """Store the slices 1 to `count` of one CT series, changed by `attributes`."""
    for number in range(1, count + 1):
        keep(storage, a_dataset(SOPInstanceUID=f"{SERIES}.{number}", InstanceNumber=number, **attributes))
