"""Write a trained network as a model package: a MONAI Bundle, the manifest, and a card that says what it is.

Must never put code into a bundle: the network is a MONAI class by name with plain arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from safetensors.torch import save_file

from dicomnode.analysis.manifest import InputSection
from dicomnode.analysis.package import Package, load_package
from dicomnode.errors import UsageError
from dicomnode.training.recipe import Recipe
from dicomnode.training.streams import KINDS


def write_package(recipe: Recipe, weights: Mapping[str, torch.Tensor], folder: Path, *, record: Mapping[str, Any] | None = None) -> Package:
    """Write the package of `recipe` with these weights into `folder`, over an earlier export, and load it again.

    Writes manifest.toml, bundle/configs/{metadata,inference}.json, bundle/models/model.safetensors, MODEL_CARD.md and, of `record`
    (how it was trained), training.json.

    Raises:
        UsageError: the folder holds something that is no package.
        PackageError: what was written is not a sound package.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.toml").exists():
        raise UsageError(f"{folder} holds something that is no model package; take an empty folder")
    (folder / "bundle" / "configs").mkdir(parents=True, exist_ok=True)
    (folder / "bundle" / "models").mkdir(parents=True, exist_ok=True)
    entries = recipe.package.model_dump(mode="json", by_alias=True, exclude_none=True)
    (folder / "manifest.toml").write_text(toml_of(entries), encoding="utf-8")
    network = {"_target_": f"monai.networks.nets.{recipe.network.name}", **recipe.network.arguments}
    _write_json(folder / "bundle" / "configs" / "inference.json", {"network_def": network})
    _write_json(folder / "bundle" / "configs" / "metadata.json", _metadata(recipe))
    # half precision: a few MB; copies, because MONAI's DynUNet names each of its tensors twice and training lays them out channels last
    halved = {
        name: (value.half() if value.is_floating_point() else value).cpu().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    file = folder / "bundle" / "models" / "model.safetensors"
    save_file(halved, file)
    file.chmod(0o644)  # safetensors writes it for its owner alone
    if record is not None:
        _write_json(folder / "training.json", record)
    write_model_card(folder)
    return load_package(folder)


def write_model_card(folder: Path) -> None:
    """Write MODEL_CARD.md from the manifest and, where there is one, evaluation.json."""
    manifest = load_package(folder).manifest
    file = folder / "evaluation.json"
    evaluation: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    output, accepts = manifest.outputs[0], manifest.inputs[0]
    lines = [
        f"# {manifest.title}: {manifest.name} {manifest.version}", "",
        f"**{manifest.intended_use}**", "",
        f"- Licence: {manifest.licence}",
        f"- Trained on: {manifest.training_data}",
        f"- Input: {_input_text(accepts)}",
        (f"- A voxel counts above {output.threshold}; a finding has {output.minimum_ml} ml or more and a score"
         f" (mean of its most certain quarter) of {output.minimum_score} or more"), "",
        "## Measured", "",
    ]  # fmt: skip
    if "structures" in evaluation:
        lines += _structure_lines(evaluation["structures"])
    else:
        lines += _phantom_lines(evaluation["phantoms"]) if "phantoms" in evaluation else ["Not evaluated yet.", ""]
    lines += _case_lines(evaluation["cases"]) if "cases" in evaluation else []
    lacking = _LACKING.get(accepts.region, "disease")
    lines += [
        "## Limits", "",
        f"- Synthetic training: what the phantoms lack ({lacking}, surgery, metal, motion, children) it has never seen.",
        "- Figures on phantoms say nothing about patients; the few real cases are examples, no performance claim.",
        *(f"- {limit}" for limit in _LIMITS.get(accepts.region, ())),
        "- The score is no probability of disease.", "",
    ]  # fmt: skip
    (folder / "MODEL_CARD.md").write_text("\n".join(lines), encoding="utf-8")


def toml_of(entries: Mapping[str, Any]) -> str:
    """Write nested tables as TOML: plain values first, then tables, then arrays of tables; tables inside those stand inline."""
    lines = [f"{key} = {_toml_value(value)}" for key, value in entries.items() if not _is_section(value)]
    for key, value in entries.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{key}]", *(f"{name} = {_toml_value(inner)}" for name, inner in value.items())]
    for key, value in entries.items():
        if _is_section(value) and not isinstance(value, Mapping):
            for row in value:
                lines += ["", f"[[{key}]]", *(f"{name} = {_toml_value(inner)}" for name, inner in row.items())]
    return "\n".join(lines) + "\n"


def _is_section(value: object) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def _toml_value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are written alike in both


