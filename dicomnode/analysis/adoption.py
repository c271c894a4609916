"""Whatever a person brings as a model, as the files of a package: our own folder, a MONAI Bundle, one model file, or an archive of these.

Everything is read as data. Must never import torch or MONAI, run or resolve what a bundle names, download anything, or change the source.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from dicomnode.analysis.archive import is_archive, unpack
from dicomnode.analysis.bundle_files import is_bundle, libraries_of
from dicomnode.analysis.draft import draft_manifest
from dicomnode.analysis.manifest import MANIFEST, Manifest, parse_manifest
from dicomnode.analysis.package import (
    BUNDLE,
    PAPERS,
    ZOO_WEIGHTS,
    Form,
    copy_files,
    digest_of_files,
    form_of,
    package_files,
    plain_files,
    refuse_pointers,
)
from dicomnode.errors import PackageError

MODEL_SUFFIXES = (".ts", ".pt2", ".onnx", ".pt")
LARGE_FILES = ("large_files.yml", "large_files.yaml", "large-files.yml", "large-files.yaml")
MANIFEST_BYTES = 2**20

_LEFT_BEHIND = re.compile(r"(^|/)(\.git|\.github|\.cache|__pycache__|__MACOSX)/|(^|/)(\.DS_Store|\.gitattributes|\.gitignore)$|\.pyc$")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A package that isn't in the node yet: its manifest, and where each of its files lies."""

    manifest: Manifest
    form: Form
    files: Mapping[str, Path]  # by their names in the package, the manifest and the papers among them
    drafted: bool  # nobody has written its manifest
    libraries: tuple[str, ...] = ()  # what a bundle's metadata says it needs or may need

    @property
    def digest(self) -> str:
        """What the package's digest will be."""
        return digest_of_files({name: path for name, path in self.files.items() if name not in PAPERS})


def read_source(path: Path, scratch: Path, *, manifest: Path | None = None) -> Source:
    """Find out what lies at `path` and return it as a package; `manifest` is used instead of the one that it has or would be given.

    An archive is unpacked into `scratch`, an empty folder that must outlive the source.

    Raises:
        PackageError: it is none of the things that this module knows, or isn't whole; one sentence says what is wrong.
    """
    if manifest is not None and (not manifest.is_file() or manifest.stat().st_size > MANIFEST_BYTES):
        raise PackageError(f"{manifest} is no manifest: a file of TOML is needed.")
    name = path.name
    if path.is_file() and is_archive(path):
        place = scratch / "unpacked" / path.name.removesuffix(".gz").rpartition(".")[0]
        place.mkdir(parents=True)
        unpack(path, place)
        path = _innermost(place)
    if path.is_dir():
        if (path / MANIFEST).is_file() and not is_bundle(path):
            return _own(path, manifest)
        if (path / BUNDLE).is_dir() and not is_bundle(path) and (manifest is not None or is_bundle(path / BUNDLE)):
            return _zoo(path / BUNDLE, manifest, scratch, name=path.name)
        if is_bundle(path):
            own = path / MANIFEST  # a person's, put beside the bundle's own folders
            return _zoo(path, manifest or (own if own.is_file() else None), scratch, name=path.name)
        raise PackageError(
            f"The package {name} is neither a folder with {MANIFEST} and {BUNDLE}/ nor a MONAI Bundle with configs/metadata.json: it lacks"
            f" {MANIFEST}."
        )
    if path.is_file() and path.suffix.lower() in MODEL_SUFFIXES:
        return _file(path, manifest)
    raise PackageError(f"{path} is no folder, no archive (.zip, .tar, .tar.gz) and no model file ({', '.join(MODEL_SUFFIXES)}).")


def copy_source(source: Source, destination: Path, digest: str) -> None:
    """Copy a source to `destination`, which must not exist yet, and make sure that it is what `digest` was taken of.

    Raises:
        PackageError: the source changed meanwhile.
    """
    copy_files(source.files, destination)
    if digest_of_files(package_files(destination)) != digest:
        raise PackageError(f"The package {source.manifest.name} changed while it was copied.")


