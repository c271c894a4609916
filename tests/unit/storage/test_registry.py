from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from storage import Storage
from storage.database import Database
from storage.errors import StorageError
from storage.records import Peer, Route
from storage.registry import Registry

PACS = Peer(ae_title="PACS", host="127.0.0.1", port=104, sends=True, receives=True, tls=False, client_cert=None)
ROUTE = Route(
    name="chest",
    from_ae_title="CT1",
    called_ae_title="*",
    package="lung-nodule-ct",
    version=None,
    to_ae_titles=("PACS",),
    priority=None,
    quiet_seconds=30.0,
    report_refusals=True,
)


def test_a_peer_is_kept_replaced_and_removed(storage: Storage) -> None:
    registry = storage.registry
    registry.add_peer(PACS)
    assert registry.peer("PACS") == PACS
    assert registry.peer("pacs") is None  # AE titles are case-sensitive
    moved = dataclasses.replace(
        PACS,
        host="10.0.0.7",
        tls=True,
        client_cert="ab" * 32,
        sends=False,
        networks=("10.0.0.0/8", "fd00::/8"),
        user="ct",
        passcode_hash="x",
        objects=("seg-labelmap", "sr"),
        seg_per="finding",
        empty_frames=True,
    )
    registry.add_peer(moved)
    registry.add_peer(dataclasses.replace(PACS, ae_title="ARCHIVE"))
    assert [p.ae_title for p in registry.peers()] == ["ARCHIVE", "PACS"]
    assert registry.peer("PACS") == moved
    registry.remove_peer("PACS")
    assert registry.peer("PACS") is None
    with pytest.raises(StorageError, match="no peer PACS"):
        registry.remove_peer("PACS")


def test_a_peer_that_a_route_sends_to_cannot_go(storage: Storage) -> None:
    storage.registry.add_peer(PACS)
    storage.registry.add_route(ROUTE)
    with pytest.raises(StorageError, match="route chest sends to PACS"):
        storage.registry.remove_peer("PACS")
    storage.registry.add_peer(dataclasses.replace(PACS, port=11112))  # but it can move
    assert storage.registry.routes() == [ROUTE]
    storage.registry.remove_route("chest")
    storage.registry.remove_peer("PACS")


def test_a_route_is_kept_replaced_and_removed_with_its_destinations_in_order(storage: Storage) -> None:
    registry = storage.registry
    for name in ("PACS", "ARCHIVE", "AAA"):
        registry.add_peer(dataclasses.replace(PACS, ae_title=name))
    route = dataclasses.replace(ROUTE, to_ae_titles=("PACS", "ARCHIVE", "AAA"), priority="stat", version="1.0", objects=("key-image",))
    registry.add_route(route)
    assert registry.routes() == [route]
    registry.add_route(ROUTE)
    assert registry.routes() == [ROUTE]
    registry.remove_route("chest")
    assert registry.routes() == []
    with pytest.raises(StorageError, match="no route chest"):
        registry.remove_route("chest")


def test_a_route_to_a_stranger_is_refused_whole(storage: Storage) -> None:
    storage.registry.add_peer(PACS)
    with pytest.raises(StorageError, match="sends to NOBODY, which is no peer"):
        storage.registry.add_route(dataclasses.replace(ROUTE, to_ae_titles=("PACS", "NOBODY")))
    assert storage.registry.routes() == []


@pytest.mark.parametrize(
    ("from_ae_title", "called_ae_title", "matches"),
    [("CT1", "NODE", True), ("CT1", "*", True), ("*", "NODE", True), ("*", "*", True), ("CT2", "*", False), ("CT1", "OTHER", False)],
)
def test_a_route_matches_the_pair_of_ae_titles(storage: Storage, from_ae_title: str, called_ae_title: str, matches: bool) -> None:
    storage.registry.add_peer(PACS)
    storage.registry.add_route(dataclasses.replace(ROUTE, from_ae_title=from_ae_title, called_ae_title=called_ae_title))
    assert bool(storage.registry.matching([("CT1", "NODE")])) is matches


def test_a_route_matches_if_any_caller_does_and_never_mixes_two(storage: Storage) -> None:
    storage.registry.add_peer(PACS)
    storage.registry.add_route(dataclasses.replace(ROUTE, from_ae_title="CT1", called_ae_title="NODE"))
    assert storage.registry.matching({("CT2", "NODE"), ("CT1", "NODE")})
    assert storage.registry.matching({("CT2", "NODE"), ("CT1", "OTHER")}) == []
    assert storage.registry.matching([]) == []


