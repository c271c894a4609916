"""Who is let in: a caller must match one peer in everything that is known of it, and call an AE title of this node.

Default deny. Must never tell a caller what was wrong (the reasons are for log and metrics), put a passcode into a reason, or let
anybody in because the registry can't be asked.

| the peer's record | what its caller must show |
|---|---|
| AE title, and that it sends, commits or queries | this calling AE title |
| networks; without them host | an address of theirs |
| tls | a certificate that the site's CA signed, on the TLS port; a peer without tls comes by the plain port alone |
| client_cert | the certificate with this SHA-256 |
| user | user identity type 1, this name |
| user and passcode | user identity type 2, this name and passcode (PS3.7 D.3.3.7) |

A peer comes by the one way that its record names, so that nobody who knows an AE title chooses the weaker one. By HTTP a peer must
show its passcode or its one certificate, or both if its record has both; its name there is its user name, else its AE title.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from dicomnode.config import check_ae_title
from dicomnode.dimse.negotiation import USER_IDENTITY, Grants
from dicomnode.dimse.tls import fingerprint
from dicomnode.logs import get_logger
from storage.errors import StorageError
from storage.records import Peer
from storage.registry import Registry

if TYPE_CHECKING:
    from dicomnode.dimse.negotiation import Caller  # with pynetdicom, which a command about peers needs not load

NAME_SECONDS: Final = 60.0  # for so long the addresses of a host name are remembered
_UNKNOWN_NAME_SECONDS = 10.0  # and so long that it has none
_PASSCODE_SECONDS = 300.0
_REMEMBERED_PASSCODES = 1000
_PEERS_SECONDS = 5.0  # as often at most is_peer() learns of other peers
_N, _R, _P = 2**14, 8, 1  # scrypt (RFC 7914): 16 MiB and some 40 ms
_SCRYPT = ("scrypt", str(_N), str(_R), str(_P))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_log = get_logger(__name__)


class Admission:
    """Decides about each association, for any number of threads."""

    def __init__(self, registry: Registry, ae_titles: Sequence[str]) -> None:
        """`ae_titles` are those that this node answers to."""
        self._registry = registry
        self._ae_titles = frozenset(title.strip(" ") for title in ae_titles)
        self._names = _Names()
        self._passcodes = threading.Lock()  # one at a time: each takes 16 MiB
        self._known: dict[bytes, float] = {}  # keyed digest of a passcode that was right: until when it is remembered
        self._digest_key = os.urandom(32)
        self._peer_networks: tuple[Network, ...] = ()
        self._peer_names: tuple[str, ...] = ()
        self._refresh_at = 0.0
        self._refresh()

    def grants(self, ae_title: str) -> Grants:
        """What a caller that was let in may do. Raises StorageError if the registry can't be asked."""
        peer = self._peer(ae_title.strip(" "))
        if peer is None:
            return Grants(stores=False, commits=False)
        return Grants(stores=peer.sends, commits=peer.commits, queries=peer.queries)

    def admit(self, caller: Caller) -> str | None:
        """Return None to let the caller in, or why not, in words of this list.

        "registry", "calling AE title", "called AE title", "network", "certificate", "user identity".
        """
        # PS3.8 9.3.2: leading and trailing spaces of an AE title don't count.
        calling, called = caller.calling_ae_title.strip(" "), caller.called_ae_title.strip(" ")
        try:
            peer = self._peer(calling)
        except StorageError:
            _log.exception("the registry could not be asked")
            return "registry"
        self._refresh()
        if peer is None:
            return "calling AE title"
        checks: tuple[tuple[str, Callable[[], bool]], ...] = (
            ("called AE title", lambda: called in self._ae_titles),
            ("network", lambda: self._comes_from(peer, caller.address)),
            ("certificate", lambda: _shows_its_certificate(peer, caller.certificate)),
            (USER_IDENTITY, lambda: self._is_user(peer, caller)),
        )
        return next((reason for reason, holds in checks if not holds()), None)

    def admit_by_http(self, *, user: str | None, passcode: str | None, address: str, certificate: bytes | None) -> Peer | None:
        """Return the peer that an HTTP request comes from, by what its caller shows; None if nobody is let in.

        Raises StorageError if the registry can't be asked.
        """
        shown = fingerprint(certificate) if certificate is not None else None
        for peer in self._registry.peers():
            if peer.passcode_hash is None and peer.client_cert is None:
                continue  # an AE title and an address are no credentials
            named = user == (peer.user or peer.ae_title) if user is not None else peer.passcode_hash is None
            if not named or peer.client_cert not in {None, shown} or not self._comes_from(peer, address):
                continue
            if peer.passcode_hash is None or (passcode is not None and self._knows(passcode, peer.passcode_hash)):
                return peer
        return None

    def is_peer(self, address: str) -> bool:
        """Whether a peer that may call has this address. From memory, without a wait: one that is known by host name counts once it did."""
        parsed = _address(address)
        networks = (*self._peer_networks, *(found for host in self._peer_names for found in self._names.known(host)))
        return parsed is not None and any(parsed in network for network in networks)

    def _peer(self, ae_title: str) -> Peer | None:
        """The peer of this AE title that may call; what is no AE title isn't looked for."""
        try:
            peer = self._registry.peer(check_ae_title(ae_title))
        except ValueError:
            return None
        return peer if peer is not None and _may_call(peer) else None

    def _comes_from(self, peer: Peer, address: str) -> bool:
        try:
            networks = _stated_networks(peer) or self._names.look_up(peer.host)
        except ValueError:  # only a hand in the database can have written it
            _log.error("a peer has a malformed network and is not let in", peer=peer.ae_title)
            return False
        parsed = _address(address)
        return parsed is not None and any(parsed in network for network in networks)

    def _refresh(self) -> None:
        """Take over changed peers for is_peer(), at most every few seconds. A registry that doesn't answer leaves it as it is."""
        if time.monotonic() < self._refresh_at:
            return
        self._refresh_at = time.monotonic() + _PEERS_SECONDS
        networks: set[Network] = set()
        names: set[str] = set()
        try:
            for peer in self._registry.peers():
                if _may_call(peer):
                    with suppress(ValueError):
                        stated = _stated_networks(peer)
                        networks.update(stated)
                        names.update(() if stated else (peer.host,))
        except StorageError:
            _log.exception("the registry could not be asked")
            return
        self._peer_networks, self._peer_names = tuple(networks), tuple(names)

    def _is_user(self, peer: Peer, caller: Caller) -> bool:
        if peer.user is None:
            return peer.passcode_hash is None
        if not hmac.compare_digest((caller.user or "").encode("utf-8", "surrogatepass"), peer.user.encode()):
            return False
        if peer.passcode_hash is None:
            return caller.passcode is None
        return caller.passcode is not None and self._knows(caller.passcode, peer.passcode_hash)

    def _knows(self, passcode: str, passcode_hash: str) -> bool:
        """Whether this is the passcode. A right one is remembered for a while by a keyed digest: a viewer's page asks hundreds of times."""
        text = f"{passcode_hash} {passcode}".encode("utf-8", "surrogatepass")
        digest = hmac.digest(self._digest_key, text, "sha256")
        if self._known.get(digest, 0.0) > time.monotonic():
            return True
        with self._passcodes:
            known = is_passcode(passcode, passcode_hash)
        if known:
            if len(self._known) >= _REMEMBERED_PASSCODES:
                self._known.clear()
            self._known[digest] = time.monotonic() + _PASSCODE_SECONDS
        return known


