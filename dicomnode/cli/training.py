"""Commands of the ML engineer: train a network from a recipe, evaluate a package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("train")(train)
    app.command("evaluate")(evaluate)


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="CONFIG", exists=True, dir_okay=False, help="a recipe, e.g. training/recipes/lung-nodule-ct.toml")
    ],
    out: Annotated[Path, typer.Option(help="folder of checkpoints; a run that stopped there goes on")] = Path("training-out"),
) -> None:
    """Train the network that a recipe describes and write it as a model package."""
    from dicomnode.training.train import train as run

    run(recipe, out)


def evaluate(
    package: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="folder of a model package")],
    data: Annotated[
        Path | None, typer.Argument(exists=True, file_okay=False, help="folder of real cases; else phantoms never seen")
    ] = None,
) -> None:
    """Measure a model package and write its evaluation.json."""
    from dicomnode.training.evaluate import evaluate as run

    run(package, data)
