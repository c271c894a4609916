"""Commands over what admins change while the node runs: peers and routes."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dicomnode.cli.packages import known_package
from dicomnode.cli.terminal import ConfigOption, JsonOption, ae_title, name_and_version, opened, show
from dicomnode.config import Settings, check_dicomweb_address
from dicomnode.errors import NodeError, UsageError
from dicomnode.logs import printable
from dicomnode.results.profile import PROFILES, chosen
from storage import Storage
from storage.records import Peer, PriorRule, Route

peer = typer.Typer(no_args_is_help=True, help="Remote application entities: who may send here, who gets results.")
route = typer.Typer(no_args_is_help=True, help="Which studies go to which package, and whose results go to which peers.")
_PROFILES = "; ".join(f"{name} ({', '.join(kinds)})" for name, kinds in PROFILES.items())


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(peer, name="peer")
    app.add_typer(route, name="route")


@peer.command("add")
def peer_add(
    aet: str,
    host: Annotated[str | None, typer.Argument(help="host name or address; of a peer with --stow that of its URL")] = None,
    port: Annotated[int | None, typer.Argument(min=1, max=65535, help="TCP port, likewise")] = None,
    sends: Annotated[bool, typer.Option("--sends", help="may send studies here")] = False,
    receives: Annotated[bool, typer.Option("--receives", help="gets results")] = False,
    networks: Annotated[
        list[str] | None,
        typer.Option("--network", metavar="CIDR", help="where it may call from, several times; else the addresses of HOST"),
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="comes and is called over TLS, and in no other way")] = False,
    client_cert: Annotated[
        Path | None,
        typer.Option("--client-cert", metavar="FILE", help="its one certificate, PEM or DER; else any that the site's CA signed"),
    ] = None,
    user: Annotated[str | None, typer.Option("--user", help="user name that it must give (user identity negotiation)")] = None,
    passcode_file: Annotated[
        str | None, typer.Option("--passcode-file", metavar="FILE|prompt", help="its passcode: the first line of a file, or asked for")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="NAME", help=f"what its viewer shows: {_PROFILES}"),
    ] = None,
    objects: Annotated[
        list[str] | None,
        typer.Option("--object", metavar="KIND", help="a kind of result object that it is given, several times; instead of --profile"),
    ] = None,
    commits: Annotated[
        bool,
        typer.Option("--commits", help="a result is done when it says that it has it: by storage commitment, with --stow by QIDO-RS"),
    ] = False,
    seg_per: Annotated[
        Literal["model", "finding"],
        typer.Option("--seg-per", help="one segmentation with all findings of a model, or one for each finding"),
    ] = "model",
    empty_frames: Annotated[
        bool, typer.Option("--empty-frames", help="its segmentations have a frame for each image, with a finding or without")
    ] = False,
    queries: Annotated[
        bool | None,
        typer.Option("--queries/--no-queries", help="may ask what the node holds and fetch it; a peer that sends or receives may"),
    ] = None,
    stow: Annotated[
        str | None, typer.Option("--stow", metavar="URL", help="its DICOMweb: results go there by STOW-RS instead of C-STORE")
    ] = None,
    stow_credentials: Annotated[
        Path | None,
        typer.Option("--stow-credentials", metavar="FILE", help="file with USER:PASSCODE or Bearer TOKEN for it, read at each request"),
    ] = None,
    retrieve_by: Annotated[
        Literal["move", "get"] | None,
        typer.Option("--retrieve-by", help="how it is asked for studies and images; else by C-MOVE where it offers that, or by C-GET"),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Add a peer, or change the one with this AE title: what is not given again is taken back."""
    from dicomnode.admission import check_user_name, hash_passcode, network
    from dicomnode.dimse.tls import fingerprint, read_certificate

    stow, host, port = _address(stow, host, port, receives=receives)
    if stow_credentials is not None and stow is None:
        raise UsageError("--stow-credentials needs --stow")
    if not (sends or receives or queries):
        raise UsageError("a peer needs --sends, --receives or --queries")
    if not host or any(not 0x20 < ord(character) < 0x7F for character in host):
        raise UsageError(f"{host!r} is no host name or address")
    if client_cert is not None and not tls:
        raise UsageError("--client-cert needs --tls")
    if passcode_file is not None and user is None:
        raise UsageError("--passcode-file needs --user")
    if commits and not receives:
        raise UsageError("--commits needs --receives")
    if retrieve_by is not None and not sends:
        raise UsageError("--retrieve-by needs --sends")
    if (profile is not None or objects) and not receives:
        raise UsageError("--profile and --object need --receives")
    if (seg_per != "model" or empty_frames) and not receives:
        raise UsageError("--seg-per and --empty-frames need --receives")
    try:
        allowed = tuple(str(network(text)) for text in networks or ())
        user = check_user_name(user) if user is not None else None
        given = chosen(profile, objects or ())
    except ValueError as error:
        raise UsageError(str(error)) from error
    added = Peer(
        ae_title=ae_title(aet),
        host=host,
        port=port,
        sends=sends,
        receives=receives,
        tls=tls,
        client_cert=fingerprint(read_certificate(client_cert)) if client_cert is not None else None,
        networks=allowed,
        user=user,
        passcode_hash=hash_passcode(_passcode(passcode_file)) if passcode_file is not None else None,
        objects=given,
        commits=commits,
        seg_per=seg_per,
        empty_frames=empty_frames,
        queries=queries is not False,
        stow_url=stow,
        stow_credentials=str(stow_credentials.absolute()) if stow_credentials is not None else None,
        retrieve_by=retrieve_by,
    )
    with opened(config) as (_, storage):
        used = [known.name for known in storage.registry.routes() if added.ae_title in known.to_ae_titles]
        if used and not receives:
            raise UsageError(f"route {', '.join(used)} sends results to {added.ae_title}: change or remove the route first")
        before = storage.registry.peer(added.ae_title)
        same = before is not None and (before.host, before.port) == (host, port)
        storage.registry.add_peer(dataclasses.replace(added, quirks=before.quirks if before is not None and same else None))


