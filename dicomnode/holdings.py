"""What queries and retrievals of peers are answered from: the index, the stored objects, and the registry's peers.

Must never answer a caller that admission hasn't granted it to, nor log what a query asks for: that is the patient's.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from dicomnode.config import Settings, check_ae_title
from dicomnode.dimse.identifier import Identifier, Value
from dicomnode.dimse.scu import Outgoing, SendOutcome, send_each
from dicomnode.errors import QueryFailure, QueryUnacceptable
from dicomnode.logs import get_logger
from storage import Storage
from storage.errors import StorageError
from storage.query import BadQuery
from storage.records import Peer

_log = get_logger(__name__)


class StoredHoldings:
    """The Holdings that dimse/querying.py asks. Any number of threads may use it."""

    def __init__(self, settings: Settings, storage: Storage) -> None:
        self._settings = settings
        self._storage = storage

    def find(self, identifier: Identifier, limit: int) -> Sequence[Mapping[str, Value]]:
        """Return what matches, at most so many, as values by keyword. Raises QueryRefused."""
        try:
            return self._storage.query.find(identifier.level, identifier.keys, include=identifier.keys, limit=limit)
        except StorageError as error:
            raise _refusal(error) from error

    def held(self, keys: Mapping[str, str], limit: int) -> Sequence[Outgoing]:
        """Return the objects that unique keys name, at most so many. Raises QueryRefused."""
        try:
            found = self._storage.query.held(keys, limit=limit)
        except StorageError as error:
            raise _refusal(error) from error
        return [
            Outgoing(
                sop_class_uid=item.sop_class_uid,
                sop_instance_uid=item.sop_instance_uid,
                transfer_syntax_uid=item.transfer_syntax_uid,
                path=self._storage.objects.path(item.object_id),
            )
            for item in found
        ]

    def destination(self, ae_title: str) -> Peer | None:
        """Return the peer that objects may be moved to: one that is registered to receive. Raises QueryRefused."""
        try:
            peer = self._storage.registry.peer(check_ae_title(ae_title))
        except ValueError:
            return None
        except StorageError as error:
            raise _refusal(error) from error
        return peer if peer is not None and peer.receives else None

    def send(self, peer: Peer, objects: Sequence[Outgoing], originator: tuple[str, int]) -> Generator[SendOutcome]:
        """Send objects to a peer, one by one, as they are stored."""
        node = self._settings.node
        return send_each(peer, objects, calling_ae_title=node.ae_title, tls=self._settings.tls, originator=originator)


def name_old_results(storage: Storage) -> None:
    """Read from the files of results that were made before 0.7.0 which series they are in: until then no query finds them.

    One that is gone or can't be read stays as it is.
    """
    tags = ["SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "InstanceNumber"]
    for result in storage.jobs.unnamed_results():
        try:
            named = dcmread(storage.objects.path(result.stored.object_id), specific_tags=tags, stop_before_pixels=True)
            storage.jobs.name_result(
                result.sop_instance_uid,
                series_instance_uid=str(named.SeriesInstanceUID),
                series_number=int(named.SeriesNumber),
                series_description=str(named.get("SeriesDescription", "")),
                instance_number=int(named.InstanceNumber),
            )
        except (OSError, InvalidDicomError, AttributeError, TypeError, ValueError) as error:
            _log.warning("a result is found by no query", sop_instance_uid=result.sop_instance_uid, reason=type(error).__name__)


def _refusal(error: StorageError) -> QueryUnacceptable | QueryFailure:
    if isinstance(error, BadQuery):
        return QueryUnacceptable(str(error))
    _log.error("storage failed", reason=type(error).__name__)
    return QueryFailure("the node failed; ask again later")