def test_only_a_checked_package_is_enabled_and_only_one_version_of_it(storage: Storage) -> None:
    registry = storage.registry
    for version in ("1.0", "1.1"):
        registry.add_package("lung", version, f"digest {version}")
        with pytest.raises(StorageError, match="not passed its check"):
            registry.enable("lung", version)
        registry.set_check("lung", version, f"digest {version}", {"seconds": 1.5}, passed=True)
    assert [(p.version, p.state, p.check) for p in registry.packages()] == [
        ("1.0", "checked", {"seconds": 1.5}),
        ("1.1", "checked", {"seconds": 1.5}),
    ]
    newest = registry.package("lung")
    registry.enable("lung", "1.1")
    registry.enable("lung", "1.0")
    assert {p.version: p.state for p in registry.packages()} == {"1.0": "enabled", "1.1": "checked"}
    enabled = registry.package("lung")
    assert newest is not None
    assert enabled is not None
    assert (newest.version, enabled.version) == ("1.1", "1.0")
    registry.disable("lung", "1.0")
    assert {p.state for p in registry.packages()} == {"checked"}
    assert registry.package("lung", "9") is None
    assert registry.package("heart") is None


def test_another_digest_takes_the_consent_back(storage: Storage) -> None:
    registry = storage.registry
    registry.add_package("lung", "1.0", "a")
    registry.set_check("lung", "1.0", "a", {}, passed=True)
    registry.enable("lung", "1.0")
    registry.add_package("lung", "1.0", "a")
    assert (kept := registry.package("lung")) is not None
    assert kept.state == "enabled"
    registry.add_package("lung", "1.0", "b")
    assert (changed := registry.package("lung")) is not None
    assert (changed.digest, changed.state, changed.check) == ("b", "added", None)
    with pytest.raises(StorageError, match="changed while it was checked"):
        registry.set_check("lung", "1.0", "a", {}, passed=True)


def test_a_failed_check_is_kept_and_takes_an_enabled_package_out(storage: Storage) -> None:
    registry = storage.registry
    registry.add_package("lung", "1.0", "a")
    registry.set_check("lung", "1.0", "a", {"ok": True}, passed=True)
    registry.enable("lung", "1.0")
    registry.set_check("lung", "1.0", "a", {"ok": False}, passed=False)
    assert (package := registry.package("lung")) is not None
    assert (package.state, package.check) == ("added", {"ok": False})


@pytest.mark.parametrize("action", ["enable", "disable"])
def test_an_unknown_package_is_named(storage: Storage, action: str) -> None:
    with pytest.raises(StorageError, match=r"no package lung@1\.0"):
        getattr(storage.registry, action)("lung", "1.0")


def test_two_admins_who_enable_two_versions_leave_one_enabled(storage: Storage) -> None:
    versions = ["1", "2", "3", "4"]
    for version in versions:
        storage.registry.add_package("lung", version, version)
        storage.registry.set_check("lung", version, version, {}, passed=True)
    barrier = threading.Barrier(len(versions))

    def enable(version: str) -> None:
        barrier.wait(120)
        storage.registry.enable("lung", version)

    with ThreadPoolExecutor(len(versions)) as pool:
        list(pool.map(enable, versions))
    assert sorted(p.state for p in storage.registry.packages()) == ["checked", "checked", "checked", "enabled"]


@given(name=st.text() | st.sampled_from(["..", ".", "a/b", "a\n", "A", "", "a" * 65, "-a"]), version=st.text() | st.just("1.0"))
def test_a_package_folder_never_leaves_the_packages(name: str, version: str) -> None:
    registry = Registry(Database("sqlite:////nowhere/node.sqlite"), Path("/data/packages"))
    try:
        folder = registry.package_folder(name, version)
    except StorageError:
        return
    assert folder.resolve().relative_to("/data/packages").parts == (name, version)


def test_the_package_folder_is_made_of_name_and_version(storage: Storage, tmp_path: Path) -> None:
    assert storage.registry.package_folder("lung-nodule-ct", "0.1.0") == tmp_path / "packages" / "lung-nodule-ct" / "0.1.0"
    with pytest.raises(StorageError, match="cannot name"):
        storage.registry.add_package("..", "1.0", "a")