@peer.command("list")
def peer_list(config: ConfigOption = None, json: JsonOption = False) -> None:
    """List the peers."""
    with opened(config) as (_, storage):
        columns = [
            "ae_title",
            "host",
            "port",
            "sends",
            "receives",
            "commits",
            "queries",
            "stow_url",
            "objects",
            "seg_per",
            "empty_frames",
            "networks",
            "tls",
            "client_cert",
            "user",
            "passcode",
            "probed_at",
            "retrieve_by",
        ]
        show([_shown(known, whole=json) for known in storage.registry.peers()], columns, as_json=json)


@peer.command("remove")
def peer_remove(aet: str, config: ConfigOption = None) -> None:
    """Remove a peer; its associations are rejected from the next one on."""
    with opened(config) as (_, storage):
        _known_peer(storage, aet)
        storage.registry.remove_peer(ae_title(aet))


@peer.command("echo")
def peer_echo(
    aet: str,
    probe: Annotated[bool, typer.Option("--probe", help="ask for each context that the node could want, and show what it accepts")] = False,
    save: Annotated[bool, typer.Option("--save", help="let the sender propose what is accepted first; needs --probe")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Send a C-ECHO to a peer, or find out what it accepts; of one with --stow, ask its DICOMweb for a study."""
    from dicomnode.dimse.scu import echo

    if (save or json) and not probe:
        raise UsageError("--save and --json need --probe")
    with opened(config) as (settings, storage):
        known = _known_peer(storage, aet)
        if probe and known.stow_url is not None:
            raise UsageError(f"{known.ae_title} is sent to by STOW-RS: there are no contexts to ask for")
        if probe:
            _probe(settings, storage, known, save=save, as_json=json)
            return
        if known.stow_url is not None:
            from dicomnode.stow import reach

            reach(known, tls=settings.tls)
            typer.echo(f"{known.ae_title} at {known.stow_url} answers")
            return
        commits = echo(known, calling_ae_title=settings.node.ae_title, tls=settings.tls)
        if known.commits and not commits:
            raise NodeError(f"{known.ae_title} at {known.host}:{known.port} answers, and does not accept storage commitment")
        typer.echo(f"{known.ae_title} at {known.host}:{known.port} answers" + (" and accepts storage commitment" if commits else ""))


def _probe(settings: Settings, storage: Storage, known: Peer, *, save: bool, as_json: bool) -> None:
    from dicomnode.dimse.probe import PROBED_SYNTAXES, probe, syntax_name

    probed = probe(known, calling_ae_title=settings.node.ae_title, tls=settings.tls)
    if save:
        storage.registry.add_peer(dataclasses.replace(known, quirks=probed.quirks(datetime.now(UTC))))
    if as_json:
        show([probed], [], as_json=True)
        return
    heads = {uid: syntax_name(uid) for uid in PROBED_SYNTAXES}
    rows = [
        {"SOP class": one.name, **{head: "yes" if uid in one.transfer_syntax_uids else "" for uid, head in heads.items()}}
        for one in probed.classes
    ]
    show(rows, ["SOP class", *heads.values()], as_json=False)
    for line in (
        f"{known.ae_title} at {known.host}:{known.port}: {probed.implementation_version_name or probed.implementation_class_uid}",
        "called AE title: " + ("checked" if probed.checks_called_ae_title else "not checked, any is answered"),
        "largest PDU that it takes: " + (f"{probed.maximum_pdu_bytes} bytes" if probed.maximum_pdu_bytes else "any"),
        f"TLS: {probed.tls or 'none, as it is registered'}",
        *probed.advice(commits=known.commits),
    ):
        typer.echo(printable(line))


@route.command("add")
def route_add(
    name: str,
    package_name: Annotated[str, typer.Option("--package", help="NAME[@VERSION]; without a version the enabled one")],
    to: Annotated[list[str], typer.Option("--to", help="AE title that gets the results; may be given several times")],
    sender: Annotated[str, typer.Option("--from", help="calling AE title, or * for every peer that sends")] = "*",
    called: Annotated[str, typer.Option("--called", help="called AE title, or *")] = "*",
    priority: Annotated[Literal["stat", "routine"] | None, typer.Option("--priority", help="else what the images ask for")] = None,
    quiet: Annotated[float, typer.Option("--quiet", min=0.0, help="seconds without an image until a study counts as complete")] = 30.0,
    early: Annotated[
        bool,
        typer.Option("--early", help="a study closes sooner where it is proven complete: by the peer that is asked, else by its images"),
    ] = False,
    longest_wait: Annotated[
        float | None,
        typer.Option("--longest-wait", min=0.0, help="seconds after the quiet period for images evidently absent; else four quiet periods"),
    ] = None,
    completeness_peer: Annotated[
        str | None, typer.Option("--completeness-peer", metavar="AET", help="a peer that is asked (C-FIND) what it holds of the study")
    ] = None,
    first_series: Annotated[
        float | None,
        typer.Option(
            "--first-series",
            min=0.0,
            help="start on series that are evidently complete and quiet for so many seconds, while others still come",
        ),
    ] = None,
    fetch_missing: Annotated[
        bool, typer.Option("--fetch-missing", help="images that this peer holds and that did not come are fetched from it")
    ] = False,
    priors_from: Annotated[
        str | None,
        typer.Option("--priors-from", metavar="AET", help="a peer that earlier studies of the patient are fetched from, to compare with"),
    ] = None,
    priors_count: Annotated[int, typer.Option("--priors-count", min=1, max=20, help="how many of them, the newest first")] = 1,
    priors_days: Annotated[int, typer.Option("--priors-days", min=1, max=36500, help="and how old at most")] = 1095,
    prior_modalities: Annotated[
        list[str] | None, typer.Option("--prior-modality", metavar="MODALITY", help="of theirs, several times; else those of the study")
    ] = None,
    prior_body_parts: Annotated[
        list[str] | None,
        typer.Option("--prior-body-part", metavar="PART", help="of their series, several times; `same`: the study's own; else any"),
    ] = None,
    report_refusals: Annotated[
        bool, typer.Option("--report-refusals", help="send an SR 'not analysed: reason' for studies that don't fit")
    ] = False,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME", help="what its peers are given, in place of their own display profiles")
    ] = None,
    objects: Annotated[
        list[str] | None,
        typer.Option(
            "--object", metavar="KIND", help="a kind of result object that its peers are given, several times; instead of --profile"
        ),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Add a route, or change the one with this name."""
    try:
        given = chosen(profile, objects or ()) if profile is not None or objects else None
    except ValueError as error:
        raise UsageError(str(error)) from error
    wanted, version = name_and_version(package_name)
    with opened(config) as (_, storage):
        known_package(storage, package_name)
        for title in to:
            if not _known_peer(storage, title).receives:
                raise UsageError(f"{title} is a peer that doesn't receive results: `dicomnode peer add {title} HOST PORT --receives`")
        if completeness_peer is not None:
            known = _known_peer(storage, completeness_peer)
            if fetch_missing and not known.sends:
                raise UsageError(f"{completeness_peer} is a peer that doesn't send, so nothing can be fetched from it")
        elif fetch_missing:
            raise UsageError("--fetch-missing needs --completeness-peer")
        priors = None
        if priors_from is not None:
            if not _known_peer(storage, priors_from).sends:
                raise UsageError(f"{priors_from} is a peer that doesn't send, so nothing can be fetched from it")
            parts, modalities = (tuple(text.strip().upper() for text in texts or ()) for texts in (prior_body_parts, prior_modalities))
            priors = PriorRule(
                ae_title=ae_title(priors_from), count=priors_count, days=priors_days, modalities=modalities, body_parts=parts
            )
        storage.registry.add_route(
            Route(
                name=name,
                from_ae_title=sender if sender == "*" else ae_title(sender),
                called_ae_title=called if called == "*" else ae_title(called),
                package=wanted,
                version=version,
                to_ae_titles=tuple(ae_title(title) for title in to),
                priority=priority,
                quiet_seconds=quiet,
                report_refusals=report_refusals,
                objects=given,
                early=early,
                longest_wait_seconds=longest_wait,
                completeness_peer=None if completeness_peer is None else ae_title(completeness_peer),
                priors=priors,
                fetch_missing=fetch_missing,
                first_series_seconds=first_series,
            )
        )


@route.command("list")
def route_list(config: ConfigOption = None, json: JsonOption = False) -> None:
    """List the routes."""
    with opened(config) as (_, storage):
        columns = [
            "name",
            "from_ae_title",
            "called_ae_title",
            "package",
            "version",
            "to_ae_titles",
            "priority",
            "quiet_seconds",
            "report_refusals",
            "objects",
            "early",
            "longest_wait_seconds",
            "completeness_peer",
            "fetch_missing",
            "priors",
            "first_series_seconds",
        ]
        show(storage.registry.routes(), columns, as_json=json)


@route.command("remove")
def route_remove(name: str, config: ConfigOption = None) -> None:
    """Remove a route."""
    with opened(config) as (_, storage):
        if name not in {known.name for known in storage.registry.routes()}:
            raise UsageError(f"there is no route {name!r}")
        storage.registry.remove_route(name)


def _address(stow: str | None, host: str | None, port: int | None, *, receives: bool) -> tuple[str | None, str, int]:
    """Return the address of a peer's DICOMweb, its host and its port. What --stow doesn't name HOST and PORT do."""
    if stow is not None:
        if not receives:
            raise UsageError("--stow needs --receives")
        try:
            stow, its_host, its_port = check_dicomweb_address(stow)
        except ValueError as error:
            raise UsageError(str(error)) from error
        host, port = host or its_host, port or its_port
    if host is None or port is None:
        raise UsageError("a peer needs HOST and PORT, or --stow URL")
    return stow, host, port


def _passcode(file: str) -> str:
    """Read a passcode from the first line of a file, or ask for it."""
    if file == "prompt":
        passcode = str(typer.prompt("Passcode", hide_input=True, confirmation_prompt=True))
    else:
        try:
            passcode = next(iter(Path(file).read_text(encoding="utf-8").splitlines()), "")
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not text in UTF-8") from error
    if not passcode:
        raise UsageError("a passcode has at least one character")
    return passcode


def _shown(peer: Peer, *, whole: bool) -> dict[str, Any]:
    """A peer as it is listed: whether it has a passcode, and nothing of it; of a fingerprint the begin, but for programs."""
    row = dataclasses.asdict(peer)
    row["passcode"] = row.pop("passcode_hash") is not None
    if not whole:
        row["probed_at"] = None if peer.quirks is None else peer.quirks.probed_at
    if not whole and peer.client_cert is not None:
        row["client_cert"] = f"{peer.client_cert[:12]}…"
    return row


def _known_peer(storage: Storage, aet: str) -> Peer:
    found = storage.registry.peer(ae_title(aet))
    if found is None:
        raise UsageError(f"there is no peer {aet!r}")
    return found
