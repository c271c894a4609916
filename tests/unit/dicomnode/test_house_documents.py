"""What the documents tell people to type exists."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import typer.main

from dicomnode.cli import app

ROOT = Path(__file__).parents[3]
DOCUMENTS = [name for name in ("README.md", "dicomnode/README.md", "storage/README.md", "deploy/README.md") if (ROOT / name).exists()]


def told(program: str) -> list[str]:
    """Each `program word …` that stands at the start of a line or of a code span."""
    pattern = re.compile(rf"(?:^|`)((?:\.venv/bin/)?{program}(?: [a-z][a-z-]*)+)", re.MULTILINE)
    return sorted({match for name in DOCUMENTS for match in pattern.findall((ROOT / name).read_text(encoding="utf-8"))})


@pytest.mark.parametrize("command", told("dicomnode"))
def test_every_command_that_a_document_names_exists(command: str) -> None:
    known: click.Command = typer.main.get_command(app)
    for word in command.split()[1:]:
        if not hasattr(known, "commands"):
            return  # the rest are arguments
        assert word in known.commands, f"{command}: there is no {word}"
        known = known.commands[word]


@pytest.mark.parametrize("command", told("make"))
def test_every_make_target_that_a_document_names_exists(command: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert command.split()[1] in targets


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_local_link_of_a_document_leads_somewhere(name: str) -> None:
    file = ROOT / name
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", file.read_text(encoding="utf-8"))
    assert [link for link in links if not (file.parent / link).exists()] == []
