"""`dicomnode package add`: whatever a person brings becomes a package, or one sentence says why not."""

import json
import os
import re
import shutil
import tarfile
import tempfile
import tomllib
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_bundle import MANIFEST, write_package

import zoo_bundles
from dicomnode.analysis import check
from dicomnode.analysis.package import copy_package, digest_of, load_package
from dicomnode.cli import run
from dicomnode.cli.packages import builtin_packages
from dicomnode.errors import PackageError

pytestmark = pytest.mark.usefixtures("logs_restored")

SPLEEN = "spleen_ct_segmentation"


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An initialised node in the current folder, and a folder of its own for what is temporary."""
    folder, scratch = tmp_path / "node", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert run(["init", "."]) == 0
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_bundles.write_bundle(tmp_path_factory.mktemp("zoo"), SPLEEN)


@pytest.fixture
def bundle(zoo: Path, tmp_path: Path) -> Path:
    return shutil.copytree(zoo, tmp_path / "brought" / SPLEEN)


def listed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    capsys.readouterr()
    assert run(["package", "list", "--json"]) == 0
    packages: list[dict[str, str]] = json.loads(capsys.readouterr().out)
    return packages


def script(file: Path) -> Path:
    """A TorchScript network of one convolution."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would rather have torch.export; the zoo ships TorchScript
        torch.jit.script(torch.nn.Conv3d(1, 1, 1)).save(str(file))
    return file


def test_a_zoo_bundle_is_copied_unchanged_and_what_is_open_is_said(node: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["package", "add", str(bundle)]) == 0
    said = capsys.readouterr().out
    assert f"added {SPLEEN}@0.5.8" in said
    assert "decide: inputs: which body parts" in said
    assert "not installed, of what the bundle names: pytorch-ignite" in said
    kept = node / "data/packages" / SPLEEN / "0.5.8"
    for file in bundle.rglob("*"):
        if file.is_file():
            assert (kept / "bundle" / file.relative_to(bundle)).read_bytes() == file.read_bytes()
    assert load_package(kept).form == "zoo"


def test_adding_twice_is_adding_once_and_repairs_a_damaged_copy(node: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["package", "add", str(bundle)]) == 0
    [before] = listed(capsys)
    weights = node / "data/packages" / SPLEEN / "0.5.8/bundle/models/model.pt"
    weights.write_bytes(b"damaged")
    assert run(["package", "add", str(bundle)]) == 0
    assert listed(capsys) == [before]
    assert digest_of(weights.parents[2]) == before["digest"]


def test_other_content_under_a_version_that_is_known_is_refused(node: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["package", "add", str(bundle)]) == 0
    (bundle / "docs/README.md").write_text("another")
    assert run(["package", "add", str(bundle)]) == 2
    assert "give the new one a new version" in capsys.readouterr().err