def _metadata(recipe: Recipe) -> dict[str, Any]:
    """metadata.json as MONAI's schema has it."""
    manifest, kind = recipe.package, KINDS[recipe.data.kind]
    modality = manifest.inputs[0].modalities[0]
    patch = list(manifest.inference.window if manifest.inference else ())
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": manifest.version,
        "changelog": {manifest.version: kind.change},
        "monai_version": str(monai.__version__),
        "pytorch_version": str(torch.__version__),
        "numpy_version": str(np.__version__),
        "required_packages_version": {},
        "task": manifest.title,
        "description": manifest.title,
        "authors": manifest.manufacturer,
        "copyright": f"Copyright {manifest.manufacturer} contributors",
        "data_source": manifest.training_data,
        "data_type": "DICOM",
        "image_classes": f"one channel, {kind.scaling(recipe.data)} scaled to 0..1",
        "label_classes": "; ".join(f"channel {output.channel}: {output.label}" for output in manifest.outputs),
        "intended_use": manifest.intended_use,
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image", "format": kind.image_format, "modality": modality,
                    "num_channels": 1, "spatial_shape": patch,
                    "dtype": "float32", "value_range": [0, 1], "is_patch_data": True, "channel_def": {"0": "image"},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image", "format": "segmentation", "num_channels": len(manifest.outputs), "spatial_shape": patch,
                    "dtype": "float32", "value_range": [0, 1], "is_patch_data": True,
                    "channel_def": {str(output.channel): output.label for output in manifest.outputs},
                }
            },
        },
    }  # fmt: skip


_LACKING = {  # in the phantoms of a region, beside what is lacking in all of them
    "lung": "pneumonia, effusion, fibrosis",
    "chest-radiograph": "pneumonia, effusion, collapse",
    "head": "tumours, bleeding, atrophy",
}
_LIMITS = {  # by the region that the manifest asks for
    "lung": ["A mass that fills much of a lung may lie outside the lung region and be missed or marked in part."],
    "chest-radiograph": [
        "What is no chest was of the same kinds in training and in this table; the gate refuses some chests of unusual framing."
    ],
    "head": [
        (
            "The gate's rule against bodies that are no head was set after the ones of this table, all of one shape, had been accepted: "
            "zero is no measurement, and a bottle that is longer than wide is likely to pass."
        )
    ],
}


def _input_text(accepts: InputSection) -> str:
    what, pixels = "/".join(accepts.modalities), f"pixels of {_range(accepts.pixel_spacing_mm)} mm"
    if accepts.dimensions == 2:
        return f"{what}, one projection; {pixels}"
    return f"{what}, {accepts.minimum_slices} slices or more, {_range(accepts.slice_spacing_mm)} mm apart; {pixels}"


def _structure_lines(measured: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {row['label']} | {row['median_dice']} | {row['lowest_dice']} | {row['median_size_error_percent']} % |"
        for row in measured["structures"]
    ]
    return [
        (f"On {measured['scans']} phantoms never used before, {measured['others']} of them of something else:"
         f" {measured['wrongly_refused']} wrongly refused, {measured['wrongly_accepted']} wrongly accepted."), "",
        "| structure | median Dice | lowest Dice | median error of the size |", "|---|---|---|---|", *rows, "",
        "No outlines of real images were at hand: there are no figures on patients.", "",
    ]  # fmt: skip


def _phantom_lines(phantoms: Mapping[str, Any]) -> list[str]:
    rows = [f"| {_range(row['diameter_mm'])} | {row['nodules']} | {row['found']} |" for row in phantoms["by_size"]]
    return [
        (f"On {phantoms['scans']} synthetic chests never used before, {phantoms['clear_scans']} without nodules:"
         f" {phantoms['found']} of {phantoms['nodules']} nodules found, {phantoms['false_findings_per_scan']} false findings a scan."), "",
        "| diameter (mm) | nodules | found |", "|---|---|---|", *rows, "",
        (f"Of those found: median Dice {phantoms['median_dice']}, median error of the volume {phantoms['median_volume_error_percent']} %"
         f" (absolute {phantoms['median_absolute_volume_error_percent']} %)."), "",
    ]  # fmt: skip


def _case_lines(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["On real cases, one by one (never trained on, and no threshold was chosen on them):", ""]
    for case in cases:
        if "refused" in case:
            lines.append(f"- {case['case']}: not analysed ({case['refused']})")
            continue
        known = "; ".join(_known_text(nodule) for nodule in case["known"]) or "no nodule is known"
        lines.append(f"- {case['case']}: {known}; other findings: {case['other_findings']}")
    return [*lines, ""]


def _known_text(nodule: Mapping[str, Any]) -> str:
    found, nodule_text = nodule["found"], f"the known nodule of {nodule['diameter_mm']:g} mm"
    if found is None:
        return f"{nodule_text} was missed"
    return f"{nodule_text} was found {found['distance_mm']:g} mm from its centre, {found['volume_ml']:g} ml"


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g} to {values[1]:g}"


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
