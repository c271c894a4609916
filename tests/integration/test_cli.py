"""What each command answers: done, failed or wrong use as exit code, errors as one sentence, listings as JSON."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from dicomnode.cli import run
from dicomnode.completion import close_complete_studies
from dicomnode.config import load_settings
from dicomnode.engine import EngineClient, prepare_engine
from dicomnode.version import VERSION
from pacs import LOOPBACK, NODE_AET, SCANNER_AET, free_port, listens, loopback_peer, running, wait_until
from storage import Storage, open_storage, prepare_storage
from storage.records import (
    InstanceHeader,
    Job,
    PackageRecord,
    Peer,
    Quarantined,
    Result,
    Revision,
    Route,
    Series,
    StoredObject,
    Study,
    WorkItem,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "dicomnode"))
from small_bundle import write_package

SECRET = "pa55word"
LONG = "A" * 17
STUDY = "1.2.3"
KEY = f"analyse/{STUDY}/1/bright/1"


class Shell:
    """Runs commands in this process, in a folder with a fresh dicomnode.toml."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capture = folder, capture

    def __call__(self, *words: str | int | Path) -> tuple[int, str, str]:
        """Return exit code, standard output and standard error."""
        self._capture.readouterr()
        code = run([str(word) for word in words])
        return (code, *self._capture.readouterr())

    def done(self, *words: str | int | Path) -> str:
        """Run a command that must succeed, and say nothing on standard error; return what it printed."""
        code, output, errors = self(*words)
        assert (code, errors) == (0, "")
        return output

    def listing(self, *words: str | int | Path) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.done(*words, "--json"))
        return rows

    def complaint(self, code: int, *words: str | int | Path) -> str:
        """Run a command that must end with `code` and one sentence on standard error; return the sentence."""
        actual, _, errors = self(*words)
        assert actual == code, errors
        assert errors.startswith("dicomnode: ")
        assert errors.count("\n") == 1
        assert errors.endswith("\n")
        assert not re.search(r"Traceback|[╭╰│]", errors)
        assert len(errors) > len("dicomnode: \n")
        return errors.removeprefix("dicomnode: ").strip()

    def storage(self) -> Storage:
        settings = load_settings(None)
        prepare_storage(settings.database_url, settings.data_folder)
        return open_storage(settings.database_url, settings.data_folder)


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, logs_restored: None) -> Shell:
    monkeypatch.chdir(tmp_path)
    for name in ("DICOMNODE_CONFIG", "DICOMNODE_NODE__AE_TITLE"):
        monkeypatch.delenv(name, raising=False)
    shell = Shell(tmp_path, capsys)
    assert run(["init"]) == 0
    return shell


def names(record: type) -> set[str]:
    return {field.name for field in fields(record)}