def _may_call(peer: Peer) -> bool:
    return peer.sends or peer.commits or peer.queries


def network(text: str) -> Network:
    """Read a network in CIDR notation, or one address; what maps IPv4 into IPv6 becomes IPv4. Raises ValueError."""
    parsed = ipaddress.ip_network(text.strip())
    if isinstance(parsed, ipaddress.IPv6Network) and parsed.prefixlen >= 96 and (mapped := parsed.network_address.ipv4_mapped):
        return ipaddress.IPv4Network((mapped, parsed.prefixlen - 96))
    return parsed


def check_user_name(text: str) -> str:
    """Return `text` if it can be the user name of an association request (PS3.7 D.3.3.7), else raise ValueError."""
    if not text or not text.isprintable() or len(text.encode()) > 65535:
        raise ValueError("a user name has characters that print, and at least one")
    return text


def hash_passcode(passcode: str) -> str:
    """Return what the registry keeps of a passcode: scrypt with its parameters and a salt, never the passcode."""
    salt = os.urandom(16)
    return "$".join((*_SCRYPT, base64.b64encode(salt).decode(), base64.b64encode(_derive(passcode, salt)).decode()))


def check_passcode_hash(text: str) -> str:
    """Return `text` if it is what hash_passcode() makes, else raise ValueError."""
    _salt_and_key(text)
    return text


