"""Who is let in: each condition alone keeps a caller out, and nothing but a matching peer lets one in."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from dicomnode.admission import Admission, check_passcode_hash, hash_passcode, is_passcode, network
from dicomnode.dimse.negotiation import Caller
from dicomnode.dimse.tls import fingerprint
from storage.errors import Unavailable
from storage.records import Peer

CERTIFICATE = b"the DER of a certificate"
PLAIN = Peer(ae_title="SCANNER", host="10.0.0.5", port=104, sends=True, receives=False, tls=False, client_cert=None)
PASSCODE_HASH = hash_passcode("geheim")


def a_caller(**values: Any) -> Caller:
    """The scanner, in plain DICOM, but for these values."""
    known = {"calling_ae_title": "SCANNER", "called_ae_title": "DICOMNODE", "address": "10.0.0.5"}
    return Caller(**{**known, "certificate": None, "user": None, "passcode": None, **values})


class Peers:
    """A registry."""

    def __init__(self, *peers: Peer) -> None:
        self.known = {peer.ae_title: peer for peer in peers}
        self.away = False

    def peer(self, ae_title: str) -> Peer | None:
        if self.away:
            raise Unavailable("no answer")
        return self.known.get(ae_title)

    def peers(self) -> list[Peer]:
        if self.away:
            raise Unavailable("no answer")
        return list(self.known.values())


def reason(peer: Peer, **caller: Any) -> str | None:
    return admission(peer).admit(a_caller(**caller))


def admission(*peers: Peer) -> Admission:
    return Admission(Peers(*peers), ["DICOMNODE", "CHEST"])  # type: ignore[arg-type]  # as much of a registry as is asked for


def test_a_caller_that_matches_its_peer_is_let_in() -> None:
    assert reason(PLAIN) is None


@pytest.mark.parametrize("title", ["OTHER", "scanner", "SCANNE", "SCANNERS", "", " ", "*", "SCANNER\0", "SCANNER\n", "\u00c4", "A" * 17])
def test_another_calling_ae_title_is_kept_out(title: str) -> None:
    assert reason(PLAIN, calling_ae_title=title) == "calling AE title"


def test_a_peer_that_only_receives_and_may_not_ask_is_kept_out() -> None:
    assert reason(replace(PLAIN, sends=False, receives=True, queries=False)) == "calling AE title"
    assert reason(replace(PLAIN, sends=False, receives=True)) is None


def test_spaces_around_ae_titles_do_not_count() -> None:
    assert reason(PLAIN, calling_ae_title="  SCANNER  ", called_ae_title=" CHEST      ") is None


@pytest.mark.parametrize("title", ["OTHER", "dicomnode", "", "DICOM NODE", "SCANNER"])
def test_a_call_for_somebody_else_is_kept_out(title: str) -> None:
    assert reason(PLAIN, called_ae_title=title) == "called AE title"


@pytest.mark.parametrize(
    ("networks", "address", "is_in"),
    [
        ((), "10.0.0.5", True),
        ((), "::ffff:10.0.0.5", True),
        ((), "10.0.0.6", False),
        (("10.0.0.0/24",), "10.0.0.255", True),
        (("10.0.0.0/24",), "10.0.1.0", False),
        (("10.0.0.0/24",), "::ffff:10.0.0.7", True),
        (("192.168.0.0/16",), "10.0.0.5", False),  # networks are stated: the host counts no more
        (("192.168.0.0/16", "10.0.0.4/31"), "10.0.0.5", True),
        (("10.0.0.5",), "10.0.0.5", True),
        (("fe80::/64",), "fe80::1%eth0", True),
        (("2001:db8::/32",), "2001:db9::1", False),
        (("::/0",), "10.0.0.5", False),
        (("0.0.0.0/0",), "2001:db8::1", False),
        (("10.0.0.5/24",), "10.0.0.5", False),  # malformed
        (("anywhere",), "10.0.0.5", False),
        (("0.0.0.0/0",), "", False),
        (("0.0.0.0/0",), "10.0.0", False),
    ],
)
def test_a_caller_comes_from_a_network_of_its_peer(networks: tuple[str, ...], address: str, is_in: bool) -> None:
    peer = replace(PLAIN, networks=networks)
    assert reason(peer, address=address) == (None if is_in else "network")
    assert admission(peer).is_peer(address) is is_in


@given(st.ip_addresses(v=4), st.ip_addresses(v=4), st.integers(0, 32))
def test_a_network_holds_just_what_shares_its_prefix(one: Any, other: Any, prefix: int) -> None:
    stated = f"{network(str(one)).supernet(new_prefix=prefix)}"
    shared = int(one) >> (32 - prefix) == int(other) >> (32 - prefix)
    assert (reason(replace(PLAIN, networks=(stated,)), address=str(other)) is None) is shared


def test_a_network_that_maps_ipv4_into_ipv6_is_one_of_ipv4() -> None:
    assert str(network("::ffff:10.0.0.0/104")) == "10.0.0.0/8"
    assert str(network("::/0")) == "::/0"


def test_a_host_name_stands_for_its_addresses_and_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(host: str, *_: object, **__: object) -> list[Any]:
        asked.append(host)
        return [(2, 1, 6, "", ("10.0.0.9", 0)), (10, 1, 6, "", ("2001:db8::9", 0, 0, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    known = admission(replace(PLAIN, host="ct.example"))
    assert asked == []
    assert not known.is_peer("10.0.0.9"), "nobody has called yet, and the accept loop must not wait for a name server"
    assert known.admit(a_caller(address="10.0.0.8")) == "network"
    for address in ("10.0.0.9", "::ffff:10.0.0.9", "2001:db8::9"):
        assert known.admit(a_caller(address=address)) is None
        assert known.is_peer(address)
    assert not known.is_peer("10.0.0.8")
    assert asked == ["ct.example"]


def test_a_name_that_cannot_be_resolved_admits_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert reason(replace(PLAIN, host="gone.example")) == "network"


def test_a_tls_peer_comes_with_its_certificate_and_a_plain_one_without() -> None:
    tls = replace(PLAIN, tls=True)
    pinned = replace(tls, client_cert=fingerprint(CERTIFICATE))
    assert reason(PLAIN, certificate=CERTIFICATE) == "certificate"
    assert reason(tls) == "certificate"
    assert reason(tls, certificate=CERTIFICATE) is None
    assert reason(pinned) == "certificate"
    assert reason(pinned, certificate=CERTIFICATE) is None
    assert reason(pinned, certificate=CERTIFICATE + b"!") == "certificate"
    assert reason(replace(pinned, tls=False)) == "certificate"


@pytest.mark.parametrize(
    ("passcode_hash", "user", "passcode", "is_in"),
    [
        (None, "ct1", None, True),
        (None, "ct2", None, False),
        (None, None, None, False),
        (None, "ct1", "any", False),
        (PASSCODE_HASH, "ct1", "geheim", True),
        (PASSCODE_HASH, "ct1", None, False),
        (PASSCODE_HASH, "ct1", "geheim ", False),
        (PASSCODE_HASH, "ct1", "", False),
        (PASSCODE_HASH, "ct2", "geheim", False),
        (PASSCODE_HASH, None, "geheim", False),
        (PASSCODE_HASH, "ct1", "\ud800", False),
        ("geheim", "ct1", "geheim", False),
        ("", "ct1", "", False),
    ],
)
def test_a_peer_with_a_user_name_must_give_it_and_its_passcode(
    passcode_hash: str | None, user: str | None, passcode: str | None, is_in: bool
) -> None:
    peer = replace(PLAIN, user="ct1", passcode_hash=passcode_hash)
    assert reason(peer, user=user, passcode=passcode) == (None if is_in else "user identity")


def test_a_peer_without_a_user_name_may_give_any() -> None:
    assert reason(PLAIN, user="somebody", passcode="something") is None
    assert reason(replace(PLAIN, passcode_hash=PASSCODE_HASH)) == "user identity", "half a user identity lets nobody in"


def test_a_passcode_is_kept_salted_and_never_as_it_is() -> None:
    first, second = hash_passcode("geheim"), hash_passcode("geheim")
    assert first != second
    assert "geheim" not in first
    assert check_passcode_hash(first) == first
    assert is_passcode("geheim", first)
    assert is_passcode("geheim", second)
    assert not is_passcode("Geheim", first)
    for malformed in ("", "geheim", first.replace("16384", "2"), first[:-8], first + "$", first.replace("scrypt", "plain")):
        assert not is_passcode("geheim", malformed)
        with pytest.raises(ValueError, match=r"passcode hash|base64|padding"):
            check_passcode_hash(malformed)


def test_a_registry_that_does_not_answer_lets_nobody_in() -> None:
    registry = Peers(PLAIN)
    known = Admission(registry, ["DICOMNODE"])  # type: ignore[arg-type]
    assert known.admit(a_caller()) is None
    registry.away = True
    assert known.admit(a_caller()) == "registry"
    assert known.is_peer("10.0.0.5"), "what is in memory stays"
    away = Peers(PLAIN)
    away.away = True
    fresh = Admission(away, ["DICOMNODE"])  # type: ignore[arg-type]
    assert fresh.admit(a_caller()) == "registry"
    assert not fresh.is_peer("10.0.0.5")


def test_changes_of_the_registry_hold_from_the_next_association_on() -> None:
    registry = Peers()
    known = Admission(registry, ["DICOMNODE"])  # type: ignore[arg-type]
    assert known.admit(a_caller()) == "calling AE title"
    registry.known["SCANNER"] = PLAIN
    assert known.admit(a_caller()) is None
    del registry.known["SCANNER"]
    assert known.admit(a_caller()) == "calling AE title"
