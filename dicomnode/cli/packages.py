"""Commands over model packages: add, check (the consent to run it once), enable."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dicomnode.cli.terminal import ConfigOption, JsonOption, name_and_version, opened, show
from dicomnode.errors import PackageError, UsageError
from storage import Storage
from storage.records import PackageRecord

if TYPE_CHECKING:
    from dicomnode.analysis.adoption import Source
    from dicomnode.analysis.manifest import Manifest

package = typer.Typer(no_args_is_help=True, help="Model packages: add, check (your consent to run it once), enable.")
NameArgument = Annotated[str, typer.Argument(help="NAME[@VERSION]")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(package, name="package")


@package.command("add")
def package_add(
    source: Annotated[
        str,
        typer.Argument(
            help="folder with manifest.toml and bundle/, MONAI Bundle, model file (.ts, .pt2, .onnx), archive of these (.zip, .tar.gz), "
            "or the name of a built-in package"
        ),
    ],
    manifest: Annotated[Path | None, typer.Option("--manifest", metavar="FILE", help="used instead of the one that it has")] = None,
    config: ConfigOption = None,
) -> None:
    """Copy a model package into the node. It is read as data: nothing of it runs. A MONAI Bundle is given a draft of a manifest."""
    with opened(config) as (_, storage):
        added, read = _add(storage, _found(storage, source, manifest), manifest)
        name = f"{added.name}@{added.version}"
        typer.echo(f"added {name}, digest {added.digest[:12]}; next: dicomnode package check {name}")
        if read.drafted:
            typer.echo(
                f"its manifest is a draft: `dicomnode package manifest {name}` prints it, --manifest takes it back once it is edited"
            )
        for line in read.manifest.decide:
            typer.echo(f"decide: {line}")
        absent = [library for library in read.libraries if not _is_installed(library)]
        if absent:
            typer.echo(f"not installed, of what the bundle names: {', '.join(absent)}; the check shows whether they are needed")


@package.command("list")
def package_list(config: ConfigOption = None, json: JsonOption = False) -> None:
    """List the packages."""
    with opened(config) as (_, storage):
        show(storage.registry.packages(), ["name", "version", "state", "digest", "added_at"], as_json=json)


@package.command("manifest")
def package_manifest(
    name: NameArgument,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="write it to a new file instead")] = None,
    config: ConfigOption = None,
) -> None:
    """Print a package's manifest, to be edited and added again with a new version."""
    from dicomnode.analysis.manifest import MANIFEST

    with opened(config) as (_, storage):
        known = known_package(storage, name)
        file = storage.registry.package_folder(known.name, known.version) / MANIFEST
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PackageError(f"the manifest of {known.name}@{known.version} cannot be read: add the package again") from error
        if out is None:
            typer.echo(text, nl=False)
            return
        try:
            with out.open("x", encoding="utf-8") as written:
                written.write(text)
        except FileExistsError as error:
            raise UsageError(f"{out} exists already") from error


