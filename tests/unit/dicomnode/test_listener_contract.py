"""What the listener takes for granted of pynetdicom below its public interface. A new version of it must pass here first."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from importlib.metadata import version
from io import BytesIO
from typing import Any

import pynetdicom
import pytest
import structlog
from dimse_cases import CT, EXPLICIT, associate, closing_connections
from pynetdicom import AE, evt
from pynetdicom.acse import ACSE
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_primitives import C_FIND
from pynetdicom.pdu_primitives import UserIdentityNegotiation
from pynetdicom.presentation import build_context
from pynetdicom.transport import AssociationServer

from dicomnode.config import ListenerSection
from dicomnode.dimse.association import AcceptedAssociation
from dicomnode.dimse.contexts import VERIFICATION
from dicomnode.dimse.listener import Connection, Listener
from dicomnode.dimse.negotiation import Caller, Grants
from dicomnode.dimse.storing import in_memory

GRANTS = Grants(stores=True, commits=False)


@pytest.fixture
def callers() -> list[Caller]:
    return []


@pytest.fixture
def listener(callers: list[Caller]) -> Iterator[Listener]:
    listener = Listener(ListenerSection(port=0), ["DICOMNODE"], admit=callers.append, receive=in_memory(lambda _instance: None))
    listener.start()
    with closing_connections():
        yield listener
    listener.stop(0)


def connections() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("connection-")]


def test_the_version_is_the_pinned_one() -> None:
    assert version("pynetdicom") == "3.0.4"


def test_the_public_server_takes_our_classes_and_leaves_the_socket_to_the_handler() -> None:
    parameters = inspect.signature(pynetdicom.AE.make_server).parameters
    assert {"server_class", "kwargs"} <= set(parameters)
    assert "shutdown_request" not in inspect.getsource(AssociationServer.process_request)
    assert Connection.handle is not pynetdicom.transport.RequestHandler.handle


def test_one_thread_serves_an_association_and_the_provider_thread_never_starts(listener: Listener) -> None:
    before = threading.active_count()
    association = associate(listener.port, [(VERIFICATION, EXPLICIT)])
    theirs = [association, association.dul]  # the requestor's two
    assert len(connections()) == 1
    assert threading.active_count() - before <= 1 + len(theirs)
    association.release()


@pytest.mark.parametrize("owner", [ACSE, DIMSEServiceProvider, Association])
def test_the_service_provider_is_asked_for_nothing_that_ours_lacks(owner: type) -> None:
    """On an acceptor's path; what only a requestor or pynetdicom's own loop calls stands in the list."""
    known = {
        "send_pdu", "peek_next_pdu", "is_alive", "artim_timer", "_idle_timer", "event_queue", "socket",
        "receive_pdu", "kill_dul", "stop_dul", "start", "idle_timer_expired", "state_machine",
    }  # fmt: skip
    words = inspect.getsource(owner).replace("self.assoc.dul.", "self.dul.").split("self.dul.")[1:]
    asked = {word.split("(")[0].split(".")[0].split(")")[0].split("=")[0].split(":")[0].split()[0].strip(" ,]") for word in words}
    assert asked
    assert asked <= known, asked - known


def test_whatever_abort_pynetdicom_puts_in_place_is_ours() -> None:
    """ACSE sets `association.abort` to one of these two around each question to the user."""
    source = inspect.getsource(ACSE)
    assert "self.assoc._abort_nonblocking" in source
    assert "_abort_blocking" in inspect.getsource(Association._abort_nonblocking)
    assert AcceptedAssociation._abort_blocking is not Association._abort_blocking


def test_a_service_that_nobody_provides_ends_in_an_abort(listener: Listener) -> None:
    association = associate(listener.port, [(CT, EXPLICIT)])
    aborted = threading.Event()
    association.bind(evt.EVT_ABORTED, lambda _event: aborted.set())
    request = C_FIND()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID = "1.2.840.10008.5.1.4.1.2.2.1"  # Study Root Query/Retrieve - FIND
    request.Identifier = BytesIO(b"\x08\x00\x52\x00CS\x06\x00STUDY ")
    association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
    assert aborted.wait(120)


def test_user_identity_reaches_the_one_who_decides(listener: Listener, callers: list[Caller]) -> None:
    entity: Any = AE("SCANNER")
    identity = UserIdentityNegotiation()
    identity.user_identity_type = 2
    identity.primary_field, identity.secondary_field = b"radiographer", b"secret"
    association = entity.associate(
        "127.0.0.1", listener.port, contexts=[build_context(VERIFICATION)], ae_title="DICOMNODE", ext_neg=[identity]
    )
    assert association.is_established
    association.release()
    asked = [(caller.calling_ae_title, caller.user, caller.passcode) for caller in callers]
    assert asked == [("SCANNER", None, None), ("SCANNER", "radiographer", "secret")]  # first by what stands at fixed places


def test_who_is_refused_without_end_does_not_fill_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    structlog.reset_defaults()  # to the standard output of now
    counted: list[str] = []
    listener = Listener(ListenerSection(port=0), ["N"], admit=lambda _caller: None, receive=in_memory(lambda _: None), count=counted.append)
    for number in range(1000):
        listener.refuse("connection refused", "TLS handshake", host=f"10.0.0.{number % 2}")
    lines = [line for line in capsys.readouterr().out.splitlines() if "connection refused" in line]
    assert 200 <= len(lines) <= 400  # a hundred of each address a minute, and the minute may have ended
    assert counted == ["connection refused: TLS handshake"] * 1000


def test_the_contexts_are_shared_and_negotiation_leaves_them_as_they_were(listener: Listener) -> None:
    kept = {uid: list(context.transfer_syntax) for context in listener.contexts.of({CT}, GRANTS) for uid in [str(context.abstract_syntax)]}
    for _ in range(2):
        association = associate(listener.port, [(CT, EXPLICIT), ("1.2.3", EXPLICIT)])
        assert [str(context.abstract_syntax) for context in association.accepted_contexts] == [CT]
        association.release()
    assert {uid: list(c.transfer_syntax) for c in listener.contexts.of({CT}, GRANTS) for uid in [str(c.abstract_syntax)]} == kept


def test_nothing_of_pynetdicom_formats_each_pdu_for_a_log(listener: Listener) -> None:
    association = AcceptedAssociation.__new__(AcceptedAssociation)
    Association.__init__(association, listener.entity, "acceptor")
    assert evt.EVT_PDU_RECV not in association._handlers
