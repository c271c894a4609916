"""MODEL_CARD.md: what a package is, from its manifest, and what was measured, from evaluation.json and the record of its training.

Must never say what neither of them says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dicomnode.analysis.manifest import InputSection, Manifest, OutputSection
from dicomnode.analysis.package import load_package

FEW = 30  # cases of which a figure is an example
TRAINING = "training.json"  # the record of a training, where there is one
_Figures = Mapping[str, Any]


def write_model_card(folder: Path) -> None:
    """Write MODEL_CARD.md from the manifest and, where there are, evaluation.json (schema 2) and training.json."""
    package = load_package(folder)
    manifest = package.manifest
    evaluation = _json(folder / "evaluation.json")
    sets: Mapping[str, _Figures] = evaluation.get("sets", {}) if evaluation.get("digest") == package.digest else {}
    training = training_text(_json(folder / TRAINING))
    lines = [
        f"# {manifest.title}: {manifest.name} {manifest.version}", "",
        f"**{manifest.intended_use}**", "",
        f"- Licence: {manifest.licence}",
        f"- Trained on: {manifest.training_data}",
        *([f"- Terms of these data: {manifest.data_terms}"] if manifest.data_terms else []),
        *(f"- Input: {input_text(accepts)}" for accepts in manifest.inputs),
        *(f"- {output_text(output, manifest)}" for output in manifest.outputs),
        *([f"- Training: {training}"] if training else []), "",
        "## Measured", "",
    ]  # fmt: skip
    if sets:
        lines += ["Intervals are of 95 %. Cases that were refused or failed are in no figure but their own.", ""]
    for figures in sets.values():
        lines += set_lines(figures)
    lines += [] if sets else ["Not evaluated yet.", ""]
    lines += [
        "## Real cases that were looked at while it was made", "",
        *([f"- {case}" for case in manifest.looked_at] or ["None is named in its manifest."]), "",
        "## Limits", "",
        *(f"- {limit}" for limit in manifest.limits),
        *_general_limits(sets, manifest), "",
    ]  # fmt: skip
    (folder / "MODEL_CARD.md").write_text("\n".join(lines), encoding="utf-8")


def input_text(accepts: InputSection) -> str:
    """What one input takes."""
    what, pixels = "/".join(accepts.modalities), f"pixels of {_range(accepts.pixel_spacing_mm)} mm"
    name = "" if accepts.name == "image" else f"{accepts.name}{' (may be absent)' if accepts.optional else ''}: "
    if accepts.dimensions == 2:
        return f"{name}{what}, one projection; {pixels}"
    return f"{name}{what}, {accepts.minimum_slices} slices or more, {_range(accepts.slice_spacing_mm)} mm apart; {pixels}"


def output_text(output: OutputSection, manifest: Manifest) -> str:
    """When one output says something."""
    if manifest.kind == "classification":
        return f"{output.label}: said of a study above {output.threshold:g}"
    if manifest.kind == "detection":
        return f"{output.label}: boxes with a score of {output.minimum_score:g} or more"
    least = f"{output.minimum_mm2:g} mm²" if manifest.inputs[0].dimensions == 2 else f"{output.minimum_ml:g} ml"
    box = "the box around what" if output.shape == "box" else "what"
    rule, whole = output.image_score, ""
    if rule is not None:
        whole = (
            f". An image is positive above {rule.threshold:g}, by a calibration on the share of its region above {rule.above:g};"
            " below, nothing in it is a finding"
        )
    return (
        f"{output.label}: a voxel counts above {output.threshold:g}; a finding is {box} has {least} or more and a score"
        f" (mean of its most certain quarter) of {output.minimum_score:g} or more{whole}"
    )


def spread_text(spread: _Figures | None, digits: int = 2, unit: str = "") -> str:
    """A median with its interval, and the mean with its own."""
    if spread is None:
        return "-"
    return (
        f"{number(spread['median'], digits)}{unit} {interval(spread['median_interval'], digits)},"
        f" mean {number(spread['mean'], digits)}{unit} {interval(spread['mean_interval'], digits)}"
    )


def interval(values: Sequence[float] | None, digits: int = 2) -> str:
    """An interval in brackets; of too few cases a word."""
    return "[too few]" if values is None else f"[{number(values[0], digits)} to {number(values[1], digits)}]"


def number(value: float | None, digits: int = 2) -> str:
    """A number for people."""
    return "-" if value is None else f"{value:.{digits}f}"


def share(hits: int, count: int, bounds: Sequence[float] | None) -> str:
    """So many of so many, with the interval of the share."""
    return f"{hits} of {count}" + ("" if bounds is None else f" {interval(bounds)}")


def set_lines(figures: _Figures) -> list[str]:
    """The figures of one set of cases as lines of Markdown."""
    kind = {
        "phantoms": "phantoms never used before", "dataset": "cases of a data set", "cases": "real cases",
        "pasted": "scans made of real ones",
    }[figures["kind"]]  # fmt: skip
    lines = [f"### {figures['name']}: {figures['scans']} {kind}", ""]
    if figures.get("terms"):
        lines += [f"Terms of these data: {figures['terms']}", ""]
    lines += [_refusal_line(figures), ""]
    lines += [line for row in figures["segmentation"] for line in _segmentation_lines(row)]
    lines += [line for row in figures["lesions"] for line in _lesion_lines(row)]
    lines += [line for row in figures["scores"] for line in _score_lines(row)]
    if figures["scans"] < FEW:
        lines += [line for row in figures["cases"] for line in _case_lines(row)] if figures["kind"] == "cases" else []
        lines += [f"Fewer than {FEW} cases are examples, no claim of performance.", ""]
    return lines


def _refusal_line(figures: _Figures) -> str:
    refused = "; ".join(f"{row['case']} ({row['code']})" for row in figures["refused"] if row["of_its_kind"])
    text = f"{figures['analysed']} analysed, {len(figures['refused'])} refused, {len(figures['failed'])} failed"
    if figures["others"]:
        text += f"; {figures['others']} were of something else, of which {figures['wrongly_accepted']} were wrongly accepted"
    return text + (f". Wrongly refused: {refused}." if refused else ".")


def _segmentation_lines(row: _Figures) -> list[str]:
    limits = row["limits_of_agreement"]
    return [
        f"**{row['label']}**, outline ({row['cases']} cases, {row['nothing_marked']} of them with nothing marked)", "",
        "| measure | median, mean |", "|---|---|",
        f"| Dice | {spread_text(row['dice'], 3)} |",
        f"| lowest Dice | {number(row['dice'] and row['dice']['lowest'], 3)} |",
        f"| 95th percentile Hausdorff distance (mm) | {spread_text(row['hd95_mm'], 1)} |",
        f"| average surface distance (mm) | {spread_text(row['average_surface_distance_mm'], 2)} |",
        f"| error of the size ({row['unit']}) | {spread_text(row['size_error'], 1)} |",
        f"| error of the size (%) | {spread_text(row['size_error_percent'], 1)} |",
        *([f"| limits of agreement ({row['unit']}) | {number(limits['low'], 1)} to {number(limits['high'], 1)} |"] if limits else []), "",
        *([f"Where the reference is empty ({row['empty_references']}) something was marked in {row['marked_though_empty']}.", ""]
          if row["empty_references"] else []),
    ]  # fmt: skip


def _lesion_lines(row: _Figures) -> list[str]:
    if not row["lesions"] and not row["complete_scans"]:
        return []
    text = f"**{row['label']}**, lesion by lesion, findings with a score of {row['minimum_score']:g} or more: "
    text += f"{share(row['found'], row['lesions'], row['sensitivity_interval'])} found"
    if row["complete_scans"]:
        text += (
            f", {number(row['false_findings_per_scan'])} {interval(row['false_findings_per_scan_interval'])} false findings a scan"
            f" (in {row['clear_scans']} scans without a lesion: {number(row['false_findings_per_clear_scan'])})"
        )
    lines = [f"{text}.", ""]
    if row["lesions"]:
        sizes = [size for size in row["by_size"] if size["lesions"]]
        lines += ["| diameter (mm) | found |", "|---|---|"]
        lines += [f"| {bin_text(size['diameter_mm'])} | {share(size['found'], size['lesions'], size['interval'])} |" for size in sizes]
        lines += [""]
    if row["froc"]:
        rates = " | ".join(f"{rate:g}" for rate in row["froc"]["false_findings_per_scan"])
        values = " | ".join(number(value) for value in row["froc"]["sensitivity"])
        lines += [
            f"| false findings a scan | {rates} |", "|---" * 8 + "|", f"| sensitivity | {values} |", "",
            f"Mean of these: {number(row['froc']['mean_sensitivity'])} {interval(row['froc']['mean_sensitivity_interval'])}.", "",
        ]  # fmt: skip
    outlines = row["found_outlines"]
    if outlines["dice"]:
        lines += [
            (f"Of {outlines['dice']['n']} found: Dice {spread_text(outlines['dice'], 3)};"
             f" error of the size {spread_text(outlines['size_error_percent'], 1, ' %')}."), "",
        ]  # fmt: skip
    if row["calibration"]:
        lines += [f"Scores of findings: {_calibration(row['calibration'])}.", ""]
    return lines


def _score_lines(row: _Figures) -> list[str]:
    lines = [f"**{row['label']}**, said of the whole study ({row['positive']} with, {row['negative']} without): "]
    if row["auc"] is not None:
        lines[0] += f"AUC {number(row['auc'], 3)} {interval(row['auc_interval'], 3)} ({row['auc_method']}); "
    lines[0] += (
        f"at {row['threshold']:g} sensitivity {number(row['sensitivity'])} {interval(row['sensitivity_interval'])},"
        f" specificity {number(row['specificity'])} {interval(row['specificity_interval'])}"
    )
    lines[0] += f"; {_calibration(row['calibration'])}." if row["calibration"] else "."
    return [*lines, ""]


def _calibration(row: _Figures) -> str:
    return f"expected calibration error {number(row['expected_calibration_error'])}, Brier {number(row['brier'])} (n = {row['n']})"


def _case_lines(row: _Figures) -> Iterator[str]:
    if "refused" in row or "failed" in row:
        yield f"- {row['case']}: not analysed ({row.get('refused') or row.get('failed')})"
        return
    for label, each in row["labels"].items():
        known = "; ".join(_known_text(lesion, label) for lesion in each["known"]) or "no lesion is known"
        yield f"- {row['case']}: {known}; other findings of {label}: {len(each['other_findings'])}"
    if not row["labels"]:
        said = "; ".join(f"{finding['label']} {number(finding['score'])}" for finding in row["findings"]) or "nothing"
        yield f"- {row['case']}: nothing is known; found: {said}"
    yield ""


def _known_text(lesion: _Figures, label: str) -> str:
    found, what = lesion["found"], f"the known {label} of {lesion['diameter_mm']:.1f} mm"
    if found is None:
        return f"{what} was missed"
    away = "" if found["distance_mm"] is None else f" {found['distance_mm']:.1f} mm from its centre"
    dice = "" if found["dice"] is None else f", Dice {found['dice']:.2f}"
    return f"{what} was found{away}, {found['volume_ml']:.2f} ml{dice}"


def training_text(record: _Figures) -> str:
    """How a package was trained, from training.json; empty without one."""
    if not record:
        return ""
    exported = "" if record.get("exported_step") is None else f", exported at step {record['exported_step']}"
    data = record.get("dataset")
    on = "" if not data else f" on the data set {data['name']} (dataset.json {data['sha256'][:12]})"
    skipped = f", {record['skipped_steps']} skipped because numbers were not finite" if record.get("skipped_steps") else ""
    steps = f"{record.get('steps_done', '?')} steps from the seed {record.get('seed', '?')}"
    return f"{steps}{on}{exported}{skipped}; computed on {record.get('computed_on', '?')}"


def _general_limits(sets: Mapping[str, _Figures], manifest: Manifest) -> list[str]:
    kinds = {figures["kind"] for figures in sets.values()}
    lines = ["- Figures on phantoms say nothing about patients."] if "phantoms" in kinds else []
    calibrated = "No score is a probability of disease, however well it is calibrated on these cases."
    return [*lines, f"- {calibrated}"] if any(output.finding for output in manifest.outputs) else lines


def bin_text(bounds: Sequence[float | None]) -> str:
    """From where to where, where the last bin may have no end."""
    low, high = bounds
    return f"{low:g} and more" if high is None else f"{low:g} to {high:g}"


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g} to {values[1]:g}"


def _json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return content