def _own(folder: Path, manifest: Path | None) -> Source:
    files = dict(package_files(folder))
    if manifest is not None:
        files[MANIFEST] = manifest
    files |= {paper: folder / paper for paper in PAPERS if (folder / paper).is_file() and not (folder / paper).is_symlink()}
    return _source(files, folder, drafted=False)


def _zoo(bundle: Path, manifest: Path | None, scratch: Path, *, name: str) -> Source:
    found = {inner: path for inner, path in plain_files(bundle).items() if not _LEFT_BEHIND.search(inner) and inner != MANIFEST}
    if not any(inner.startswith("models/") and inner.endswith(ZOO_WEIGHTS) for inner in found):
        raise PackageError(f"The bundle {name} lacks its weights in models/ (models/model.pt): {_where_weights_are(bundle)}")
    refuse_pointers(found)
    drafted = manifest is None
    if manifest is None:
        manifest = scratch / MANIFEST
        manifest.write_text(draft_manifest(bundle).text, encoding="utf-8")
    files = {f"{BUNDLE}/{inner}": path for inner, path in found.items()} | {MANIFEST: manifest}
    source = _source(files, bundle if bundle.name != BUNDLE else bundle.parent, drafted=drafted)
    return replace(source, libraries=libraries_of(bundle))


def _file(file: Path, manifest: Path | None) -> Source:
    if manifest is None:
        raise PackageError(f"{file.name} says nothing of what it is for: add it with a manifest (--manifest FILE).")
    suffix = file.suffix.lower()
    if suffix in (".ts", ".pt"):
        if not _is_torchscript(file):
            raise PackageError(
                f"{file.name} holds weights alone and no network: bring the bundle that defines it, or export it as TorchScript."
            )
        suffix = ".ts"
    refuse_pointers({f"models/{file.name}": file})
    return _source({MANIFEST: manifest, f"{BUNDLE}/models/model{suffix}": file}, file.parent / file.stem, drafted=False)


def _source(files: Mapping[str, Path], folder: Path, *, drafted: bool) -> Source:
    manifest = parse_manifest(files[MANIFEST].read_bytes(), folder)
    form = form_of(manifest, files)
    refuse_pointers(files)
    return Source(manifest=manifest, form=form, files=dict(sorted(files.items())), drafted=drafted)


def _is_torchscript(file: Path) -> bool:
    """Whether a file is an archive of torch with code in it; nothing of it is loaded."""
    try:
        with zipfile.ZipFile(file) as opened:
            return any(re.search(r"^[^/]+/code/", name) for name in opened.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _innermost(folder: Path) -> Path:
    """The folder that an archive was made of: most archives hold one folder and nothing beside it."""
    for _ in range(3):
        inside = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
        if len(inside) != 1 or (folder / MANIFEST).exists() or is_bundle(folder):
            break
        folder = inside[0]
        if folder.is_file():
            break
    return folder


def _where_weights_are(bundle: Path) -> str:
    """What large_files.yml says of where the weights are to be fetched, as one sentence."""
    listed = next((bundle / name for name in LARGE_FILES if (bundle / name).is_file()), None)
    if listed is None:
        return "fetch the whole bundle; nothing is downloaded here."
    try:
        entries = yaml.safe_load(listed.read_bytes()[:65536])["large_files"]
        wanted = [f"{entry['path']} from {entry['url']}" for entry in entries if not (bundle / str(entry["path"])).exists()]
    except (yaml.YAMLError, KeyError, TypeError, RecursionError):
        wanted = []
    plain = ["".join(c for c in text if c.isprintable())[:300] for text in wanted[:4]]
    return f"fetch {' and '.join(plain) or 'what it names'} ({listed.name}) first; nothing is downloaded here."
