"""What a model package is: `manifest.toml`, `bundle/`, and the digest that a person consents to.

`bundle/` is one of three: (own) a network_def and its weights, run as the manifest says; (file) one TorchScript, torch.export or ONNX
file, run the same way; (zoo) a MONAI Bundle with its own preprocessing and postprocessing. Reads a package as data only. Must never
import torch or MONAI, and never run or even resolve what a bundle names.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dicomnode.analysis.manifest import MANIFEST, Manifest, parse_manifest
from dicomnode.errors import PackageError

BUNDLE = "bundle"
NETWORK_CONFIG = "bundle/configs/inference.json"
METADATA_CONFIG = "bundle/configs/metadata.json"
WEIGHTS = ("bundle/models/model.safetensors", "bundle/models/model.pt")  # the first that is there
MODEL_FILES = ("bundle/models/model.ts", "bundle/models/model.pt2", "bundle/models/model.onnx")  # network and weights in one
ZOO_WEIGHTS = (".pt", ".pth", ".ts", ".safetensors")
PAPERS = ("evaluation.json", "training.json", "MODEL_CARD.md")  # for people: they change nothing that runs, so the digest leaves them out
CHUNK = 2**22

Form = Literal["own", "file", "zoo"]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package on disk whose manifest is sound. Nothing of it has run."""

    folder: Path
    manifest: Manifest
    form: Form
    digest: str  # sha256 hex


def load_package(folder: Path) -> Package:
    """Read a package's manifest and digest.

    Raises:
        PackageError: the folder, a file that must be there, or the manifest is not as it must be; every mistake of the
            manifest is named at once.
    """
    files = package_files(folder)
    manifest = parse_manifest(_read(files[MANIFEST]), folder)
    form = form_of(manifest, files)
    refuse_pointers(files)
    return Package(folder=folder, manifest=manifest, form=form, digest=digest_of(folder))


def form_of(manifest: Manifest, names: Collection[str]) -> Form:
    """Return which of the three forms a package has, by its manifest and the names of its files.

    Raises:
        PackageError: a file that the form needs is absent.
    """
    if manifest.bundle is not None:
        config = f"{BUNDLE}/{manifest.bundle.config}"
        absent = [] if config in names else [config]
        if not any(name.startswith(f"{BUNDLE}/models/") and name.endswith(ZOO_WEIGHTS) for name in names):
            absent.append(f"{BUNDLE}/models/model.pt")
        form: Form = "zoo"
    elif NETWORK_CONFIG in names:
        absent, form = ([] if any(name in names for name in WEIGHTS) else [" or ".join(WEIGHTS)]), "own"
    else:
        absent, form = ([] if any(name in names for name in MODEL_FILES) else [NETWORK_CONFIG]), "file"
        if sum(name in names for name in MODEL_FILES) > 1:
            raise PackageError(f"The package {manifest.name} holds more than one of {', '.join(MODEL_FILES)}: one is run.")
    if absent:
        raise PackageError(f"The package {manifest.name} lacks {', '.join(absent)}.")
    return form


def package_files(folder: Path) -> dict[str, Path]:
    """Return the files that the digest covers, by sorted POSIX name relative to `folder`.

    Raises:
        PackageError: a file that every package has is absent, or anything in the folder is a symbolic link or no plain file.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise PackageError(f"The package {folder} is not a folder.")
    found = {name: path for name, path in plain_files(folder).items() if name == MANIFEST or name.startswith(f"{BUNDLE}/")}
    has_model = any(name in found for name in MODEL_FILES)
    absent = [] if MANIFEST in found else [MANIFEST]
    configs = {name for name in found if name.startswith(f"{BUNDLE}/configs/") and name.endswith((".json", ".yaml", ".yml"))}
    if not has_model and not configs - {METADATA_CONFIG}:
        absent.append(NETWORK_CONFIG)
    if not has_model and not any(name.startswith(f"{BUNDLE}/models/") and name.endswith(ZOO_WEIGHTS) for name in found):
        absent.append(" or ".join(WEIGHTS))
    if absent:
        raise PackageError(f"The package {folder.name} lacks {', '.join(absent)}.")
    return dict(sorted(found.items()))


def plain_files(folder: Path) -> dict[str, Path]:
    """Return every file below a folder by its POSIX name.

    Raises:
        PackageError: anything in it is a symbolic link or no plain file.
    """
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder):  # does not follow links, and each link is refused below
        for name in (*folders, *names):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise PackageError(f"The package {folder.name} holds a symbolic link ({relative}): links are refused.")
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise PackageError(f"The package {folder.name} holds something that is no plain file ({relative}).")
            if stat.S_ISREG(mode):
                found[relative] = path
    return found


def refuse_pointers(files: Mapping[str, Path]) -> None:
    """Refuse what git left in the place of large files.

    Raises:
        PackageError: a model's file is a pointer of git-lfs.
    """
    for name, path in files.items():
        if "models/" in name and path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise PackageError(
                f"{name} is a pointer of git-lfs and not the weights: fetch them first (git lfs pull); nothing is downloaded here."
            )


def digest_of(folder: Path) -> str:
    """Return the sha256 (hex) over the sorted relative names and the contents of `manifest.toml` and `bundle/`."""
    return digest_of_files(package_files(folder))


def digest_of_files(files: Mapping[str, Path]) -> str:
    """Return the digest of files by their names in the package. No file is held in memory whole.

    Raises:
        PackageError: a file can't be read, or changes while it is.
    """
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        for chunk in _framed(name, path):
            total.update(chunk)
    return total.hexdigest()


def digest_of_contents(contents: Iterable[tuple[str, bytes]]) -> str:
    """Return the digest of (relative name, bytes) pairs in sorted order; lengths keep names and contents apart."""
    total = hashlib.sha256()
    for name, content in contents:
        total.update(_frame(name, len(content)))
        total.update(content)
    return total.hexdigest()


def copy_package(source: Path, destination: Path) -> None:
    """Copy what the digest covers, and the papers, to `destination`, which must not exist yet.

    Raises:
        PackageError: the source is unsafe or incomplete, the destination exists, or the copy's digest differs.
    """
    files = package_files(source)
    papers = {paper: source / paper for paper in PAPERS if (source / paper).is_file()}
    digest = digest_of_files(files)
    copy_files({**files, **papers}, destination)
    if digest_of(destination) != digest:
        shutil.rmtree(destination)
        raise PackageError(f"The package {source.name} changed while it was copied.")


def copy_files(files: Mapping[str, Path], destination: Path) -> None:
    """Copy files by their names below `destination`, which must not exist yet.

    Raises:
        PackageError: the destination exists.
    """
    if destination.exists():
        raise PackageError(f"The folder {destination} of the package exists already.")
    for name, path in files.items():
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target, follow_symlinks=False)


def _framed(name: str, path: Path) -> Iterator[bytes]:
    """Yield a file's share of the digest."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            yield _frame(name, size)
            left = size
            while chunk := file.read(CHUNK):
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise PackageError(f"{path.name} of the package cannot be read ({error.strerror}).") from error
    if left:
        raise PackageError(f"{name} of the package changed while it was read.")


def _frame(name: str, size: int) -> bytes:
    encoded = name.encode("utf-8", "surrogateescape")
    return len(encoded).to_bytes(8, "big") + encoded + size.to_bytes(8, "big")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path.name} of the package cannot be read ({error.strerror}).") from error