def test_a_manifest_goes_out_to_be_edited_and_comes_back(node: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["package", "add", str(bundle)]) == 0
    capsys.readouterr()
    assert run(["package", "manifest", SPLEEN]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["version"] == "0.5.8"
    edited = node / "edited.toml"
    assert run(["package", "manifest", SPLEEN, "--out", str(edited)]) == 0
    assert edited.read_text() == text
    assert run(["package", "manifest", SPLEEN, "--out", str(edited)]) == 2
    capsys.readouterr()
    edited.write_text(text.replace('version = "0.5.8"', 'version = "0.5.8-site1"').replace("threshold = 0.5", "threshold = 0.7"))
    assert run(["package", "add", str(bundle), "--manifest", str(edited)]) == 0
    assert "is a draft" not in capsys.readouterr().out
    edited.write_text(edited.read_text().replace("site1", "site2"))
    assert run(["package", "add", f"{SPLEEN}@0.5.8", "--manifest", str(edited)]) == 0  # the bundle itself is no longer needed
    assert [package["version"] for package in listed(capsys)] == ["0.5.8", "0.5.8-site1", "0.5.8-site2"]
    assert load_package(node / "data/packages" / SPLEEN / "0.5.8-site2").manifest.outputs[0].threshold == 0.7


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "flat.zip"])
def test_an_archive_gives_the_same_package_as_its_folder_and_leaves_nothing(
    node: Path, bundle: Path, kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / f"{SPLEEN}.{kind.removeprefix('flat.')}"
    if kind.endswith("zip"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in bundle.rglob("*"):
                archive.write(path, path.relative_to(bundle if kind == "flat.zip" else bundle.parent))
    else:
        with tarfile.open(file, "w:gz" if kind.endswith("gz") else "w") as packed:
            packed.add(bundle, SPLEEN)
    assert run(["package", "add", str(file)]) == 0
    [by_archive] = listed(capsys)
    assert run(["package", "add", str(bundle)]) == 0
    assert listed(capsys) == [by_archive]
    assert not any((tmp_path / "scratch").iterdir())


def test_a_hostile_archive_leaves_nothing(node: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("b/configs/metadata.json", "{}")
        archive.writestr("../../evil", "x")
    assert run(["package", "add", str(file)]) == 2
    assert "leaves its folder" in capsys.readouterr().err
    assert not any((tmp_path / "scratch").iterdir())
    assert not listed(capsys)


@pytest.mark.parametrize("name", ["net.ts", "net.pt"])
def test_a_torchscript_file_with_a_manifest_is_a_package(node: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "m.toml"
    manifest.write_text(MANIFEST)
    assert run(["package", "add", str(script(tmp_path / name)), "--manifest", str(manifest)]) == 0
    kept = node / "data/packages/bright/1.0"
    assert load_package(kept).form == "file"
    assert (kept / "bundle/models/model.ts").read_bytes() == (tmp_path / name).read_bytes()


def test_a_model_file_may_come_in_an_archive(node: Path, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(MANIFEST)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(script(tmp_path / "net.ts"), "net.ts")
    assert run(["package", "add", str(tmp_path / "a.zip"), "--manifest", str(tmp_path / "m.toml")]) == 0
    assert load_package(node / "data/packages/bright/1.0").form == "file"


def _without_weights(bundle: Path) -> None:
    shutil.rmtree(bundle / "models")
    (bundle / "large_files.yml").write_text(
        "large_files:\n  - path: models/model.pt\n    url: https://example.org/spleen/model.pt\n    hash_val: 0\n"
    )


def _pointer(bundle: Path) -> None:
    (bundle / "models/model.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 19\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without_weights, "models/model.pt from https://example.org/spleen/model.pt"),
        (_pointer, "pointer of git-lfs"),
        (lambda b: (b / "configs/inference.json").unlink(), "configs/inference.json"),
        (lambda b: (b / "configs/metadata.json").unlink(), "metadata.json"),
        (lambda b: (b / "models/link.pt").symlink_to("/etc/passwd"), "symbolic link"),
        (lambda b: os.mkfifo(b / "docs/pipe"), "no plain file"),
        (lambda b: (b / "manifest.toml").write_text("schema = 1"), "mistake"),
    ],
)
def test_a_bundle_that_cannot_run_is_refused_by_what_it_lacks(
    node: Path, bundle: Path, damage: Callable[[Path], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(bundle)
    assert run(["package", "add", str(bundle)]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.splitlines()) == 1


def test_what_git_and_python_leave_in_a_folder_is_no_part_of_a_package(node: Path, bundle: Path) -> None:
    for stray in (".git/config", "scripts/__pycache__/a.pyc", ".cache/huggingface/x", ".gitattributes"):
        (bundle / stray).parent.mkdir(parents=True, exist_ok=True)
        (bundle / stray).write_text("x")
    assert run(["package", "add", str(bundle)]) == 0
    kept = node / "data/packages" / SPLEEN / "0.5.8"
    assert not any(part in str(path) for path in kept.rglob("*") for part in (".git", "__pycache__", ".cache"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "neither a folder nor a built-in package"),
        (["{script}"], "--manifest FILE"),
        (["{weights}", "--manifest", "{manifest}"], "no network"),
        (["{text}"], "no model file"),
        (["{empty}"], "lacks manifest.toml"),
        (["lung-nodule-ct", "--manifest", "nowhere.toml"], "is no manifest"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    node: Path, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.toml").write_text(MANIFEST)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    places = {
        "script": script(tmp_path / "net.ts"), "weights": tmp_path / "weights.pt", "manifest": tmp_path / "m.toml",
        "text": tmp_path / "a.txt", "empty": tmp_path / "empty",
    }  # fmt: skip
    assert run(["package", "add", *(argument.format(**places) for argument in arguments)]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.splitlines()) == 1


def test_a_library_that_is_missing_is_named(
    node: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> dict[str, object]:
        raise PackageError("The package failed: from torchvision.models import resnet50 (No module named 'torchvision.models').")

    monkeypatch.setattr(check, "check_in_child", fails)
    assert run(["package", "add", str(bundle)]) == 0
    assert run(["package", "check", SPLEEN]) == 2
    assert "needs torchvision, which isn't installed" in capsys.readouterr().err
    assert run(["package", "enable", SPLEEN]) == 2
    assert "has not passed" in capsys.readouterr().err


def test_a_package_with_open_decisions_is_enabled_with_a_warning_for_each(
    node: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "check_in_child", lambda *_, **__: {"findings": [{}], "seconds": {"load": 0.12345}})
    assert run(["package", "add", str(bundle)]) == 0
    capsys.readouterr()
    assert run(["package", "check", SPLEEN]) == 0
    said = capsys.readouterr().out
    assert re.search(r"image \[\d+, \d+, \d+\]", said)  # slices, rows and columns that it was run on
    assert "load 0.123" in said
    assert run(["package", "enable", SPLEEN]) == 0
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == len(load_package(node / "data/packages" / SPLEEN / "0.5.8").manifest.decide)
    assert all(line.startswith("dicomnode: nobody has decided yet: ") for line in warned)


def test_the_built_in_package_has_the_digest_that_it_was_released_with() -> None:
    assert digest_of(builtin_packages()["lung-nodule-ct"]).startswith("5c70146a52f4")


def test_a_file_larger_than_a_chunk_is_digested_as_if_read_at_once(tmp_path: Path) -> None:
    from dicomnode.analysis import package

    folder = write_package(tmp_path / "bright")
    (folder / "bundle/large").write_bytes(os.urandom(package.CHUNK + 17))
    whole = [(name, path.read_bytes()) for name, path in package.package_files(folder).items()]
    assert digest_of(folder) == package.digest_of_contents(whole)
    copy_package(folder, tmp_path / "copy")
    assert digest_of(tmp_path / "copy") == digest_of(folder)