def is_passcode(passcode: str, passcode_hash: str) -> bool:
    """Whether this is the passcode; takes equally long for each that isn't. One of a malformed hash is never right."""
    try:
        salt, key = _salt_and_key(passcode_hash)
    except ValueError:
        _log.error("a peer has a malformed passcode hash and is not let in")
        return False
    return hmac.compare_digest(_derive(passcode, salt), key)


class _Names:
    """The addresses of host names, each asked for again after a minute."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, tuple[Network, ...]]] = {}

    def known(self, host: str) -> tuple[Network, ...]:
        """What was found last; empty if nobody has asked yet."""
        return self._found.get(host, (0.0, ()))[1]

    def look_up(self, host: str) -> tuple[Network, ...]:
        """The addresses of a name, empty if it can't be resolved. May wait for a name server."""
        until, addresses = self._found.get(host, (0.0, ()))
        if time.monotonic() >= until:
            try:
                addresses = _networks_of({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
            except (OSError, UnicodeError):
                addresses = ()
                _log.warning("a peer's host name has no address, its calls are rejected", host=host)
            self._found[host] = (time.monotonic() + (NAME_SECONDS if addresses else _UNKNOWN_NAME_SECONDS), addresses)
        return addresses


def _stated_networks(peer: Peer) -> tuple[Network, ...]:
    """The networks of a peer's record, or the address that its host is; empty if its host is a name. ValueError if one is malformed."""
    return tuple(map(network, peer.networks)) or _networks_of([peer.host])


def _address(text: str) -> Address | None:
    """Read an IP address; one that maps IPv4 into IPv6 counts as IPv4, and the scope of a link-local one doesn't count."""
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


def _networks_of(addresses: Iterable[str]) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(parsed) for parsed in map(_address, addresses) if parsed is not None)


def _shows_its_certificate(peer: Peer, certificate: bytes | None) -> bool:
    if certificate is None:
        return not peer.tls and peer.client_cert is None
    if not peer.tls:
        return False
    return peer.client_cert is None or hmac.compare_digest(fingerprint(certificate), peer.client_cert)


def _derive(passcode: str, salt: bytes) -> bytes:
    return hashlib.scrypt(passcode.encode("utf-8", "surrogatepass"), salt=salt, n=_N, r=_R, p=_P)


def _salt_and_key(passcode_hash: str) -> tuple[bytes, bytes]:
    """Take apart what hash_passcode() made; ValueError for anything that it would not make."""
    parts = passcode_hash.split("$")
    if len(parts) != 6 or tuple(parts[:4]) != _SCRYPT:
        raise ValueError(f"a passcode hash looks like {'$'.join(_SCRYPT)}$SALT$KEY")
    salt, key = (base64.b64decode(part, validate=True) for part in parts[4:])
    if (len(salt), len(key)) != (16, 64):
        raise ValueError("a passcode hash has 16 bytes of salt and 64 of key")
    return salt, key
