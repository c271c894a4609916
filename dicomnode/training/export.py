"""Write a trained network as a model package: a MONAI Bundle, the manifest and the card.

Must never put a script into a bundle: its network is a MONAI class by name with plain arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from safetensors.torch import save_file

from dicomnode.analysis.package import Package, load_package
from dicomnode.analysis.preparation import FROM_0_TO_1, STRONGEST
from dicomnode.errors import UsageError
from dicomnode.training.card import write_model_card
from dicomnode.training.detection import bundle_config, manifest_of
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
    if recipe.package.kind == "detection":
        manifest, config = manifest_of(recipe), bundle_config(recipe)
    else:
        network = {"_target_": f"monai.networks.nets.{recipe.network.name}", **recipe.network.arguments}
        manifest, config = recipe.package, {"network_def": network}
    entries = manifest.model_dump(mode="json", by_alias=True, exclude_none=True)
    (folder / "manifest.toml").write_text(toml_of(entries), encoding="utf-8")
    _write_json(folder / "bundle" / "configs" / "inference.json", config)
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


_ANSWERS = {  # type and format in metadata.json
    "segmentation": {"type": "image", "format": "segmentation"},
    "classification": {"type": "probabilities", "format": "classes"},
    "detection": {"type": "object", "format": "dict"},
}


def _metadata(recipe: Recipe) -> dict[str, Any]:
    """metadata.json as MONAI's schema has it."""
    manifest, kind = recipe.package, KINDS[recipe.data.kind]
    modality = manifest.inputs[0].modalities[0]
    patch = list(manifest.inference.window if manifest.inference else ())
    names = [accepts.name for accepts in manifest.inputs]
    intensity = manifest.preprocessing.intensity if manifest.preprocessing is not None else "window"
    span = [0, 1] if intensity in FROM_0_TO_1 else [-STRONGEST, STRONGEST] if intensity == "local-contrast" else [-8, 8]
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
        "image_classes": f"{', '.join(names)}: {kind.scaling(recipe.data)}{' scaled to 0..1' if intensity in FROM_0_TO_1 else ''}",
        "label_classes": "; ".join(f"channel {output.channel}: {output.label}" for output in manifest.outputs),
        "intended_use": manifest.intended_use,
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image", "format": kind.image_format, "modality": modality,
                    "num_channels": len(names), "spatial_shape": patch,
                    "dtype": "float32", "value_range": span, "is_patch_data": True,
                    "channel_def": {str(number): name for number, name in enumerate(names)},
                }
            },
            "outputs": {
                "pred": {
                    **_ANSWERS[manifest.kind], "num_channels": len(manifest.outputs),
                    "spatial_shape": patch if manifest.kind == "segmentation" else [1, len(manifest.outputs)],
                    "dtype": "float32", "value_range": [0, 1], "is_patch_data": manifest.kind == "segmentation",
                    "channel_def": {str(output.channel): output.label for output in manifest.outputs},
                }
            },
        },
    }  # fmt: skip


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
