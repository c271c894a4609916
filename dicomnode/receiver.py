"""The role that peers call: what they send is checked, safe on disk and in the index before it is acknowledged; what they ask is answered.

Must never load torch, MONAI or highdicom.
"""

from __future__ import annotations

from dicomnode.admission import Admission
from dicomnode.announcements import Announcements
from dicomnode.config import Settings
from dicomnode.dimse.commitment import CommitmentService
from dicomnode.dimse.listener import Listener
from dicomnode.holdings import StoredHoldings
from dicomnode.reception import Reception
from storage import Storage


class Receiver:
    """Receives instances from peers that may send, from start() to stop()."""

    def __init__(self, settings: Settings, storage: Storage, *, commitment: CommitmentService | None = None) -> None:
        """`commitment` takes the messages of storage commitment; without it there is no such service."""
        self._reception = reception = Reception(settings.listener, storage)
        admission = Admission(storage.registry, settings.node.ae_titles)
        self._listener = Listener(
            settings.listener,
            settings.node.ae_titles,
            admit=admission.admit,
            receive=reception.begin,
            released=reception.notes.released,
            grants=admission.grants,
            commitment=commitment,
            notices=Announcements(storage),
            holdings=StoredHoldings(settings, storage),
            is_peer=admission.is_peer,
            count=reception.notes.count,
            tls=settings.tls,
        )

    @property
    def port(self) -> int:
        """The TCP port that it listens on, between start() and stop()."""
        return self._listener.port

    @property
    def tls_port(self) -> int | None:
        """The TCP port for DICOM over TLS, between start() and stop(); None if there is none."""
        return self._listener.tls_port

    def start(self) -> None:
        """Remove what a crash left behind, then listen; returns at once.

        Raises:
            OSError: an address can't be bound.
            ConfigError: the TLS files can't be used.
        """
        self._reception.sweep()
        self._listener.start()
        self._reception.start()

    def stop(self, drain_seconds: float = 30.0) -> None:
        """Let the running associations end for up to `drain_seconds`, abort the rest, and return."""
        self._listener.stop(drain_seconds)
        self._reception.stop()
