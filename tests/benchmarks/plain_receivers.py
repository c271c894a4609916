"""The receivers that a node is compared with and that no package ships, each run as a process of its own.

    python plain_receivers.py save_as|raw PORT FOLDER

`save_as` is pynetdicom as its documentation shows it: `event.dataset.save_as`, nothing synced, no index. `raw` is the
limit: what a length announces goes from the socket to a file, file and folder are synced, one byte answers.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from pynetdicom import AE, AllStoragePresentationContexts, evt


def save_as(port: int, folder: Path) -> None:
    """Run pynetdicom's threaded server as it is."""

    def handle_store(event: Any) -> int:
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        dataset.save_as(folder / f"{event.request.AffectedSOPInstanceUID}.dcm", enforce_file_format=True)
        return 0x0000

    entity = AE()
    entity.supported_contexts = AllStoragePresentationContexts
    entity.maximum_associations = 64
    entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, handle_store)])
    threading.Event().wait()


def raw(port: int, folder: Path) -> None:
    """Serve one connection after the other."""
    names = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    buffer = memoryview(bytearray(1 << 20))
    written = 0
    with socket.create_server(("127.0.0.1", port)) as server:
        while True:
            connection, _ = server.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection:
                while header := connection.recv(8, socket.MSG_WAITALL):
                    left = int.from_bytes(header, "big")
                    file = os.open(folder / f"{written:08d}.bin", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                    while left:
                        count = connection.recv_into(buffer[: min(left, len(buffer))])
                        os.write(file, buffer[:count])
                        left -= count
                    os.fsync(file)
                    os.fsync(names)
                    os.close(file)
                    connection.sendall(b"\0")
                    written += 1


if __name__ == "__main__":
    {"save_as": save_as, "raw": raw}[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
