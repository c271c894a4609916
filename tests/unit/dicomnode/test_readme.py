"""What README.md and the architecture page say is true: commands can be typed as they stand, and each module, setting and file exists."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dicomnode.cli import app
from dicomnode.config import Settings
from dicomnode.version import VERSION

ROOT = Path(__file__).parents[3]
README, ARCHITECTURE, STORAGE, GUIDE = (
    ROOT / name for name in ("README.md", "dicomnode/README.md", "storage/README.md", "deploy/README.md")
)
PAGES = [README, ARCHITECTURE, STORAGE, GUIDE, ROOT / "dicomnode" / "CHANGELOG.md"]
SETTINGS = {f"{section}.{key}" for section, value in Settings.model_fields.items() for key in type(value.default).model_fields}


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def typed(page: Path) -> list[str]:
    """Every dicomnode command in a code block of the page, and in a code span if it stands there with options or arguments."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for line in [*lines, *spans] if re.match(r"(\.venv/bin/)?dicomnode [a-z]", line)]


def with_values(word: str) -> str:
    """A placeholder of the text as something that its type accepts."""
    trained = "dicomnode/packages/lung-nodule-ct/0.2.0"
    recipe = "dicomnode/training/recipes/lung-nodule-ct.toml"
    folders = dict.fromkeys(("FOLDER", "DATASET", "mydata"), "dicomnode/packages")  # of a command that only parses them, any folder will do
    values = {"PORT": "104", "HOST": "localhost", "training-out/package": trained, "my-recipe.toml": recipe, "CONFIG": recipe}
    return (values | folders).get(word, word)


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in typed(page)}))
def test_a_command_can_be_typed_as_it_stands(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [with_values(word) for word in shlex.split(line, comments=True)][1:]
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"there is no {words[0]}"
        command = command.commands[words.pop(0)]
    if words:  # a command without its arguments is only spoken of; options and arguments are parsed as if it ran
        command.make_context(command.name, words)


def test_the_first_steps_are_all_there() -> None:
    steps = [line.split("dicomnode ")[1] for line in typed(README)]
    for step in ("init", "peer add", "package add", "package check", "package enable", "route add", "check", "serve", "study show"):
        assert any(line.startswith(step) for line in steps), f"README.md doesn't say how to {step}"


def modules() -> list[str]:
    files = [file for package in ("dicomnode", "storage") for file in (ROOT / package).rglob("*.py")]
    return sorted(name(file) for file in files if file.name != "__init__.py" and "migrations" not in file.parts)


@pytest.mark.parametrize("module", modules())
def test_every_module_is_named_in_the_map(module: str) -> None:
    room, _, file = module.partition("/")
    architecture = ARCHITECTURE.read_text(encoding="utf-8")
    if room == "storage":
        assert f"`{file}`" in STORAGE.read_text(encoding="utf-8") or f"`../{module}`" in architecture
    else:
        assert f"`{file}`" in architecture.split("## Code map")[1].split("## Invariants")[0]


def test_the_order_of_imports_is_the_one_that_the_linter_checks() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    wanted = " → ".join(f"{{{layer}}}" if " " in layer else layer for layer in layers)
    assert wanted in re.sub(r"\s+", " ", ARCHITECTURE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [README, ARCHITECTURE], ids=name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    spans = re.findall(r"`([\w./-]+(?:/|\.(?:py|md|toml|txt|png)))`", page.read_text(encoding="utf-8"))
    made_later = {
        "MODEL_CARD.md",
        "dicomnode.toml",
        "mynode/dicomnode.toml",
        "manifest.toml",
        "bundle/",
        "demo-out/pacs/",
        "demo-out/preview/",
    }
    missing = [span for span in spans if span not in made_later and not (page.parent / span).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    sections = "|".join(Settings.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)`", text)) - {f"{section}.py" for section in Settings.model_fields}
    named |= {".".join(found).lower() for found in re.findall(r"DICOMNODE_([A-Z]+)__([A-Z_]+)", text)}
    assert named - SETTINGS == set()
    keys = {setting.partition(".")[2] for setting in SETTINGS}
    assert set(re.findall(r"`([a-z_]+) = ", text)) - keys == set()


def test_the_changelog_opens_with_the_version_and_names_every_command() -> None:
    text = (ROOT / "dicomnode" / "CHANGELOG.md").read_text(encoding="utf-8")
    command: Any = typer.main.get_command(app)
    assert re.search(r"^## (\S+)", text, re.MULTILINE).group(1) == VERSION  # type: ignore[union-attr]  # there is a heading
    assert [known for known in command.commands if not re.search(rf"`(dicomnode )?{known}", text)] == []


def test_the_picture_is_small_enough_for_a_page() -> None:
    assert (ROOT / "deploy" / "finding.png").stat().st_size < 200_000


def test_the_pages_say_what_the_node_is_not_for() -> None:
    for page in (README, GUIDE):
        assert "research use only" in page.read_text(encoding="utf-8").lower(), name(page)
