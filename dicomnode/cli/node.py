"""Commands that set the node up and run it: init, serve, run, check, conformance, demo."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dicomnode.cli.serve import StopAsked, Supervisor
from dicomnode.cli.terminal import ConfigOption, opened
from dicomnode.config import Settings, commented_toml, load_settings
from dicomnode.engine import EngineClient, Queue, Worker, prepare_engine
from dicomnode.errors import NodeError, UsageError
from dicomnode.logs import configure_logs, get_logger
from storage import Storage, prepare_storage

DRAIN_SECONDS = 30.0
SENDER_CONCURRENCY = 4

log = get_logger(__name__)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("init")(init)
    app.command("serve")(serve)
    app.command("run")(run)
    app.command("conformance")(conformance)
    app.command("demo")(demo)


def init(folder: Annotated[Path, typer.Argument()] = Path()) -> None:
    """Write a commented dicomnode.toml."""
    target = folder / "dicomnode.toml"
    if target.exists():
        raise UsageError(f"{target} exists already and is left as it is")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target.write_text(commented_toml(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {target}; next: dicomnode peer add, package add, route add, serve")


def serve(config: ConfigOption = None) -> None:
    """Run every role on this machine, each as a process of its own. SIGTERM drains."""
    settings = _start_logs(config)
    _prepare(settings)
    raise typer.Exit(_supervise(settings, config, "analyser", "sender", *(["web"] if settings.web.enabled else [])))


def run(
    role: Literal["receiver", "analyser", "sender", "web"],
    config: ConfigOption = None,
    supervised: Annotated[
        bool, typer.Option("--supervised", hidden=True, help="drain when standard input ends: the supervisor is gone")
    ] = False,
) -> None:
    """Run one role. SIGTERM drains."""
    settings = _start_logs(config)
    _prepare(settings)
    if role == "receiver" and settings.listener.processes > 1 and not supervised:
        raise typer.Exit(_supervise(settings, config))
    roles: dict[str, Callable[[Settings, Storage, EngineClient], Callable[[], bool]]] = {
        "receiver": _start_receiver,
        "analyser": _start_analyser,
        "sender": _start_sender,
        "web": _start_web,
    }
    stop_asked = StopAsked()
    if supervised:
        threading.Thread(target=_wait_for_end_of_input, args=(stop_asked,), daemon=True).start()
    with opened(config) as (_, storage):
        client = EngineClient(settings.database_url)
        stop = roles[role](settings, storage, client)
        gc.collect()
        gc.freeze()  # what was imported stays: no collection has to walk it again
        log.info("running", role=role)
        stop_asked.wait()
        log.info("draining", role=role)
        drained = stop()
        client.close()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        # The interpreter would wait for them: one amid a job that has outlasted the drain, or one of DBOS that waits to be told, perhaps
        # for ever, how the work ended that another worker took over. What they might still do is nobody's loss.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if drained else 1)


def conformance(config: ConfigOption = None) -> None:
    """Print the DICOM conformance statement, rendered from the tables the node runs on."""
    from dicomnode.dimse.conformance import conformance_statement
    from dicomnode.results.codes import PRIVATE

    typer.echo(conformance_statement(load_settings(config) if config else Settings(), PRIVATE))


def demo(
    source: Annotated[Path | None, typer.Option("--input", help="folder of DICOM files; else built-in phantom studies")] = None,
    out: Annotated[Path, typer.Option(help="where the results go; must be empty or absent")] = Path("demo-out"),
    timeout: Annotated[float, typer.Option(min=1, help="seconds")] = 600.0,
) -> None:
    """Run the whole job once: a scanner sends studies, the node analyses them, a PACS receives the results."""
    from dicomnode.cli.packages import add_package, builtin_packages, check_package, enable_package
    from dicomnode.demo import run_demo

    def enable_packages(storage: Storage) -> list[str]:
        for folder in builtin_packages().values():
            enable_package(storage, check_package(storage, add_package(storage, folder)))
        return list(builtin_packages())

    configure_logs("warning", json_lines=False)
    raise typer.Exit(run_demo(source, out, timeout, Console(width=None if sys.stdout.isatty() else 160), enable_packages=enable_packages))


def _supervise(settings: Settings, config: Path | None, *roles: str) -> int:
    """Run the listener processes and these roles as children; return the exit code."""
    if settings.listener.processes > 1:
        _check_ports(settings)
    receivers = ("receiver",) * settings.listener.processes
    return Supervisor(config, roles=(*receivers, *roles), drain_seconds=DRAIN_SECONDS + 15).run()


def _check_ports(settings: Settings) -> None:
    """Make sure that nobody else listens: processes that share a port would take half of another node's associations unasked."""
    for port in (settings.listener.port, *([settings.tls.port] if settings.tls.certificate else [])):
        with socket.socket(socket.AF_INET6 if ":" in settings.listener.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.listener.host, port))
            except OSError as error:
                raise NodeError(f"cannot listen on {settings.listener.host}:{port}: {error.strerror or error}") from error


