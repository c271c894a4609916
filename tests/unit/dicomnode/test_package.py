"""A package is data until someone consents: what is refused, and what the digest covers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dicomnode.analysis.package import Package, copy_package, digest_of, load_package
from dicomnode.errors import PackageError

MANIFEST = """
schema = 1
name = "spheres"
version = "1.0"
title = "Spheres"
manufacturer = "dicomnode"
algorithm_name = "spheres"
licence = "Apache-2.0"
intended_use = "RESEARCH USE ONLY"
training_data = "none"
kind = "segmentation"
[input]
modality = "CT"
sop_classes = ["1.2.840.10008.5.1.4.1.1.2"]
slice_spacing_mm = [0.4, 5.5]
pixel_spacing_mm = [0.3, 1.5]
[preprocessing]
spacing_mm = [2.0, 1.5, 1.5]
window = [-1000.0, 400.0]
[inference]
window = [32, 96, 96]
[[outputs]]
channel = 0
label = "Sphere"
category = { value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }
type = { value = "27925004", scheme = "SCT", meaning = "Nodule" }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "spheres"
    for name, content in {
        "manifest.toml": MANIFEST,
        "bundle/configs/metadata.json": "{}",
        "bundle/configs/inference.json": "{}",
        "bundle/models/model.safetensors": "",
        "MODEL_CARD.md": "a card",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_a_sound_package_loads_with_its_defaults(folder: Path) -> None:
    package = load_package(folder)
    assert isinstance(package, Package)
    assert package.manifest.name == "spheres"
    assert package.manifest.outputs[0].type.code().value == "27925004"
    assert package.digest == digest_of(folder)


@pytest.mark.parametrize("name", ["manifest.toml", "bundle/configs/inference.json", "bundle/models/model.safetensors"])
def test_one_more_byte_in_what_runs_changes_the_digest(folder: Path, name: str) -> None:
    before = digest_of(folder)
    with (folder / name).open("a") as file:
        file.write("\n")
    assert digest_of(folder) != before


def test_the_model_card_is_not_part_of_the_digest(folder: Path) -> None:
    before = digest_of(folder)
    (folder / "MODEL_CARD.md").write_text("another card")
    assert digest_of(folder) == before


def test_moving_a_byte_from_a_name_to_its_content_changes_the_digest(folder: Path) -> None:
    (folder / "bundle/ab").write_text("c")
    before = digest_of(folder)
    (folder / "bundle/ab").unlink()
    (folder / "bundle/a").write_text("bc")
    assert digest_of(folder) != before


def test_every_mistake_of_the_manifest_is_named_at_once(folder: Path) -> None:
    text = MANIFEST.replace("[-1000.0, 400.0]", "[400.0, -1000.0]").replace('modality = "CT"', 'modality = "CT"\nmodallity = "MR"')
    (folder / "manifest.toml").write_text(text.replace('version = "1.0"', 'version = "../1.0"'))
    with pytest.raises(PackageError, match=r"3 mistake\(s\)") as caught:
        load_package(folder)
    assert all(key in str(caught.value) for key in ("version", "modallity", "preprocessing"))


@pytest.mark.parametrize("name", ["../evil", "/etc", "Upper", "a/b", "", "a" * 65])
def test_a_name_that_could_leave_its_folder_is_refused(folder: Path, name: str) -> None:
    (folder / "manifest.toml").write_text(MANIFEST.replace('name = "spheres"', f'name = "{name}"', 1))
    with pytest.raises(PackageError, match="name"):
        load_package(folder)


def test_a_manifest_without_a_name_takes_the_folders_also_when_the_node_keeps_it_by_version(folder: Path) -> None:
    (folder / "manifest.toml").write_text(MANIFEST.replace('name = "spheres"\n', "", 1))
    assert load_package(folder).manifest.name == "spheres"
    kept = folder.parent / "spheres-kept" / "1.0"
    copy_package(folder, kept)
    assert load_package(kept).manifest.name == "spheres-kept"


@pytest.mark.parametrize("name", ["manifest.toml", "bundle/configs/inference.json", "bundle/models/model.safetensors"])
def test_a_package_that_lacks_what_it_needs_is_refused_by_the_absent_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(PackageError, match=name):
        load_package(folder)


def test_a_manifest_that_is_no_toml_is_refused(folder: Path) -> None:
    (folder / "manifest.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(PackageError, match="not TOML"):
        load_package(folder)


@pytest.mark.parametrize("name", ["secret", "bundle/secret", "bundle/models/secret"])
@pytest.mark.parametrize("target", ["/etc/passwd", "../manifest.toml", "/etc"])
def test_a_symbolic_link_anywhere_is_refused(folder: Path, name: str, target: str) -> None:
    (folder / name).symlink_to(target)
    with pytest.raises(PackageError, match="symbolic link"):
        load_package(folder)


def test_a_package_folder_that_is_itself_a_link_is_refused(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    with pytest.raises(PackageError, match="not a folder"):
        load_package(link)


def test_a_pipe_in_the_bundle_is_refused_instead_of_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "bundle/pipe")
    with pytest.raises(PackageError, match="no plain file"):
        load_package(folder)


def test_a_copy_has_the_same_digest_and_leaves_strangers_behind(folder: Path) -> None:
    (folder / "train.py").write_text("print()")
    destination = folder.parent / "kept" / "spheres" / "1.0"
    copy_package(folder, destination)
    assert digest_of(destination) == digest_of(folder)
    assert (destination / "MODEL_CARD.md").is_file()
    assert not (destination / "train.py").exists()
    with pytest.raises(PackageError, match="exists already"):
        copy_package(folder, destination)


def test_manifests_and_headers_are_read_without_loading_torch() -> None:
    code = (
        "import sys, dicomnode.analysis.package, dicomnode.analysis.select, dicomnode.analysis.volume\n"
        "print([name for name in ('torch', 'monai', 'highdicom', 'SimpleITK') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
