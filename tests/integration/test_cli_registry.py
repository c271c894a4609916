"""Facts about moving peers and routes between sites by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicomnode.cli import run


@pytest.fixture
def sites(tmp_path: Path) -> tuple[str, str]:
    """Two configurations with empty nodes; the first has a peer, the second nothing."""
    for name in ("here", "there"):
        assert run(["init", str(tmp_path / name)]) == 0
    here, there = (str(tmp_path / name / "dicomnode.toml") for name in ("here", "there"))
    for config in (here, there):
        assert run(["package", "add", "lung-nodule-ct", "--config", config]) == 0
    assert run(["peer", "add", "PACS", "pacs.example", "104", "--sends", "--receives", "--retrieve-by", "get", "--config", here]) == 0
    route = ["route", "add", "chest", "--from", "PACS", "--package", "lung-nodule-ct", "--to", "PACS", "--quiet", "2.5"]
    asks = ["--completeness-peer", "PACS", "--fetch-missing", "--priors-from", "PACS", "--prior-body-part", "same"]
    assert run([*route, *asks, "--config", here]) == 0
    return here, there


def test_an_exported_site_imports_as_the_same_peers_and_routes(
    sites: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = sites
    file = str(tmp_path / "site.toml")
    assert run(["registry", "export", file, "--config", here]) == 0
    assert run(["registry", "import", file, "--config", there]) == 0
    listings = []
    for config in (here, there):
        capsys.readouterr()
        assert run(["peer", "list", "--json", "--config", config]) == 0
        assert run(["route", "list", "--json", "--config", config]) == 0
        listings.append(capsys.readouterr().out)
    assert listings[0] == listings[1]
    assert "pacs.example" in listings[0]
    assert "chest" in listings[0]
    assert all(f'"{name}": {value}' in listings[1] for name, value in (("retrieve_by", '"get"'), ("fetch_missing", "true")))
    assert run(["registry", "export", file, "--config", here]) == 2


def test_every_mistake_of_a_site_file_is_named_and_nothing_is_imported(
    sites: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, there = sites
    file = tmp_path / "site.toml"
    file.write_text('[[peers]]\nae_title = "OK"\nhost = "h"\nport = 70000\nfoo = 1\n[[routes]]\nname = "r"\n', encoding="utf-8")
    assert run(["registry", "import", str(file), "--config", there]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("port", "foo", "package", "to_ae_titles", "quiet_seconds"))
    assert said.count("\n") == 1
    file.write_text(
        '[[peers]]\nae_title = "OK"\nhost = "h"\nport = 104\n'
        '[[routes]]\nname = "r"\npackage = "none"\nto_ae_titles = ["OK"]\nquiet_seconds = 1\n',
        encoding="utf-8",
    )
    assert run(["registry", "import", str(file), "--config", there]) == 2
    said = capsys.readouterr().err
    assert "OK is no peer that receives" in said
    assert "no package none" in said
    assert run(["peer", "list", "--json", "--config", there]) == 0
    assert capsys.readouterr().out.strip() == "[]"


def test_what_is_fetched_needs_a_peer_that_sends(sites: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = sites
    assert run(["peer", "add", "VIEWER", "viewer.example", "104", "--receives", "--config", here]) == 0
    capsys.readouterr()
    route = ["route", "add", "other", "--package", "lung-nodule-ct", "--to", "VIEWER", "--config", here, "--fetch-missing"]
    assert run(route) == 2
    assert capsys.readouterr().err == "dicomnode: --fetch-missing needs --completeness-peer\n"
    assert run([*route, "--completeness-peer", "VIEWER"]) == 2
    assert capsys.readouterr().err == "dicomnode: VIEWER is a peer that doesn't send, so nothing can be fetched from it\n"
    assert run(["peer", "add", "VIEWER", "viewer.example", "104", "--receives", "--retrieve-by", "get", "--config", here]) == 2
    assert capsys.readouterr().err == "dicomnode: --retrieve-by needs --sends\n"
    file = tmp_path / "site.toml"
    file.write_text(
        '[[peers]]\nae_title = "OK"\nhost = "h"\nport = 104\nreceives = true\n'
        '[[routes]]\nname = "r"\npackage = "lung-nodule-ct"\nto_ae_titles = ["OK"]\nquiet_seconds = 1\n'
        'completeness_peer = "OK"\nfetch_missing = true\n',
        encoding="utf-8",
    )
    assert run(["registry", "import", str(file), "--config", there]) == 2
    assert "missing images can't be fetched from OK, which is no peer that sends" in capsys.readouterr().err
