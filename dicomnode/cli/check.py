"""`check`: is this node able to do its job, part by part; with --send a phantom goes the whole way through it."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Annotated

import typer

from dicomnode.analyses import SELF_TEST
from dicomnode.cli.terminal import ConfigOption, JsonOption, opened, show
from dicomnode.config import ListenerSection, Settings
from dicomnode.errors import NodeError
from storage import Storage
from storage.records import PackageRecord, Peer, Route

LOOPBACK = "127.0.0.1"
SEND_SECONDS = 300.0
EXPIRY_NOTICE = timedelta(days=30)


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("check")(check)


def check(
    send: Annotated[bool, typer.Option("--send", help="push a phantom through the node that runs here")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Check configuration, database, disk, TLS, DICOMweb, packages, routes and receiving peers; with --send a phantom goes through."""
    rows: list[dict[str, object]] = []

    def item(what: str, probe: Callable[[], str]) -> None:
        try:
            rows.append({"what": what, "ok": True, "detail": probe()})
        except NodeError as error:
            rows.append({"what": what, "ok": False, "detail": str(error)})

    with opened(config) as (settings, storage):
        item("configuration", lambda: f"AE title {settings.node.ae_title}, port {settings.listener.port}")
        item("database", lambda: f"{storage.database.engine.dialect.name}, at the newest revision")
        item("disk", lambda: _disk(settings, storage))
        item("retention", lambda: _retention(settings, storage))
        over_tls = [peer.ae_title for peer in storage.registry.peers() if peer.tls]
        if settings.tls.certificate is not None or over_tls:
            item("TLS certificate", lambda: _certificate(settings, over_tls))
        if settings.tls.certificate is not None and settings.tls.port:
            item("TLS port", lambda: _answers_over_tls(settings))
        item("DICOMweb", lambda: _dicomweb(settings, storage))
        for known in storage.registry.packages():
            item(f"package {known.name}@{known.version} ({known.state})", partial(_digest, storage, known))
        for route in storage.registry.routes():
            item(f"route {route.name}", partial(_leads_on, storage, route))
        for peer in storage.registry.peers():
            if peer.receives:
                item(f"peer {peer.ae_title}", partial(_answers, settings, peer))
        if send:
            item("phantom", lambda: _send_phantom(settings, storage))
        show(rows, ["what", "ok", "detail"], as_json=json)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def _disk(settings: Settings, storage: Storage) -> str:
    free = storage.objects.free_bytes()
    if free < settings.storage.reserve_bytes:
        raise NodeError(f"{free} bytes free, below the reserve of {settings.storage.reserve_bytes}: images are refused")
    if storage.objects.intake_stopped:
        raise NodeError(f"{free} bytes free: images are refused until {storage.objects.resume_bytes} are, as the disk was at its reserve")
    return f"{free} bytes free, reserve {settings.storage.reserve_bytes}"


def _retention(settings: Settings, storage: Storage) -> str:
    """Whether what is removed is gone for good."""
    from dicomnode.retention import has_rule

    left = storage.retention.unfinished()
    if left:
        raise NodeError(f"{left} files of removed studies are still on the disk: a receiver removes them, if it may")
    return "by rule; `dicomnode retention` shows what would go" if has_rule(settings.retention) else "objects are kept for ever"


def _certificate(settings: Settings, peers: list[str]) -> str:
    """Whether the node's TLS files can be used today."""
    from dicomnode.dimse.tls import own_certificate, server_context, validity

    if settings.tls.certificate is None:
        raise NodeError(f"{', '.join(peers)} use TLS, and this node has no certificate: nothing goes either way")
    server_context(settings.tls)
    begin, end = validity(own_certificate(settings.tls))
    now = datetime.now(UTC)
    if not begin <= now <= end:
        raise NodeError(f"{settings.tls.certificate} is valid from {begin:%F} to {end:%F}: peers refuse it")
    soon = f": IT EXPIRES IN {(end - now).days} DAYS" if end - now < EXPIRY_NOTICE else ""
    return f"valid until {end:%F}{soon}; its key matches, the CA can be read"


