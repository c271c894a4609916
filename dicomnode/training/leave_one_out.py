"""Leave one out: for each of a few patients a network that never saw him, measured on him with all series and with the first alone.

What it gives are figures of the recipe. The weights that are exported have seen every patient, and no figure is theirs.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from dicomnode.analysis.inference import load_model
from dicomnode.analysis.manifest import Manifest
from dicomnode.analysis.package import load_package
from dicomnode.errors import UsageError
from dicomnode.training.cases import Case, case_from_masks
from dicomnode.training.dataset import CaseRow, DataSet, load_dataset, read_case
from dicomnode.training.evaluate import measure
from dicomnode.training.evaluation.matching import Result
from dicomnode.training.evaluation.summary import plain, summary
from dicomnode.training.recipe import Gliomas, Recipe, load_recipe
from dicomnode.training.train import train

FIGURES = "leave-one-out.json"


def leave_one_out(
    config_path: Path, out_folder: Path, dataset_folder: Path, *, device: str = "auto", seed: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Train without each case of the data set's split `train` in turn, and return the figures by name of the set.

    Each run has a folder `without-CASE` in `out_folder`, where one that stopped goes on; the figures are written to `leave-one-out.json`,
    with what each run took. `seed` is in the place of the recipe's.

    Raises:
        ConfigError: the recipe has mistakes.
        UsageError: its data leave nobody out, or the data set has fewer than two cases.
    """
    recipe, dataset = load_recipe(config_path), load_dataset(dataset_folder)
    rows = dataset.of_split("train")
    if not isinstance(recipe.data, Gliomas) or len(rows) < 2:
        raise UsageError("leaving one out needs data of a kind that can, and two cases or more in the split train")
    out_folder.mkdir(parents=True, exist_ok=True)
    all_series: list[Result] = []
    alone: list[Result] = []
    runs: list[dict[str, Any]] = []
    for row in rows:
        fold = _without(config_path, out_folder, row)
        folder = out_folder / fold.stem
        if not (folder / "package" / "manifest.toml").exists():
            done = train(fold, folder, device=device, dataset=dataset_folder, seed=seed, quiet=quiet)
            runs.append({"without": row.case, "seconds": round(done.seconds, 1), "cpu_seconds": round(done.cpu_seconds, 1)})
        package = load_package(folder / "package")
        model = load_model(folder / "package", digest=package.digest, device=device)
        case = _case(dataset, row, package.manifest)
        all_series += measure(model, [(row.case, lambda case=case: case)])[0]  # type: ignore[misc]  # a default binds it
        single = _first_alone(case, package.manifest)
        alone += measure(model, [(row.case, lambda case=single: case)])[0]  # type: ignore[misc]  # the same
    figures = _figures(recipe, dataset, {"all series": all_series, f"{recipe.package.inputs[0].name} alone": alone})
    content = {"runs": runs, "load_average": round(os.getloadavg()[0], 1), "figures": figures}
    (out_folder / FIGURES).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return figures


def _without(config_path: Path, out_folder: Path, row: CaseRow) -> Path:
    """The recipe with one line more, in a file that is named after the case that is left out."""
    text = config_path.read_text(encoding="utf-8")
    changed = re.sub(r"(?m)^\[data\][ \t]*$", f'[data]\nleave_out = ["{row.case}"]', text, count=1)
    file = out_folder / f"without-{row.case}.toml"
    file.write_text(changed, encoding="utf-8")
    data = load_recipe(file).data
    if not isinstance(data, Gliomas) or data.leave_out != (row.case,):
        raise UsageError(f"{config_path} has no line [data], or leaves out cases itself")
    return file


def _case(dataset: DataSet, row: CaseRow, manifest: Manifest) -> Case:
    read = read_case(dataset, row)
    truth = {label: read.truth[number] for number, label in enumerate(dataset.labels) if read.labels[label] != "unlabelled"}
    volumes = {accepts.name: read.volumes[accepts.name] for accepts in manifest.inputs if accepts.name in read.volumes}
    return case_from_masks(row.case, volumes, truth, manifest, patient=row.patient)


def _first_alone(case: Case, manifest: Manifest) -> Case:
    name = manifest.inputs[0].name
    return replace(case_from_masks(case.name, {name: case.volumes[name]}, case.truth, manifest), patient=case.patient)


def _figures(recipe: Recipe, dataset: DataSet, results: dict[str, list[Result]]) -> dict[str, Any]:
    return {
        f"leave one patient out, {which}": dict(
            plain({
                "name": f"leave one patient out, {which} (networks of this recipe that never saw the patient, not these weights)",
                "split": "test", "kind": "dataset", "terms": dataset.terms, **summary(found, recipe.package), "worst": [],
            })
        )
        for which, found in results.items()
    }  # fmt: skip