@pytest.mark.parametrize("group", [[], ["peer"], ["route"], ["package"], ["study"], ["job"]])
def test_a_group_alone_prints_its_help_and_nothing_else(shell: Shell, group: list[str]) -> None:
    code, output, errors = shell(*group)
    assert (code, errors) == (2, "")
    assert "Usage: dicomnode" in output
    code, output, errors = shell(*group, "--help")
    assert (code, errors) == (0, "")
    assert "Usage: dicomnode" in output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("nonsense", "nonsense"),
        ("peer nonsense", "nonsense"),
        ("--nonsense", "--nonsense"),
        ("peer list --nonsense", "--nonsense"),
        ("peer add", "aet"),
        ("peer add A", "HOST and PORT"),
        ("peer add A h 0 --sends", "port"),
        ("peer add A h 70000 --sends", "port"),
        ("peer add A h abc --sends", "port"),
        ("peer add A h 104", "--sends"),
        (f"peer add {LONG} h 104 --sends", "longer than 16"),
        ("peer add A\\B h 104 --sends", "VR AE"),
        ("peer add A h\x1b[31m 104 --sends", "no host name"),
        ("peer echo NOBODY", "no peer 'NOBODY'"),
        ("peer remove NOBODY", "no peer 'NOBODY'"),
        (f"peer echo {LONG}", "longer than 16"),
        ("route add r --to PACS", "--package"),
        ("route add r --package bright", "--to"),
        ("route add r --package bright --to PACS", "no package 'bright'"),
        ("route add r --package bright --to PACS --priority urgent", "--priority"),
        ("route add r --package bright --to PACS --quiet -1", "--quiet"),
        ("route remove r", "no route 'r'"),
        ("package add absent", "neither a folder nor a built-in package"),
        ("package check bright", "no package 'bright'"),
        ("package enable bright@1.0", "no package 'bright@1.0'"),
        ("package disable bright", "no package 'bright'"),
        ("study show 1.2", "no study '1.2'"),
        ("study reanalyse 1.2", "no study '1.2'"),
        ("job retry x", "no job 'x'"),
        ("job cancel x", "no job 'x'"),
        ("job priority x stat", "no job 'x'"),
        ("job priority x urgent", "priority"),
        ("job list --state lost", "--state"),
        ("run", "role"),
        ("run surgeon", "surgeon"),
        ("init", "exists already"),
        ("train", "CONFIG"),
        ("train absent.toml", "absent.toml"),
        ("evaluate absent", "absent"),
        ("demo --timeout 0", "--timeout"),
        ("peer list --config absent.toml", "absent.toml"),
        ("serve --config absent.toml", "absent.toml"),
        ("conformance --config absent.toml", "absent.toml"),
    ],
)
def test_wrong_use_is_one_sentence_that_names_what_is_wrong(shell: Shell, words: str, expected: str) -> None:
    assert expected in shell.complaint(2, *words.split(" "))


def test_init_leaves_what_is_there_as_it_is(shell: Shell) -> None:
    file = shell.folder / "dicomnode.toml"
    file.write_text("# mine\n", encoding="utf-8")
    shell.complaint(2, "init")
    assert file.read_text(encoding="utf-8") == "# mine\n"
    shell.done("init", "new/folder")
    assert load_settings(shell.folder / "new/folder/dicomnode.toml").data_folder == shell.folder / "new/folder/data"
    assert "cannot be written" in shell.complaint(2, "init", "dicomnode.toml")