def _answers_over_tls(settings: Settings) -> str:
    """Whether the node that runs here shows its certificate and takes it."""
    from dicomnode.dimse.tls import fingerprint, own_certificate, peer_context

    address = (_own_host(settings), settings.tls.port)
    context = peer_context(settings.tls, pin=fingerprint(own_certificate(settings.tls)), timeout_seconds=settings.tls.handshake_seconds)
    try:
        with socket.create_connection(address, settings.tls.handshake_seconds) as plain, context.wrap_socket(plain) as connection:
            connection.settimeout(0.5)
            with suppress(TimeoutError):  # by TLS 1.3 the node refuses a certificate after the handshake: silence is good news
                connection.recv(1)
            return f"{address[0]}:{address[1]} answers with this certificate over {connection.version()}"
    except ConnectionRefusedError:
        return f"nothing listens on {address[0]}:{address[1]} now"
    except OSError as error:
        raise NodeError(f"{address[0]}:{address[1]}: {context.trouble or error}") from error


def _dicomweb(settings: Settings, storage: Storage) -> str:
    """Whether the web role can be served as it is configured, answers now, and who may call it."""
    from dicomnode.web.server import is_loopback

    web = settings.web
    if not web.enabled:
        return "off: `serve` offers none, as [web] enabled is false"
    if web.tls != "off" and settings.tls.certificate is None:
        raise NodeError("web.tls needs the certificate, key and ca of [tls]")
    if is_loopback(web.host) and not web.credentials:
        callers = "whoever is on this machine may call"
    else:
        able = [peer for peer in storage.registry.peers() if peer.sends or peer.queries]
        callers = ", ".join(peer.ae_title for peer in able if _has_web_credentials(peer, mutual=web.tls == "mutual"))
        if not callers:
            raise NodeError("nobody may call: no peer has a passcode, or a certificate where web.tls is mutual")
        callers += " may call" + ("" if web.tls != "off" or is_loopback(web.host) else ", WITHOUT TLS")
    return f"{_answers_over_http(settings)}; {callers}"


def _has_web_credentials(peer: Peer, *, mutual: bool) -> bool:
    """Whether a peer has something to show to the web role, and a way to show all of it."""
    return (peer.passcode_hash or peer.client_cert) is not None and (peer.client_cert is None or mutual)


def _answers_over_http(settings: Settings) -> str:
    """Whether the web role answers, else whether its port is free."""
    from dicomnode.dimse.tls import PeerContext, fingerprint, own_certificate, peer_context, server_context

    host, port, seconds = _reachable(settings.web.host), settings.web.port, settings.tls.handshake_seconds
    context: PeerContext | None = None
    if settings.web.tls != "off":
        server_context(settings.tls)
        context = peer_context(settings.tls, pin=fingerprint(own_certificate(settings.tls)), timeout_seconds=seconds)
    if port == 0:
        return "it takes a free port"
    secure = "" if context is None else "s"
    connection = (
        HTTPConnection(host, port, timeout=seconds) if context is None else HTTPSConnection(host, port, timeout=seconds, context=context)
    )
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        with suppress(OSError), socket.create_connection((host, port), seconds):
            trouble = getattr(context, "trouble", None) or error
            raise NodeError(f"{host}:{port} is in use and doesn't answer as the node's own DICOMweb: {trouble}") from error
        return _is_free(settings.web.host, port)
    finally:
        connection.close()
    if status != 200:
        raise NodeError(f"http{secure} at {host}:{port} answers with status {status}")
    return f"it answers by http{secure} at {host}:{port}"


def _is_free(host: str, port: int) -> str:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise NodeError(f"{host}:{port} cannot be listened on: {error.strerror or error}") from error
    return f"nothing listens on {host}:{port} now, and it is free"


def _own_host(settings: Settings) -> str:
    """The address that the listener of this machine can be called at."""
    return _reachable(settings.listener.host)


def _reachable(host: str) -> str:
    """The address that what binds `host` can be called at from here."""
    return LOOPBACK if host in {"0.0.0.0", "::"} else host  # noqa: S104  a comparison, nothing binds


def _digest(storage: Storage, package: PackageRecord) -> str:
    from dicomnode.analysis.package import digest_of

    if digest_of(storage.registry.package_folder(package.name, package.version)) != package.digest:
        raise NodeError("the files have changed since the package was added: its digest is wrong")
    return package.digest


def _leads_on(storage: Storage, route: Route) -> str:
    package = storage.registry.package(route.package, route.version)
    if package is None or package.state != "enabled":
        raise NodeError(f"package {route.package} is not enabled: its studies are not analysed")
    receiving = {peer.ae_title for peer in storage.registry.peers() if peer.receives}
    deaf = [title for title in route.to_ae_titles if title not in receiving]
    if deaf:
        raise NodeError(f"{', '.join(deaf)} is no peer that receives: results cannot be delivered")
    return f"{package.name}@{package.version} to {', '.join(route.to_ae_titles)}"


