"""Commands of the ML engineer: train a network from a recipe, evaluate a package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("train")(train)
    app.command("evaluate")(evaluate)


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="CONFIG", exists=True, dir_okay=False, help="a recipe, e.g. training/recipes/lung-nodule-ct.toml")
    ],
    out: Annotated[Path, typer.Option(help="folder of the run; one that stopped there goes on")] = Path("training-out"),
    data: Annotated[
        Path | None, typer.Option(metavar="DATASET", exists=True, file_okay=False, help="the data set, if the recipe reads one")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    long: Annotated[bool, typer.Option("--long", help="as many times the steps as the recipe's long_factor says")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="in the place of the recipe's")] = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="of a few patients: first a network without each, measured on him")
    ] = False,
) -> None:
    """Train the network that a recipe describes and write its best step as a model package."""
    from dicomnode.training.train import train as run

    figures = {}
    if leave_one_out:
        figures = _left_out(recipe, out, data, device=device, seed=seed)
    done = run(recipe, out, device=device, dataset=data, long=long, seed=seed)
    skipped = f", {done.skipped_steps} skipped because loss or gradients were not finite" if done.skipped_steps else ""
    if not done.finished:
        typer.echo(
            f"dicomnode: stopped by {done.stopped_by} after step {done.steps}{skipped}; the same command goes on from there", err=True
        )
        raise typer.Exit(1)
    typer.echo(f"{done.steps} steps on {done.computing} in {done.seconds:.0f} s ({done.cpu_seconds:.0f} s of CPU){skipped}")
    if done.metric is not None:
        typer.echo(f"step {done.exported_step} was best (validation {done.metric[0]} {done.metric[1]:.3f}): {done.folder / 'package'}")
    for name, row in figures.items():
        from dicomnode.training.card import write_model_card
        from dicomnode.training.evaluate import keep_figures

        keep_figures(done.folder / "package", name, row)
        write_model_card(done.folder / "package")


def _left_out(recipe: Path, out: Path, data: Path | None, *, device: str, seed: int | None) -> dict[str, Any]:
    from dicomnode.errors import UsageError
    from dicomnode.training.card import set_lines
    from dicomnode.training.leave_one_out import leave_one_out as run

    if data is None:
        raise UsageError("--leave-one-out needs a data set: --data")
    figures = run(recipe, out, data, device=device, seed=seed)
    for row in figures.values():
        typer.echo("\n".join(set_lines(row)))
    return figures


def evaluate(
    package: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="folder of a model package")],
    data: Annotated[
        Path | None,
        typer.Argument(exists=True, file_okay=False, help="a data set, or a folder of real cases; else phantoms never seen"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for report.html and pictures of the worst cases", file_okay=False)] = None,
    split: Annotated[
        str, typer.Option(help="of a data set or of phantoms: test, or validation, of which nothing is kept in the package")
    ] = "test",
    scans: Annotated[int, typer.Option(min=3, help="how many phantoms")] = 12,
    paste: Annotated[
        int, typer.Option(min=0, help="so many scans made of a folder of real chest CT, with synthetic nodules pasted in")
    ] = 0,
) -> None:
    """Measure a model package and write its evaluation.json and MODEL_CARD.md."""
    from dicomnode.errors import UsageError
    from dicomnode.training.card import set_lines
    from dicomnode.training.evaluate import evaluate as run

    if split not in ("test", "validation"):
        raise UsageError(f"--split is test or validation, not {split!r}")
    figures = run(package, data, out=out, scans=scans, paste=paste, split="test" if split == "test" else "validation")
    typer.echo("\n".join(set_lines(figures)))
