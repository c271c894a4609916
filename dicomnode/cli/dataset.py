"""Commands over data sets: build one from folders, phantoms or the node's own studies, and check one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from dicomnode.cli.terminal import ConfigOption, JsonOption, name_and_version, opened, show
from dicomnode.errors import UsageError

if TYPE_CHECKING:
    from dicomnode.analysis.manifest import Manifest
    from dicomnode.training.dataset import Split
    from dicomnode.training.segmentations import SegmentRule
    from dicomnode.training.sources import Source
    from storage import Storage

dataset = typer.Typer(no_args_is_help=True, help="Data sets for training and measuring: build, check.")

SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"  # PS3.4 B.5

Unknown = Literal["refuse", "absent", "unlabelled"]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(dataset, name="dataset")


@dataset.command("build")
def dataset_build(
    out: Annotated[Path, typer.Argument(help="the data set's folder, new or empty")],
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SOURCE...", exists=True, file_okay=False, help="folders of DICOM images with SEG objects; see also --layout"
        ),
    ] = None,
    layout: Annotated[
        Path | None,
        typer.Option(metavar="TOML", exists=True, dir_okay=False, help="where the NIfTI or NRRD files and label maps of a SOURCE lie"),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG|PACKAGE",
            exists=True,
            help="a recipe or a package's folder: its inputs choose series, its outputs are the labels",
        ),
    ] = None,
    study: Annotated[list[str] | None, typer.Option(metavar="UID", help="a study of this node, with the SEG objects it was sent")] = None,
    results_of: Annotated[
        str | None, typer.Option(metavar="NAME[@VERSION]", help="this node's studies, with that package's SEG objects")
    ] = None,
    phantoms: Annotated[int, typer.Option(min=0, help="so many synthetic chests with lung nodules")] = 0,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=PATTERN]", help="these labels alone, in this order; a pattern fits Segment Label or type; repeat it"),
    ] = None,
    missing: Annotated[Unknown, typer.Option(help="what a label means that nobody marked in a case")] = "refuse",
    empty: Annotated[Unknown, typer.Option(help="what an empty mask means, where no other label was drawn with it")] = "refuse",
    shares: Annotated[str, typer.Option(help="of the patients: train,validation,test")] = "0.7,0.15,0.15",
    split: Annotated[list[str] | None, typer.Option(metavar="PATIENT=SPLIT", help="pin a patient to a split; repeat it")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the split, and of phantoms")] = 0,
    key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="a secret; pseudonyms are hashes keyed by it")
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the data set; else that of its folder")] = None,
    terms: Annotated[str | None, typer.Option(help="under which the images may be used")] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Build a data set: images, labels and a split by patient, pseudonymised. It appears whole or not at all."""
    from dicomnode.training.dataset_build import Plan, build_dataset
    from dicomnode.training.dicom_sources import dicom_files, dicom_sources
    from dicomnode.training.label_maps import label_map_sources, load_layout
    from dicomnode.training.phantom_cases import phantom_sources

    if layout and not sources:
        raise UsageError("--layout says how a SOURCE is laid out, and there is none")
    read_layout = load_layout(layout) if layout else None
    manifest = _manifest(model) if model else None
    rules = _rules(label or (), manifest)
    plan = Plan(
        name=name or out.absolute().name, terms=terms or (read_layout.terms if read_layout else ""), shares=_shares(shares),
        pins=dict(_pin(text) for text in split or ()), seed=seed, key=key_file.read_bytes().strip() if key_file else b"",
        labels=tuple(rule.label for rule in rules), missing=missing, empty=empty,
    )  # fmt: skip
    found: list[Source] = []
    for folder in sources or ():
        if read_layout:
            found += label_map_sources(folder, read_layout)
        else:
            found += dicom_sources(dicom_files(folder), manifest=manifest, rules=rules)
    if study or results_of:
        with opened(config) as (_, storage):
            found += dicom_sources(_stored_files(storage, study or (), results_of, missing), manifest=manifest, rules=rules)
    found += phantom_sources(phantoms, seed=seed)
    if not found:
        raise UsageError("there is nothing to build from: name a SOURCE, --study, --results-of or --phantoms")
    built = build_dataset(out, found, plan, progress=_progress)
    origins = dict(built.origins)
    rows = [{**row.model_dump(mode="json"), "origin": origins[row.case]} for row in built.dataset.cases]
    if not json:
        rows = [row | {"labels": [f"{label} {state}" for label, state in row["labels"].items()]} for row in rows]
    show(rows, ["case", "split", "labels", "origin"], as_json=json)
    for origin, why in built.refused:
        typer.echo(f"left out: {origin}: {why}", err=True)