def test_the_configuration_is_the_named_file_else_that_of_the_environment_else_the_folder_s(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("named", "environment"):
        (shell.folder / f"{name}.toml").write_text(f'[node]\ndata = "{name}"\n', encoding="utf-8")
    shell.done("peer", "add", "HERE", "localhost", 104, "--sends")
    monkeypatch.setenv("DICOMNODE_CONFIG", str(shell.folder / "environment.toml"))
    assert shell.listing("peer", "list") == []
    shell.done("peer", "add", "THERE", "localhost", 104, "--sends")
    named = ["--config", shell.folder / "named.toml"]
    assert shell.listing("peer", "list", *named) == []
    monkeypatch.delenv("DICOMNODE_CONFIG")
    assert [peer["ae_title"] for peer in shell.listing("peer", "list")] == ["HERE"]


def test_every_mistake_of_a_configuration_is_named_at_once(shell: Shell) -> None:
    file = shell.folder / "dicomnode.toml"
    file.write_text(f'[node]\nae_title = "{LONG}"\n[listener]\nport = 70000\n[log]\nvolume = 11\n', encoding="utf-8")
    for command in (["peer", "list"], ["serve"], ["run", "receiver"], ["check"], ["study", "list"]):
        sentence = shell.complaint(2, *command)
        assert "3 mistake(s)" in sentence
        assert all(key in sentence for key in ("node.ae_title", "listener.port", "log.volume"))
    file.write_text("[node\n", encoding="utf-8")
    assert "is not TOML" in shell.complaint(2, "peer", "list")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"mysql://me:{SECRET}@localhost/x", "neither sqlite nor postgresql"),
        (f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/x", "the database cannot be used now"),
        (f"postgresql+asyncpg://me:{SECRET}@localhost/x", "no driver"),
        (f"postgresql+psycopg://me:{SECRET}@localhost:port/x", "malformed"),
        (f"{SECRET}", "malformed"),
        ("sqlite:////proc/nowhere/x.sqlite", "/proc/nowhere"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_sentence_without_its_password(shell: Shell, url: str, expected: str) -> None:
    (shell.folder / "dicomnode.toml").write_text(f'[storage]\ndatabase_url = "{url}"\n', encoding="utf-8")
    for command in (["peer", "list"], ["serve"], ["run", "sender"], ["check"]):
        sentence = shell.complaint(1, *command)
        assert expected in sentence
        assert SECRET not in sentence


def test_a_data_folder_that_cannot_be_made_is_one_sentence(shell: Shell) -> None:
    (shell.folder / "dicomnode.toml").write_text('[node]\ndata = "file"\n', encoding="utf-8")
    (shell.folder / "file").write_text("", encoding="utf-8")
    assert "file" in shell.complaint(1, "peer", "list")
    assert "file" in shell.complaint(1, "serve")


def test_peers_are_added_changed_listed_and_removed(shell: Shell) -> None:
    shell.done("peer", "add", "SCANNER", "localhost", 104, "--sends")
    shell.done("peer", "add", "PACS", "10.0.0.1", 104, "--sends", "--receives")
    shell.done("peer", "add", "PACS", "10.0.0.2", 105, "--receives")
    rows = shell.listing("peer", "list")
    assert [(row["ae_title"], row["host"], row["port"], row["sends"], row["receives"]) for row in rows] == [
        ("PACS", "10.0.0.2", 105, False, True),
        ("SCANNER", "localhost", 104, True, False),
    ]
    assert set(rows[0]) == names(Peer) - {"passcode_hash"} | {"passcode"}
    assert "10.0.0.2" in shell.done("peer", "list")
    shell.done("peer", "remove", "PACS")
    assert [row["ae_title"] for row in shell.listing("peer", "list")] == ["SCANNER"]


def test_an_echo_to_a_peer_that_is_down_or_unknown_to_the_name_service_fails_in_one_sentence(shell: Shell) -> None:
    shell.done("peer", "add", "DOWN", LOOPBACK, free_port(), "--receives")
    assert "cannot be reached" in shell.complaint(1, "peer", "echo", "DOWN")
    shell.done("peer", "add", "NAMELESS", "no..host", 104, "--receives")
    assert "the host no..host is not known" in shell.complaint(1, "peer", "echo", "NAMELESS")
    code, output, _ = shell("check", "--json")
    rows = {row["what"]: row for row in json.loads(output)}
    assert code == 1
    assert {what for what, row in rows.items() if not row["ok"]} >= {"peer DOWN", "peer NAMELESS"}
    assert rows["configuration"]["ok"]
    assert rows["database"]["ok"]


def test_routes_lead_from_peers_over_packages_to_peers_that_receive(shell: Shell) -> None:
    enable(shell, write_package(shell.folder / "bright"))
    shell.done("peer", "add", "SCANNER", "localhost", 104, "--sends")
    shell.done("peer", "add", "PACS", "localhost", 104, "--receives")
    wanted = ["route", "add", "chest", "--from", "SCANNER", "--package", "bright"]
    assert "no peer 'NOBODY'" in shell.complaint(2, *wanted, "--to", "NOBODY")
    assert "doesn't receive" in shell.complaint(2, *wanted, "--to", "SCANNER")
    assert "longer than 16" in shell.complaint(2, *wanted, "--to", "PACS", "--called", LONG)
    assert "no package 'bright@2.0'" in shell.complaint(2, "route", "add", "chest", "--package", "bright@2.0", "--to", "PACS")
    shell.done(*wanted, "--to", "PACS", "--priority", "stat", "--quiet", 5)
    (row,) = shell.listing("route", "list")
    assert set(row) == names(Route)
    assert (row["name"], row["from_ae_title"], row["called_ae_title"], row["to_ae_titles"], row["priority"], row["quiet_seconds"]) == (
        "chest", "SCANNER", "*", ["PACS"], "stat", 5.0,
    )  # fmt: skip
    assert "chest" in shell.complaint(1, "peer", "remove", "PACS")
    assert "chest" in shell.complaint(2, "peer", "add", "PACS", "localhost", 104, "--sends")
    code, output, _ = shell("check", "--json")
    assert {row["what"]: row["ok"] for row in json.loads(output)}["route chest"]
    shell.done("package", "disable", "bright")
    code, output, _ = shell("check", "--json")
    assert code == 1
    assert not {row["what"]: row["ok"] for row in json.loads(output)}["route chest"]
    shell.done("route", "remove", "chest")
    shell.done("peer", "remove", "PACS")
    assert shell.listing("route", "list") == []


def test_a_package_is_added_as_data_checked_and_only_then_enabled(shell: Shell) -> None:
    source = write_package(shell.folder / "source")
    assert "package check bright@1.0" in shell.done("package", "add", source)
    assert "has not passed" in shell.complaint(2, "package", "enable", "bright")
    (row,) = shell.listing("package", "list")
    assert set(row) == names(PackageRecord)
    assert row["state"] == "added"

    (report,) = shell.listing("package", "check", "bright")
    assert (report["name"], report["version"], report["digest"]) == ("bright", "1.0", row["digest"])
    shell.done("package", "enable", "bright@1.0")
    assert shell.listing("package", "list")[0]["state"] == "enabled"

    other = write_package(shell.folder / "other", weights={"weight": torch.ones(1, 1, 1, 1, 1), "bias": torch.zeros(1)})
    assert "other content" in shell.complaint(2, "package", "add", other)
    assert shell.listing("package", "list")[0]["digest"] == row["digest"]


def test_a_package_that_changed_after_it_was_added_is_neither_checked_nor_enabled_until_it_is_added_again(shell: Shell) -> None:
    source = write_package(shell.folder / "source")
    enable(shell, source)
    manifest = shell.folder / "data" / "packages" / "bright" / "1.0" / "manifest.toml"
    manifest.write_text(manifest.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    assert "digest" in shell.complaint(2, "package", "enable", "bright")
    code, output, _ = shell("check", "--json")
    assert code == 1
    assert "digest" in next(row["detail"] for row in json.loads(output) if row["what"].startswith("package bright@1.0"))
    assert "digest" in shell.complaint(2, "package", "check", "bright")
    assert shell.listing("package", "list")[0]["state"] == "added", "a failed check takes the consent back"
    shell.done("package", "add", source)
    assert "# changed" not in manifest.read_text(encoding="utf-8")


def test_a_package_that_is_incomplete_malformed_or_unsafe_is_refused_in_one_sentence(shell: Shell) -> None:
    (shell.folder / "empty").mkdir()
    assert "lacks manifest.toml" in shell.complaint(2, "package", "add", "empty")
    malformed = write_package(shell.folder / "malformed", manifest='schema = 1\nname = "Malformed!"\nspeed = "fast"\n')
    sentence = shell.complaint(2, "package", "add", malformed)
    assert all(word in sentence for word in ("mistake(s)", "name", "speed", "outputs"))
    linked = write_package(shell.folder / "linked")
    (linked / "bundle" / "passwd").symlink_to("/etc/passwd")
    assert "symbolic link" in shell.complaint(2, "package", "add", linked)
    assert shell.listing("package", "list") == []

    unsafe = write_package(shell.folder / "unsafe")
    (unsafe / "bundle/models/model.safetensors").unlink()
    torch.save({"weight": Exploit(shell.folder / "exploded")}, unsafe / "bundle/models/model.pt")
    shell.done("package", "add", unsafe)
    assert "did not pass its check" in shell.complaint(2, "package", "check", "bright")
    assert "has not passed" in shell.complaint(2, "package", "enable", "bright")
    assert not (shell.folder / "exploded").exists()


class Exploit:
    """An object whose unpickling makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


def test_an_empty_node_lists_nothing(shell: Shell) -> None:
    for words in (["peer", "list"], ["route", "list"], ["package", "list"], ["study", "list"], ["job", "list"]):
        assert shell.listing(*words) == []
        assert shell.done(*words)


def test_studies_and_jobs_are_shown_and_moved_by_hand(shell: Shell) -> None:
    enable(shell, write_package(shell.folder / "bright"))
    shell.done("peer", "add", "PACS", "localhost", 104, "--receives")
    shell.done("route", "add", "chest", "--package", "bright", "--to", "PACS")
    storage = shell.storage()
    receive(storage)
    assert "no closed revision" in shell.complaint(2, "study", "reanalyse", STUDY)
    close(storage)

    (row,) = shell.listing("study", "list")
    assert set(row) == names(Study)
    (shown,) = shell.listing("study", "show", STUDY)
    assert list(shown) == ["study", "series", "revisions", "jobs", "workitems", "results", "deliveries", "refused"]
    assert set(shown["series"][0]) == names(Series)
    assert set(shown["revisions"][0]) == names(Revision)
    assert set(shown["jobs"][0]) == names(Job)
    assert set(shown["workitems"][0]) == names(WorkItem)
    (job,) = shell.listing("job", "list", "--state", "queued", "--kind", "analyse")
    assert (job["key"], job["priority"]) == (KEY, "routine")

    shell.done("job", "priority", KEY, "stat")
    assert shell.listing("job", "list")[0]["priority"] == "stat"
    shell.done("job", "cancel", KEY)
    (job,) = shell.listing("job", "list")
    assert (job["state"], job["reason"]) == ("cancelled", "cancelled by hand")
    assert "nothing to cancel" in shell.complaint(2, "job", "cancel", KEY)
    assert "nothing to wait for" in shell.complaint(2, "job", "priority", KEY, "stat")
    shell.done("job", "retry", KEY)
    (job,) = shell.listing("job", "list")
    assert (job["state"], job["reason"], job["attempts"]) == ("queued", None, 0)
    (shown,) = shell.listing("study", "show", STUDY)
    assert [item["state"] for item in shown["workitems"]] == ["CANCELED", "SCHEDULED"], "what is done again is another work item"
    assert shell.done("study", "reanalyse", STUDY).strip() == f"analyse/{STUDY}/1/bright/2"
    storage.jobs.finish(KEY, "done")
    assert "reanalyse" in shell.complaint(2, "job", "retry", KEY)
    shell.done("route", "remove", "chest")
    assert "no route" in shell.complaint(2, "study", "reanalyse", STUDY)
    storage.database.close()


def test_what_waits_for_a_cancelled_delivery_has_failed_with_it(shell: Shell) -> None:
    storage = shell.storage()
    receive(storage)
    close(storage)
    delivery = f"deliver/{STUDY}/1/bright/1/PACS"
    stored = storage.objects.put(b"a result")
    job: dict[str, Any] = {"study_instance_uid": STUDY, "revision": 1, "package": "bright", "version": "1.0", "digest": "d" * 64, "run": 1}
    with storage.database.writing() as connection:
        storage.jobs.create(connection, key=KEY, kind="analyse", priority="routine", **job)
        storage.jobs.create(connection, key=delivery, kind="deliver", priority="routine", **job)
        storage.jobs.add_results(connection, [result_of(stored)])
        storage.jobs.add_deliveries(connection, delivery, "PACS", ["1.2.9"])
    shell.done("job", "cancel", delivery)
    (shown,) = shell.listing("study", "show", STUDY)
    assert [(d["state"], d["error"]) for d in shown["deliveries"]] == [("failed", "cancelled by hand")]
    shell.done("job", "retry", delivery)
    (shown,) = shell.listing("study", "show", STUDY)
    assert [d["state"] for d in shown["deliveries"]] == ["waiting"]
    storage.database.close()


def test_a_study_shows_which_series_a_package_could_choose_from_and_why_it_took_one(shell: Shell) -> None:
    storage = shell.storage()
    receive(storage)
    close(storage)
    row = {"input": "image", "series_instance_uid": "1.2.9", "part": "", "images": 52, "rank": None}
    considered = [
        row | {"series_number": 2, "chosen": True, "reason_code": None, "reason": None},
        row | {"series_number": 3, "chosen": False, "reason_code": "gantry-tilt", "reason": "The gantry was tilted by 12.5 degrees."},
    ]
    with storage.database.writing() as connection:
        storage.jobs.create(
            connection, key=KEY, kind="analyse", study_instance_uid=STUDY, revision=1, package="bright", version="1.0", digest="d" * 64,
            run=1, priority="routine",
        )  # fmt: skip
    storage.jobs.finish(KEY, "done", detail={"why": "Series 2: 52 slices, 3.00 mm apart", "considered": considered})
    shown = shell.done("study", "show", STUDY)
    assert "Series 2: 52 slices, 3.00 mm apart" in shown
    assert "gantry-tilt" in shown
    assert "tilted by 12.5 degrees" in shown
    (rows,) = shell.listing("study", "show", STUDY)
    assert rows["jobs"][0]["detail"]["considered"] == considered
    storage.database.close()


def test_words_from_the_wire_are_neither_markup_nor_escape_sequences_on_the_terminal(shell: Shell) -> None:
    storage = shell.storage()
    receive(storage, patient_id="[red]\\[bold]\x1b[31m:smile:", series_description="[/nonsense]\x9b2J")
    storage.index.quarantine(
        sop_instance_uid="1.2.4",
        study_instance_uid=STUDY,
        calling_ae_title="[b]X",
        dimse_status=0xC001,
        reason="[link]\x1b]8;;",
        stored=None,
    )
    storage.database.close()
    listed = shell.done("study", "list")
    shown = shell.done("study", "show", STUDY)
    assert "[red]\\[bold]\N{REPLACEMENT CHARACTER}[31m:smile:" in listed
    assert "[/nonsense]\N{REPLACEMENT CHARACTER}2J" in shown
    assert "[link]\N{REPLACEMENT CHARACTER}]8;;" in shown
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", listed + shown)
    (rows,) = shell.listing("study", "show", STUDY)
    assert set(rows["refused"][0]) == names(Quarantined)


def test_the_conformance_statement_is_rendered_with_and_without_a_configuration(shell: Shell) -> None:
    assert shell.done("conformance").startswith("# DICOM conformance statement")
    assert shell.done("conformance", "--config", "dicomnode.toml").startswith("# DICOM conformance statement")


def test_a_receiver_whose_port_is_taken_says_so(shell: Shell) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        (shell.folder / "dicomnode.toml").write_text(f"[listener]\nport = {port}\n", encoding="utf-8")
        done = executable("run", "receiver", folder=shell.folder)
    assert done.returncode == 1
    assert f"dicomnode: cannot listen on {LOOPBACK}:{port}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_executable_ends_with_the_same_codes_and_sentences(shell: Shell) -> None:
    version = executable("--version", folder=shell.folder)
    assert (version.returncode, version.stdout.strip(), version.stderr) == (0, VERSION, "")
    wrong = executable("peer", "echo", "NOBODY", folder=shell.folder)
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", "dicomnode: there is no peer 'NOBODY'\n")


def test_serve_whose_port_is_taken_says_so_and_begins_when_it_is_free(shell: Shell) -> None:
    taken = socket.create_server((LOOPBACK, 0))
    port = taken.getsockname()[1]
    (shell.folder / "dicomnode.toml").write_text(f"[listener]\nport = {port}\n", encoding="utf-8")
    shell.done("peer", "add", SCANNER_AET, LOOPBACK, 104, "--sends")
    log = shell.folder / "log"
    with running([sys.executable, "-m", "dicomnode", "serve"], log=log, environment={"DICOMNODE_CONFIG": "dicomnode.toml"}) as serve:
        said = f"cannot listen on {LOOPBACK}:{port}"
        wait_until(lambda: said in log.read_text(encoding="utf-8"), what="the complaint", log=log)
        taken.close()
        wait_until(lambda: listens(loopback_peer(NODE_AET, port)), what="the receiver to listen", log=log)
        serve.terminate()
        assert serve.wait(120) == 0


def test_serve_ends_with_0_when_it_is_stopped_before_its_roles_have_begun(shell: Shell) -> None:
    (shell.folder / "dicomnode.toml").write_text("[listener]\nport = 0\n", encoding="utf-8")
    shell.storage().database.close()
    log = shell.folder / "log"
    with running([sys.executable, "-m", "dicomnode", "serve"], log=log) as serve:
        children = Path(f"/proc/{serve.pid}/task/{serve.pid}/children")
        wait_until(lambda: len(children.read_text(encoding="ascii").split()) == 3, what="three roles", log=log, every=0.01)
        serve.terminate()
        assert serve.wait(120) == 0


LEFT_THREAD = """
import os, signal, sys, threading, time
from dicomnode.cli import node, run

def start(*_):
    threading.Thread(target=time.sleep, args=(600,)).start()
    os.kill(os.getpid(), signal.SIGTERM)
    return lambda: sys.argv[1] == "drained"

node._start_sender = start
sys.exit(run(["run", "sender"]))
"""


@pytest.mark.parametrize(("how", "code"), [("drained", 0), ("amid a job", 1)])
def test_a_stopped_role_ends_though_a_thread_of_the_engine_is_left(shell: Shell, how: str, code: int) -> None:
    (shell.folder / "dicomnode.toml").write_text("", encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-c", LEFT_THREAD, how], cwd=shell.folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=False
    )
    assert ended.returncode == code, ended.stderr


def executable(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the program as people do."""
    command = [str(Path(sys.executable).with_name("dicomnode")), *words]
    return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False)


def enable(shell: Shell, package: Path) -> None:
    """Add and enable a package as after a passed check."""
    shell.done("package", "add", package)
    storage = shell.storage()
    (added,) = storage.registry.packages()
    storage.registry.set_check(added.name, added.version, added.digest, {}, passed=True)
    storage.database.close()
    shell.done("package", "enable", added.name)


def receive(storage: Storage, **values: Any) -> None:
    """Put one image of STUDY into the storage."""
    stored = storage.objects.put(b"an image")
    header: dict[str, Any] = {
        "sop_instance_uid": "1.2.3.1", "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2", "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "series_instance_uid": "1.2.3.0", "study_instance_uid": STUDY, "dataset_sha256": stored.sha256, "kind": "image", "modality": "CT",
        "instance_number": 1, "patient_id": "P", "patient_name": "N", "study_date": "20260101", "study_description": "",
        "accession_number": "", "series_number": 1, "series_description": "", "requested_priority": "routine",
        "calling_ae_title": "SCANNER", "called_ae_title": "DICOMNODE",
    }  # fmt: skip
    assert storage.index.add_instance(InstanceHeader(**header | values), stored) == "stored"


def close(storage: Storage) -> None:
    """Close the study's revision, as completion does when it has been quiet."""
    settings = load_settings(None)
    prepare_engine(settings.database_url)
    client = EngineClient(settings.database_url)
    now = datetime.now(UTC)
    assert len(close_complete_studies(storage, client, now + timedelta(hours=1), up_since=now)) == 1
    client.close()


def result_of(stored: StoredObject) -> Result:
    return Result(
        sop_instance_uid="1.2.9", sop_class_uid="1.2.840.10008.5.1.4.1.1.88.33", transfer_syntax_uid="1.2.840.10008.1.2.1", modality="SR",
        study_instance_uid=STUDY, job_key=KEY, stored=stored, created_at=datetime.now(UTC),
    )  # fmt: skip
