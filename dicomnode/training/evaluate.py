"""Measure a model package: on phantoms it never saw, on a data set, or on real cases. Writes evaluation.json, the card and a report.

Runs the package exactly as the node does, through the one inference there is; only findings below its score are looked at too.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.progress import track

from dicomnode.analysis.eligibility import NotEligible
from dicomnode.analysis.inference import Model, load_model
from dicomnode.analysis.package import load_package
from dicomnode.errors import AnalysisFailed, UsageError
from dicomnode.training.card import TRAINING, write_model_card
from dicomnode.training.cases import Case, dataset_cases, real_cases
from dicomnode.training.dataset import DATASET, DataSet, load_dataset
from dicomnode.training.evaluation.matching import Result, compare, reported
from dicomnode.training.evaluation.pictures import Failure, Gallery
from dicomnode.training.evaluation.report import write_report
from dicomnode.training.evaluation.summary import plain, summary
from dicomnode.training.leakage import overlaps, refuse
from dicomnode.training.pasted import pasted_cases
from dicomnode.training.unseen_phantoms import TEST_SEED, VALIDATION_SEED, unseen_phantoms

SCHEMA = 2
MOST_FINDINGS = 200  # of any score that are looked at in a scan

Split = Literal["test", "validation"]
Cases = Iterable[tuple[str, Callable[[], Case]]]


def evaluate(
    package_folder: Path,
    data_folder: Path | None = None,
    *,
    out: Path | None = None,
    scans: int = 12,
    paste: int = 0,
    split: Split = "test",
    device: str = "auto",
) -> dict[str, Any]:
    """Measure the package; return the figures of this set of cases.

    Without `data_folder` on `scans` phantoms, of which every third holds nothing to find or is of something else; else on the `split` of
    the data set there, or on the real cases in it, as `cases.real_cases` reads them; with `paste` on so many scans made of those, synthetic
    nodules pasted in. With `split` test the figures go into the package's evaluation.json, beside those of other sets, and MODEL_CARD.md
    is written again; figures of another digest are thrown away. On validation nothing is written there. `out` gets report.html and the
    pictures in it as files.

    Raises:
        PackageError: the package is not sound.
        UsageError: the folder holds no case or none to paste into, or the data set doesn't fit the package or two of its splits share
            something, or the package was trained on another state of it.
    """
    package = load_package(package_folder)
    model = load_model(package_folder, digest=package.digest, device=device)
    manifest = package.manifest
    if paste and (data_folder is None or (data_folder / DATASET).exists() or split != "test" or manifest.inputs[0].region != "lung"):
        raise UsageError("nodules are pasted into a folder of real chest CT, for a package that looks for the lung, and only for its test")
    if data_folder is None:
        first_seed = TEST_SEED if split == "test" else VALIDATION_SEED
        name, about = "phantoms", {"kind": "phantoms", "first_seed": str(first_seed)}
        cases: Cases = unseen_phantoms(manifest, first_seed=first_seed, scans=scans)
    elif (data_folder / DATASET).exists():
        dataset = load_dataset(data_folder)
        refuse(dataset, list(overlaps(dataset)))
        _refuse_other_split(package_folder, dataset)
        name, about = dataset.name, {"kind": "dataset", "terms": dataset.terms}
        cases = dataset_cases(dataset, split, manifest)
    else:
        name, about = data_folder.resolve().name, {"kind": "cases"}
        cases = real_cases(data_folder, manifest)
        if paste:
            name, about = f"{name}, nodules pasted", {"kind": "pasted"}
            cases = pasted_cases(cases, count=paste)
    results, worst, device_name = measure(model, cases)
    if load_package(package_folder).digest != package.digest:
        raise UsageError(f"{package_folder} was changed while it was measured: the figures are of no package that is there")
    if not results:
        raise UsageError(f"{data_folder} holds no DICOM series and no *_image.nrrd")
    figures = plain({
        "name": name, "split": split, **about, "device": device_name, **summary(results, manifest),
        "worst": [{"case": f.case, "label": f.label, "kind": f.kind, "what": f.text, "slice": f.slice_index + 1} for f in worst],
    })  # fmt: skip
    figures = dict(figures)
    if split == "test":
        keep_figures(package_folder, name, figures)
        write_model_card(package_folder)
    if out is not None:
        write_report(out, package, figures, worst)
    return figures


def measure(model: Model, cases: Cases) -> tuple[list[Result], tuple[Failure, ...], str]:
    """Run the model on each case and compare; also the worst, and what it ran on."""
    loose = with_any_score(model)
    gallery = Gallery(model.manifest.inputs[0])
    results: list[Result] = []
    device = ""
    for name, read in track(list(cases), description="cases"):
        started = time.process_time()
        try:
            case = read()
        except NotEligible as refusal:
            results.append(Result(case=name, patient=name, attributes={}, refused=refusal.code))
            continue
        about = Result(
            case=name, patient=case.patient or name, attributes=case.attributes, of_its_kind=case.of_its_kind, complete=case.complete
        )
        try:
            findings = loose(case.volumes)
        except NotEligible as refusal:
            results.append(replace(about, refused=refusal.code))
            continue
        except AnalysisFailed as failure:
            results.append(replace(about, failed=str(failure)))
            continue
        device = findings.device
        result = replace(
            about, findings=reported(findings.findings, model.manifest), labels=compare(case, findings, model.manifest),
            slices=len(case.volume.voxels), spacing_mm=case.volume.spacing_mm, cpu_seconds=time.process_time() - started,
        )  # fmt: skip
        gallery.look(case, result)
        results.append(result)
    return results, gallery.worst, device


def with_any_score(model: Model) -> Model:
    """The same model with findings of any score: `matching.reported` gives of them what the model itself reports."""
    outputs = tuple(
        output.model_copy(update={"minimum_score": 0.0, "maximum_findings": max(output.maximum_findings, MOST_FINDINGS)})
        for output in model.manifest.outputs
    )
    update = {"outputs": outputs, "maximum_findings": max(model.manifest.maximum_findings, MOST_FINDINGS)}
    return replace(model, manifest=model.manifest.model_copy(update=update))  # type: ignore[type-var]  # every model is a frozen dataclass


def _refuse_other_split(package_folder: Path, dataset: DataSet) -> None:
    """Raise UsageError if the package was trained on another state of this data set: its patients may be among these."""
    file = package_folder / TRAINING
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    trained_on = record.get("dataset") or {}
    actual = hashlib.sha256((dataset.folder / DATASET).read_bytes()).hexdigest()
    if trained_on.get("name") == dataset.name and trained_on.get("sha256") != actual:
        raise UsageError(
            f"the package was trained on another state of the data set {dataset.name}: what was its training may be among these cases"
        )


def keep_figures(package_folder: Path, name: str, figures: Mapping[str, Any]) -> None:
    """Write the figures of one set into evaluation.json, beside those of other sets of this digest."""
    package = load_package(package_folder)
    file = package_folder / "evaluation.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if content.get("digest") != package.digest or content.get("schema") != SCHEMA:
        content = {}
    content = {
        "schema": SCHEMA, "package": package.manifest.name, "version": package.manifest.version, "digest": package.digest,
        "sets": {**content.get("sets", {}), name: figures},
    }  # fmt: skip
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