@package.command("check")
def package_check(
    name: NameArgument,
    memory: Annotated[int, typer.Option(metavar="MIB", min=512, help="how much memory it may use")] = 8192,
    minutes: Annotated[float, typer.Option(min=0.1, help="how long it may take")] = 10.0,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Run a package once on a phantom, in a child process without network and under limits. This is your consent to run it."""
    with opened(config) as (_, storage):
        checked = check_package(storage, known_package(storage, name), memory_bytes=memory * 2**20, seconds=minutes * 60)
        report = checked.check or {}
        if json:
            show([{"name": checked.name, "version": checked.version, **report}], [], as_json=True)
        elif checked.state != "added":
            show([{"what": key, "value": _cell(key, value)} for key, value in report.items()], ["what", "value"], as_json=False)
        if checked.state == "added":
            raise PackageError(f"{name} did not pass its check: {report.get('error', 'no finding could be made')}")


@package.command("enable")
def package_enable(name: NameArgument, config: ConfigOption = None) -> None:
    """Let the node run a checked package; other versions of it are disabled."""
    with opened(config) as (_, storage):
        known = known_package(storage, name)
        enable_package(storage, known)
        for line in _manifest_of(storage, known).decide:
            typer.echo(f"dicomnode: nobody has decided yet: {line}", err=True)


@package.command("disable")
def package_disable(name: NameArgument, config: ConfigOption = None) -> None:
    """Stop using a package for new studies."""
    with opened(config) as (_, storage):
        known = known_package(storage, name)
        storage.registry.disable(known.name, known.version)


def builtin_packages() -> dict[str, Path]:
    """The packages that come with the node: name -> folder of the newest version."""
    found = sorted((Path(__file__).parents[1] / "packages").glob("*/*/manifest.toml"))
    return {manifest.parents[1].name: manifest.parent for manifest in found}


def add_package(storage: Storage, source: Path, manifest: Path | None = None) -> PackageRecord:
    """Copy what lies at `source` into the node; adding the same content again repairs the copy and changes nothing else.

    Raises:
        PackageError: it is malformed, or this version is known with another content.
    """
    return _add(storage, source, manifest)[0]


def check_package(storage: Storage, record: PackageRecord, *, memory_bytes: int = 0, seconds: float = 0) -> PackageRecord:
    """Run the package once in a child process and keep what came of it; a limit of 0 is the usual one."""
    from dicomnode.analysis.check import MEMORY_BYTES, SECONDS, check_in_child
    from dicomnode.cli.rehearsal import check_volumes

    folder = storage.registry.package_folder(record.name, record.version)
    try:
        volumes = check_volumes(folder, _manifest_of(storage, record))
        memory, time = memory_bytes or MEMORY_BYTES, seconds or SECONDS
        report, passed = check_in_child(folder, volumes, digest=record.digest, memory_bytes=memory, seconds=time), True
        report = {"shapes": {name: list(volume.voxels.shape) for name, volume in volumes.items()}, **report}
    except PackageError as error:
        report, passed = {"error": _named_library(record, str(error))}, False
    storage.registry.set_check(record.name, record.version, record.digest, report, passed=passed)
    return known_package(storage, f"{record.name}@{record.version}")


def enable_package(storage: Storage, record: PackageRecord) -> None:
    """Enable a checked package after comparing the digest on disk with the one that was consented to."""
    from dicomnode.analysis.package import digest_of

    if record.state == "added":
        raise PackageError(f"{record.name}@{record.version} has not passed `dicomnode package check`")
    if digest_of(storage.registry.package_folder(record.name, record.version)) != record.digest:
        raise PackageError(f"the files of {record.name}@{record.version} have changed since it was added: its digest is wrong")
    storage.registry.enable(record.name, record.version)


def known_package(storage: Storage, name: str) -> PackageRecord:
    """Return the package NAME[@VERSION].

    Raises:
        UsageError: there is none.
    """
    found = storage.registry.package(*name_and_version(name))
    if found is None:
        raise UsageError(f"there is no package {name!r}")
    return found


def _found(storage: Storage, source: str, manifest: Path | None) -> Path:
    """Where SOURCE lies: a path, a built-in package, or, to give it another manifest, a package of this node."""
    path = Path(source)
    if path.exists():
        return path
    builtin = builtin_packages()
    if source in builtin:
        return builtin[source]
    here = storage.registry.package(*name_and_version(source))
    if here is not None and manifest is not None:
        return storage.registry.package_folder(here.name, here.version)
    raise UsageError(f"{source} is neither a folder nor a built-in package; built in: {', '.join(builtin)}")


def _add(storage: Storage, path: Path, manifest: Path | None) -> tuple[PackageRecord, Source]:
    from dicomnode.analysis.adoption import copy_source, read_source
    from dicomnode.analysis.manifest import MANIFEST

    with tempfile.TemporaryDirectory(prefix="dicomnode-add-") as scratch:
        source = read_source(path, Path(scratch), manifest=manifest)
        digest = source.digest
        name, version = source.manifest.name, source.manifest.version
        known = {(p.name, p.version): p for p in storage.registry.packages()}.get((name, version))
        copy = storage.registry.package_folder(name, version)
        if known is not None and known.digest != digest and source.drafted and (copy / MANIFEST).is_file():
            source = read_source(path, Path(scratch, "again"), manifest=copy / MANIFEST)  # an older draft, or what a person made of it
            digest = source.digest
        if known is not None and known.digest != digest:
            raise PackageError(f"{name}@{version} is already here with other content: give the new one a new version")
        if known is None or not _is_intact(copy, digest):
            staged = copy.with_name(f".{version}.adding")  # a name that no version has
            try:
                shutil.rmtree(staged, ignore_errors=True)  # left behind when an earlier copying was cut off
                copy_source(source, staged, digest)
                shutil.rmtree(copy, ignore_errors=True)
                staged.rename(copy)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
            storage.registry.add_package(name, version, digest)
    return known_package(storage, f"{name}@{version}"), source


def _manifest_of(storage: Storage, record: PackageRecord) -> Manifest:
    from dicomnode.analysis.package import load_package

    return load_package(storage.registry.package_folder(record.name, record.version)).manifest


def _named_library(record: PackageRecord, message: str) -> str:
    """Say which library is missing where that is what went wrong."""
    found = re.search(r"No module named '([A-Za-z0-9_]+)", message)
    return f"{record.name}@{record.version} needs {found.group(1)}, which isn't installed" if found else message


def _is_installed(library: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(library)
    except (PackageNotFoundError, ValueError):
        return False
    return True


def _cell(key: str, value: Any) -> Any:
    if key == "findings" and isinstance(value, list):
        return len(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell('', inner)}" for name, inner in value.items())
    return round(value, 3) if isinstance(value, float) else value


def _is_intact(folder: Path, digest: str) -> bool:
    from dicomnode.analysis.package import digest_of

    try:
        return digest_of(folder) == digest
    except PackageError:  # a file that must be there is gone
        return False
