"""Who calls, and what they may do: a peer that shows its passcode or certificate, or whoever is on this machine.

Must never let anybody in from elsewhere who shows neither, nor tell a caller what was wrong.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from dicomnode.admission import Admission
from dicomnode.config import Settings
from dicomnode.web.server import is_loopback
from storage.registry import Registry

_READING = frozenset({"GET", "HEAD", "OPTIONS"})  # for which CORS decides whether a page gets the answer
_ASKED = {"WWW-Authenticate": 'Basic realm="dicomnode", charset="UTF-8"'}


@dataclass(frozen=True, kw_only=True)
class Visitor:
    """Who sent a request: a peer, or somebody on this machine."""

    ae_title: str
    queries: bool  # QIDO-RS and WADO-RS
    sends: bool  # STOW-RS
    known: bool = True  # showed who it is


class Access:
    """Decides about each request, for any number of threads."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._web = settings.web
        self._open = is_loopback(settings.web.host) and not settings.web.credentials
        self._hosts = frozenset(host.lower() for host in settings.web.hosts)
        self._admission = Admission(registry, settings.node.ae_titles)

    def visitor(self, request: HTTPConnection) -> Visitor:
        """Return who sent a request.

        Raises:
            HTTPException: 401, nobody that is known; 403, it calls the node by a name that isn't its own, or a web page of elsewhere
                wants something to be done.
            StorageError: the registry can't be asked.
        """
        if self._is_of_another_page(request):
            raise HTTPException(403, "The node takes this from its own pages alone: see web.origins in its configuration.")
        user, passcode = _basic(request.headers.get("authorization"))
        if self._open and user is None:
            host = request.headers.get("host", "").lower()
            name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
            if name not in self._hosts:
                raise HTTPException(403, "The node does not go by this name: see web.hosts in its configuration.")
            return Visitor(ae_title=self._web.ae_title, queries=True, sends=True, known=False)
        peer = self._admission.admit_by_http(
            user=user,
            passcode=passcode,
            address=request.client.host if request.client is not None else "",
            certificate=getattr(request.state, "certificate", None),
        )
        if peer is None:
            raise HTTPException(401, "The node lets in known peers alone.", _ASKED)
        return Visitor(ae_title=peer.ae_title, queries=peer.queries, sends=peer.sends)

    def _is_of_another_page(self, request: HTTPConnection) -> bool:
        """Whether a browser asks for more than to read, for a web page of another origin, which needs nobody's leave for that."""
        origin = request.headers.get("origin")
        reads = request.scope["type"] == "http" and request.scope["method"] in _READING
        if origin is None or reads or origin in self._web.origins:
            return False
        own = {request.headers.get("host", "").lower(), urlsplit(self._web.address).netloc.lower()}
        return origin.partition("://")[2].lower() not in own


def _basic(header: str | None) -> tuple[str | None, str | None]:
    """Return user and passcode of an Authorization header (RFC 7617), (None, None) where there is none that could be read."""
    scheme, _, value = (header or "").partition(" ")
    if scheme.lower() != "basic":
        return None, None
    try:
        user, colon, passcode = base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, ValueError):
        return None, None
    return (user, passcode) if colon else (None, None)
