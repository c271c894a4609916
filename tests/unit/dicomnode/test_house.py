"""The rules of the house that no linter knows: names, pins, settings, and who may load what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dicomnode.config import Settings, commented_toml, load_settings

ROOT = Path(__file__).parents[3]
MODULES = sorted(file for package in ("dicomnode", "storage") for file in (ROOT / package).rglob("*.py"))
HEAVY = {"torch", "monai", "highdicom"}


def tracked_files() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_says_what_it_is_for_and_is_named_after_it(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), "no docstring"
    parts = {part.lower() for part in file.relative_to(ROOT).with_suffix("").parts}
    assert not parts & {"utils", "util", "common", "helpers", "helper", "base", "core", "manager"}


def test_no_file_names_a_package_registry_so_that_an_installation_uses_the_site_s_own() -> None:
    hosts = [
        ".".join(words) for words in (("pypi", "org"), ("pythonhosted", "org"), ("deb", "debian", "org"), ("registry", "npmjs", "org"))
    ]
    naming = [
        f"{file.relative_to(ROOT)}: {host}" for file in tracked_files() for host in hosts if host.encode() in file.read_bytes().lower()
    ]
    assert naming == []


def test_every_direct_dependency_is_pinned_to_one_release() -> None:
    pinned = {
        canonicalize_name(requirement.name): requirement.specifier
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
        for requirement in [Requirement(line)]
    }
    assert {str(specifier)[:2] for specifier in pinned.values()} == {"=="}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["test"],
        *project["build-system"]["requires"],
    ]
    assert {canonicalize_name(Requirement(text).name) for text in wanted} - set(pinned) == set()


@pytest.mark.parametrize("module", ["cli", "config", "receiver", "completion", "engine", "delivery", "dimse.listener", "dimse.scu"])
def test_reception_and_delivery_load_no_network_and_no_encoder(module: str) -> None:
    program = f"import dicomnode.{module}, sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def sections() -> list[tuple[str, str, str | None]]:
    return [
        (section, key, field.description)
        for section, value in Settings.model_fields.items()
        for key, field in type(value.default).model_fields.items()
    ]


@pytest.mark.parametrize(("section", "key", "description"), sections())
def test_every_setting_is_explained(section: str, key: str, description: str | None) -> None:
    assert description, f"[{section}] {key} has no description"


def test_the_example_configuration_is_the_one_that_the_settings_describe() -> None:
    assert (ROOT / "deploy" / "dicomnode.example.toml").read_text(encoding="utf-8") == commented_toml()


def test_the_example_configuration_with_every_line_in_force_gives_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "dicomnode.toml"
    file.write_text(commented_toml(), encoding="utf-8")
    defaults = load_settings(file, {})
    lines = [re.sub(r"^# (?=[a-z_]+ = )", "", line) for line in commented_toml().splitlines()]
    file.write_text("\n".join(lines), encoding="utf-8")
    spelt_out = load_settings(file, {})
    assert {key for section, key, _ in sections() for _ in [section]} == {line.split(" = ")[0] for line in lines if " = " in line}
    assert spelt_out.database_url == defaults.database_url
    assert spelt_out.model_dump(exclude={"storage"}) == defaults.model_dump(exclude={"storage"})