@dataset.command("check")
def dataset_check(
    folder: Annotated[Path, typer.Argument(metavar="DATASET", exists=True, file_okay=False, help="a data set's folder")],
    json: JsonOption = False,
) -> None:
    """Check every case, and that no patient, study or image stands in two splits; exit code 2 names what doesn't hold."""
    from dicomnode.training.dataset import SPLITS, load_dataset
    from dicomnode.training.leakage import check_dataset

    read = load_dataset(folder)
    check_dataset(read, progress=_progress)
    rows: list[dict[str, Any]] = []
    for split in SPLITS:
        cases = read.of_split(split)
        present = {label: sum(row.labels[label] == "present" for row in cases) for label in read.labels}
        rows.append({"split": split, "cases": len(cases), "patients": len({row.patient for row in cases}), "present": present})
    if not json:
        rows = [row | {"present": [f"{label} {count}" for label, count in row["present"].items()]} for row in rows]
    show(rows, ["split", "cases", "patients", "present"], as_json=json)


def _manifest(model: Path) -> Manifest:
    from dicomnode.analysis.package import load_package
    from dicomnode.training.recipe import load_recipe

    return load_package(model).manifest if model.is_dir() else load_recipe(model).package


def _rules(labels: Sequence[str], manifest: Manifest | None) -> list[SegmentRule]:
    """The labels that are wanted and how their segments are called; the outputs of a model, unless labels are named."""
    from dicomnode.training.segmentations import SegmentRule

    if manifest and not labels:
        return [SegmentRule(label=output.label, pattern=escape(output.label), type=output.type.code()) for output in manifest.outputs]
    pairs = [(name, pattern or escape(name)) for name, _, pattern in (text.partition("=") for text in labels)]
    if not all(name for name, _ in pairs) or len({name for name, _ in pairs}) < len(pairs):
        raise UsageError("each --label needs a name of its own, as in --label 'Lung nodule=*nodule*'")
    return [SegmentRule(label=name, pattern=pattern) for name, pattern in pairs]


def _stored_files(storage: Storage, studies: Sequence[str], results_of: str | None, missing: Unknown) -> list[Path]:
    """The files of studies of this node: images, and SEG objects, those that were sent or the newest ones of a package's results.

    Of a package's studies those without a SEG are taken only if that means that there is nothing (`--missing absent`).
    """
    if unknown := [uid for uid in studies if storage.index.study(uid) is None]:
        raise UsageError(f"there is no study {unknown[0]!r}")
    results: dict[str, list[Path]] = {}
    if results_of:
        package, version = name_and_version(results_of)
        for job in sorted(storage.jobs.jobs(kind="analyse", state="done"), key=lambda job: job.created_at):
            uid = job.study_instance_uid
            if job.carried_from is None and job.package == package and version in (None, job.version) and (not studies or uid in studies):
                made = [each for each in storage.jobs.results(job_key=job.key) if each.sop_class_uid == SEGMENTATION_STORAGE]
                results[uid] = [storage.objects.path(each.stored.object_id) for each in made]
        results = {uid: files for uid, files in results.items() if files or missing == "absent"}
        if not results:
            raise UsageError(f"no study of this node has a SEG of the package {results_of}")
    files = [path for made in results.values() for path in made]
    for uid in results or studies:
        for instance in storage.index.instances(uid):
            image = instance.kind == "image"
            if not instance.made_here and (image or (not results_of and instance.sop_class_uid == SEGMENTATION_STORAGE)):
                files.append(storage.objects.path(instance.stored.object_id))
    return files


def _shares(text: str) -> tuple[float, float, float]:
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--shares {text!r} isn't three numbers such as 0.7,0.15,0.15") from error
    return train, validation, test


def _pin(text: str) -> tuple[str, Split]:
    from dicomnode.training.dataset import Split

    patient, _, split = text.rpartition("=")
    for name in get_args(Split):
        if patient and split == name:
            return patient, name
    raise UsageError(f"--split {text!r} isn't PATIENT=train, PATIENT=validation or PATIENT=test")


def _progress(things: Sequence[Any]) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(things, description="cases", console=console, transient=True, disable=not console.is_terminal)
