"""What a model package is: `manifest.toml`, `bundle/` (a MONAI Bundle), and the digest that a person consents to.

Reads a package as data only. Must never import torch or MONAI, and never run or even resolve what a bundle names.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dicomnode.analysis.manifest import MANIFEST, Manifest, parse_manifest
from dicomnode.errors import PackageError

BUNDLE = "bundle"
NETWORK_CONFIG = "bundle/configs/inference.json"
METADATA_CONFIG = "bundle/configs/metadata.json"
WEIGHTS = ("bundle/models/model.safetensors", "bundle/models/model.pt")  # the first that is there
PAPERS = ("evaluation.json", "MODEL_CARD.md")  # for people: they change nothing that runs, so the digest leaves them out


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package on disk whose manifest is sound. Nothing of it has run."""

    folder: Path
    manifest: Manifest
    digest: str  # sha256 hex


def load_package(folder: Path) -> Package:
    """Read a package's manifest and digest.

    Raises:
        PackageError: the folder, a file that must be there, or the manifest is not as it must be; every mistake of the
            manifest is named at once.
    """
    files = package_files(folder)
    contents = {name: _read(path) for name, path in files.items() if name == MANIFEST}
    manifest = parse_manifest(contents[MANIFEST], folder)
    return Package(folder=folder, manifest=manifest, digest=digest_of(folder))


def package_files(folder: Path) -> dict[str, Path]:
    """Return the files that the digest covers, by sorted POSIX name relative to `folder`.

    Raises:
        PackageError: a file that must be there is absent, or anything in the folder is a symbolic link or no plain file.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise PackageError(f"The package {folder} is not a folder.")
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
            if stat.S_ISREG(mode) and (relative == MANIFEST or relative.startswith(f"{BUNDLE}/")):
                found[relative] = path
    absent = [name for name in (MANIFEST, NETWORK_CONFIG) if name not in found]
    if not any(name in found for name in WEIGHTS):
        absent.append(" or ".join(WEIGHTS))
    if absent:
        raise PackageError(f"The package {folder.name} lacks {', '.join(absent)}.")
    return dict(sorted(found.items()))


def digest_of(folder: Path) -> str:
    """Return the sha256 (hex) over the sorted relative names and the contents of `manifest.toml` and `bundle/`."""
    return digest_of_contents((name, _read(path)) for name, path in package_files(folder).items())


def digest_of_contents(contents: Iterable[tuple[str, bytes]]) -> str:
    """Return the digest of (relative name, bytes) pairs in sorted order; lengths keep names and contents apart."""
    total = hashlib.sha256()
    for name, content in contents:
        encoded = name.encode("utf-8", "surrogateescape")
        total.update(len(encoded).to_bytes(8, "big") + encoded + len(content).to_bytes(8, "big"))
        total.update(content)
    return total.hexdigest()


def copy_package(source: Path, destination: Path) -> None:
    """Copy what the digest covers, and the papers, to `destination`, which must not exist yet.

    Raises:
        PackageError: the source is unsafe or incomplete, the destination exists, or the copy's digest differs.
    """
    files = package_files(source)
    if destination.exists():
        raise PackageError(f"The folder {destination} of the package exists already.")
    for name in (*files, *(paper for paper in PAPERS if (source / paper).is_file())):
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target, follow_symlinks=False)
    if digest_of(destination) != digest_of(source):
        shutil.rmtree(destination)
        raise PackageError(f"The package {source.name} changed while it was copied.")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path.name} of the package cannot be read ({error.strerror}).") from error
