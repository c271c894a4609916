"""Commands over data sets: build one from folders, phantoms or the node's own studies, and check one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from dicomnode.cli.terminal import JsonOption, show
from dicomnode.errors import UsageError

if TYPE_CHECKING:
    from dicomnode.training.dataset import Split
    from dicomnode.training.sources import Source

dataset = typer.Typer(no_args_is_help=True, help="Data sets for training and measuring: build, check.")

Unknown = Literal["refuse", "absent", "unlabelled"]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(dataset, name="dataset")


@dataset.command("build")
def dataset_build(
    out: Annotated[Path, typer.Argument(help="the data set's folder, new or empty")],
    sources: Annotated[list[Path] | None, typer.Argument(metavar="SOURCE...", exists=True, file_okay=False, help="folders")] = None,
    layout: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="TOML: where NIfTI or NRRD files and their label maps lie")
    ] = None,
    phantoms: Annotated[int, typer.Option(min=0, help="so many synthetic chests with lung nodules")] = 0,
    label: Annotated[list[str] | None, typer.Option(help="these labels alone, in this order; repeat it")] = None,
    missing: Annotated[Unknown, typer.Option(help="what a label means that nobody marked in a case")] = "refuse",
    empty: Annotated[Unknown, typer.Option(help="what an empty mask means, where no other label was drawn with it")] = "refuse",
    shares: Annotated[str, typer.Option(help="of the patients: train,validation,test")] = "0.7,0.15,0.15",
    split: Annotated[list[str] | None, typer.Option(metavar="PATIENT=SPLIT", help="pin a patient to a split; repeat it")] = None,
    seed: Annotated[int, typer.Option(help="of the split, and of phantoms")] = 0,
    key_file: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="a secret; pseudonyms are hashes keyed by it")] = None,
    name: Annotated[str | None, typer.Option(help="of the data set; else that of its folder")] = None,
    terms: Annotated[str | None, typer.Option(help="under which the images may be used")] = None,
    json: JsonOption = False,
) -> None:
    """Build a data set: images, labels and a split by patient, pseudonymised."""
    from dicomnode.training.dataset_build import Plan, build_dataset
    from dicomnode.training.label_maps import load_layout

    read_layout = load_layout(layout) if layout else None
    plan = Plan(
        name=name or out.absolute().name, terms=terms or (read_layout.terms if read_layout else ""), shares=_shares(shares),
        pins=dict(_pin(text) for text in split or ()), seed=seed, key=key_file.read_bytes().strip() if key_file else b"",
        labels=tuple(label or ()), missing=missing, empty=empty,
    )  # fmt: skip
    if layout and not sources:
        raise UsageError("--layout says how a SOURCE is laid out, and there is none")
    found: list[Source] = []
    for folder in sources or ():
        found += _sources_of(folder, layout)
    if phantoms:
        from dicomnode.training.phantom_cases import phantom_sources

        found += phantom_sources(phantoms, seed=seed)
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


def _sources_of(folder: Path, layout: Path | None) -> Iterator[Source]:
    from dicomnode.training.label_maps import label_map_sources, load_layout

    if layout:
        yield from label_map_sources(folder, load_layout(layout))
    else:
        raise UsageError(f"{folder}: --layout must say how its files are laid out")


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

    return track(things, description="cases", console=Console(stderr=True), transient=True)