def _wait_for_end_of_input(stop_asked: StopAsked) -> None:
    while os.read(sys.stdin.fileno(), 1):  # not the buffered reader: its lock would be held when the interpreter ends
        pass
    stop_asked.ask()


def _start_logs(config: Path | None) -> Settings:
    settings = load_settings(config)
    configure_logs(settings.log.level, json_lines=settings.log.json_lines)
    return settings


def _prepare(settings: Settings) -> None:
    prepare_storage(settings.database_url, settings.data_folder)
    prepare_engine(settings.database_url)


def _start_receiver(settings: Settings, storage: Storage, client: EngineClient) -> Callable[[], bool]:
    from dicomnode.commitment import StorageCommitment
    from dicomnode.holdings import name_old_results
    from dicomnode.receiver import Receiver
    from dicomnode.retention import Retention

    name_old_results(storage)
    receiver = Receiver(settings, storage, commitment=StorageCommitment(settings, storage, client))
    retention = Retention(storage, settings.retention)
    try:
        receiver.start()
    except OSError as error:
        listener = settings.listener
        raise NodeError(f"cannot listen on {listener.host}:{listener.port}: {error.strerror or error}") from error
    stop_completion = _start_completion(settings, storage, client)
    retention.start()

    def stop() -> bool:
        retention.stop()
        receiver.stop()
        stop_completion()
        return True

    return stop


def _start_analyser(settings: Settings, storage: Storage, client: EngineClient) -> Callable[[], bool]:
    from dicomnode.analysis.decoding import Decoder
    from dicomnode.pipeline import Analyser
    from dicomnode.prefetch import Prefetcher

    decoder = Decoder()
    prefetcher = Prefetcher(storage, decoder, settings.analysis.prefetch_bytes) if settings.analysis.prefetch_bytes else None
    analyser = Analyser(settings, storage, client, decoder=decoder, prefetcher=prefetcher)
    queues = (Queue(kind="analyse", work=analyser.analyse, concurrency=1),)
    worker = Worker(settings.engine, storage, client, database_url=settings.database_url, queues=queues)
    analyser.let_pass(worker.do_now)
    worker.start()
    stop_completion = _start_completion(settings, storage, client)
    if prefetcher:
        prefetcher.start()

    def stop() -> bool:
        if prefetcher:
            prefetcher.stop()
        stop_completion()
        drained = worker.stop(DRAIN_SECONDS)
        decoder.close()
        return drained

    return stop


def _start_completion(settings: Settings, storage: Storage, client: EngineClient) -> Callable[[], None]:
    from dicomnode.completion import Completion
    from dicomnode.dimse.retrieving import Retriever
    from dicomnode.inquiry import Inquirer, Inquiry
    from dicomnode.missing import MissingImages
    from dicomnode.reception import Reception

    reception = Reception(settings.listener, storage)
    retriever = Retriever(settings.node.ae_title, settings.tls, reception.begin, reception.ended)
    inquiry = Inquiry(storage, Inquirer(calling_ae_title=settings.node.ae_title, tls=settings.tls))
    completion = Completion(storage, client, settings.engine, inquiry, MissingImages(storage, settings.missing, retriever))
    completion.start()
    return completion.stop


def _start_sender(settings: Settings, storage: Storage, client: EngineClient) -> Callable[[], bool]:
    from dicomnode.backlog import Backlogs
    from dicomnode.commitment import StorageCommitment
    from dicomnode.delivery import Sender

    commitment, backlogs = StorageCommitment(settings, storage, client), Backlogs(settings, storage, client)

    def resume(key: str, _attempt: int) -> float | None:
        return backlogs.work_off(worker.do_now, key)

    queues = (
        Queue(kind="deliver", work=Sender(settings, storage, client).deliver, concurrency=SENDER_CONCURRENCY),
        Queue(kind="commit", work=commitment.answer, concurrency=SENDER_CONCURRENCY, rows=storage.requests),
        Queue(kind="resume", work=resume, concurrency=SENDER_CONCURRENCY, rows=storage.backlogs),
    )
    worker = Worker(settings.engine, storage, client, database_url=settings.database_url, queues=queues)
    worker.start()
    return lambda: worker.stop(DRAIN_SECONDS)


def _start_web(settings: Settings, storage: Storage, client: EngineClient) -> Callable[[], bool]:
    from dicomnode.web.app import Web

    web = Web(settings, storage, client)
    try:
        web.start()
    except OSError as error:
        raise NodeError(f"cannot listen on {settings.web.host}:{settings.web.port}: {error.strerror or error}") from error

    def stop() -> bool:
        web.stop(DRAIN_SECONDS)
        return True

    return stop