def _answers(settings: Settings, peer: Peer) -> str:
    if peer.stow_url is not None:
        from dicomnode.stow import reach

        reach(peer, tls=settings.tls)
        return f"its DICOMweb answers at {peer.stow_url}"
    from dicomnode.dimse.scu import echo

    echo(peer, calling_ae_title=settings.node.ae_title, tls=settings.tls)
    return "answers C-ECHO" + ("" if peer.quirks is None else f"; what it accepts was probed on {peer.quirks.probed_at:%F}")


def _send_phantom(settings: Settings, storage: Storage) -> str:
    """Send a chest phantom to the running node like a scanner, and wait like a PACS until its SEG is here."""
    from dicomnode.demo.scanner import scan_folder, send_study
    from dicomnode.phantoms.studies import write_check_study

    node = Peer(
        ae_title=settings.node.ae_title,
        host=_own_host(settings),
        port=settings.listener.port,
        sends=False,
        receives=True,
        tls=False,
        client_cert=None,
    )
    with tempfile.TemporaryDirectory(prefix="dicomnode-check-") as name, _route_to_here(settings, storage) as has_segmentation:
        write_check_study(Path(name), f"check {uuid.uuid4()}")
        ((study, *_), _unread) = scan_folder(Path(name))
        began = time.monotonic()
        refused = send_study(study, node, calling_ae_title=SELF_TEST)
        if refused:
            raise NodeError(f"the node did not take the phantom: {refused[0]['reason']}")
        while not has_segmentation.wait(0.5):
            jobs = storage.jobs.jobs(study_instance_uid=study.study_instance_uid)
            ended = [f"{job.key}: {job.reason}" for job in jobs if job.state in {"failed", "refused"}]
            if ended:
                raise NodeError("; ".join(ended))
            if time.monotonic() - began > SEND_SECONDS:
                raise NodeError(f"no SEG within {SEND_SECONDS:g} s; see `dicomnode study show {study.study_instance_uid}`")
        return f"SEG received after {time.monotonic() - began:.1f} s; study {study.study_instance_uid}"


def _own_addresses(settings: Settings) -> tuple[str, ...]:
    """What a call from this machine to its own listener comes from."""
    found = socket.getaddrinfo(_own_host(settings), None, type=socket.SOCK_STREAM)
    return tuple({LOOPBACK, *(str(entry[4][0]).partition("%")[0] for entry in found)})


@contextmanager
def _route_to_here(settings: Settings, storage: Storage) -> Iterator[threading.Event]:
    """Route what the self-test sends through the enabled packages back to a listener here; the event is set when a SEG arrives."""
    from dicomnode.dimse.listener import Listener
    from dicomnode.dimse.negotiation import Caller
    from dicomnode.dimse.scp import ReceivedInstance, read_header
    from dicomnode.dimse.storing import in_memory

    enabled = [package for package in storage.registry.packages() if package.state == "enabled"]
    if not enabled:
        raise NodeError("no package is enabled")
    arrived = threading.Event()

    def store(received: ReceivedInstance) -> None:
        if read_header(received, received.dataset, "").modality == "SEG":
            arrived.set()

    def admit(caller: Caller) -> str | None:
        return None if caller.calling_ae_title == settings.node.ae_title else "calling AE title"

    listener = Listener(
        ListenerSection(host=LOOPBACK, port=0),
        [SELF_TEST],
        admit=admit,
        receive=in_memory(store),
    )
    listener.start()
    routes = [f"{SELF_TEST}-{package.name}" for package in enabled]
    try:
        storage.registry.add_peer(
            Peer(
                ae_title=SELF_TEST,
                host=LOOPBACK,
                port=listener.port,
                sends=True,
                receives=True,
                tls=False,
                client_cert=None,
                networks=_own_addresses(settings),
            )
        )
        for route, package in zip(routes, enabled, strict=True):
            storage.registry.add_route(
                Route(
                    name=route,
                    from_ae_title=SELF_TEST,
                    called_ae_title="*",
                    package=package.name,
                    version=package.version,
                    to_ae_titles=(SELF_TEST,),
                    priority="stat",
                    quiet_seconds=1.0,
                    report_refusals=False,
                )
            )
        yield arrived
    finally:
        for route in {known.name for known in storage.registry.routes()} & set(routes):
            storage.registry.remove_route(route)
        storage.registry.remove_peer(SELF_TEST)
        listener.stop(10.0)
