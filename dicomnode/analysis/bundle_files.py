"""What a MONAI Bundle's own files say of it: `metadata.json` and the configuration for inference, as data.

Must never import torch or MONAI, nor import, evaluate or resolve anything that a bundle names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dicomnode.errors import PackageError

METADATA = "configs/metadata.json"
CONFIGS = ("configs/inference.json", "configs/inference.yaml", "configs/inference.yml")
JSON_BYTES = 8 * 2**20

_Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class About:
    """What a bundle says of itself."""

    folder: Path
    metadata: _Json
    config: _Json

    def text(self, *keys: str) -> str:
        """Return what the metadata says under these keys, "" where nothing."""
        return " ".join(str(self.metadata[key]) for key in keys if isinstance(self.metadata.get(key), str)).strip()

    def section(self, which: str) -> tuple[str, _Json]:
        """The entry of network_data_format.inputs or .outputs that this node uses: image or pred, else the first."""
        formats = self.metadata.get("network_data_format")
        found = formats.get(which) if isinstance(formats, dict) else None
        entries = {key: value for key, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}
        if not entries:
            raise PackageError(
                f"{METADATA} of the bundle {self.folder.name} has no network_data_format.{which}: bring a manifest (--manifest)."
            )
        key = "image" if "image" in entries else "pred" if "pred" in entries else next(iter(entries))
        return key, entries[key]

    @property
    def subject(self) -> str:
        """What the model is for, without the words that every model has."""
        text = f"{self.text('task') or self.text('name')}".lower()
        text = re.sub(r"\b(classification|detection|segmentation|classifier|model|images?|template|decathlon|ct|mri?|x-ray)\b", " ", text)
        return " ".join(text.split())


def is_bundle(folder: Path) -> bool:
    """Whether a folder is laid out as the Model Zoo's: a metadata.json, or a configuration for inference."""
    return any((folder / name).is_file() for name in (METADATA, *CONFIGS))


def libraries_of(folder: Path) -> tuple[str, ...]:
    """Return the libraries that a bundle's metadata names, as they are called when they are installed."""
    try:
        metadata = read_table(folder / METADATA, folder.name)
    except PackageError:
        return ()
    tables = (metadata.get(key) for key in ("required_packages_version", "optional_packages_version"))
    return tuple(dict.fromkeys(one_line(name, 64) for table in tables if isinstance(table, dict) for name in table))


def spacing_and_channels(folder: Path, config_name: str, preprocessing: str) -> tuple[tuple[float, float, float] | None, int]:
    """Return the grid (x, y, z in mm) that a bundle resamples to, None where it keeps the image's or doesn't say, and its channels."""
    try:
        config, metadata = read_table(folder / config_name, folder.name), read_table(folder / METADATA, folder.name)
        _, output = About(folder=folder, metadata=metadata, config=config).section("outputs")
    except PackageError:
        return None, 1
    channels = output.get("num_channels")
    spacing = None
    for step in steps_of([config.get(preprocessing), config.get("transforms")]):
        if str(step["_target_"]).endswith("Spacingd"):
            stated = step.get("pixdim")
            if isinstance(stated, str) and stated.startswith("@"):
                stated = config.get(stated[1:])
            found = re.findall(r"\d+(?:\.\d+)?", json.dumps(stated))[:3]
            values = [float(number) for number in found]
            spacing = (values[0], values[1], values[2]) if len(values) == 3 and all(value > 0 for value in values) else None
    return spacing, channels if isinstance(channels, int) and 0 < channels < 10_000 else 1


def window_of(folder: Path, config_name: str) -> tuple[tuple[int, int, int], float] | None:
    """Return the edges (x, y, z) of the windows that a bundle's inferer slides over an image, and their overlap, where both stand there."""
    try:
        inferer = read_table(folder / config_name, folder.name).get("inferer")
    except PackageError:
        return None
    size, overlap = (inferer.get("roi_size"), inferer.get("overlap", 0.25)) if isinstance(inferer, dict) else (None, None)
    if not (isinstance(size, list) and len(size) == 3 and all(isinstance(edge, int) and edge > 0 for edge in size)):
        return None
    return ((size[0], size[1], size[2]), overlap) if isinstance(overlap, float) and 0 <= overlap < 1 else None


def read_table(file: Path, name: str) -> _Json:
    """A JSON or YAML file as data."""
    try:
        content = file.read_bytes()
        if len(content) > JSON_BYTES:
            raise PackageError(f"{file.name} of the bundle {name} is larger than {JSON_BYTES // 2**20} MiB: that is no configuration.")
        found = json.loads(content) if file.suffix == ".json" else yaml.load(content, Loader=_Plain)  # noqa: S506  # our own SafeLoader
    except FileNotFoundError as error:
        raise PackageError(f"The bundle {name} has no {file.relative_to(file.parents[1])}: bring a manifest (--manifest).") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise PackageError(f"{file.name} of the bundle {name} cannot be read: {' '.join(str(error).split())[:200]}.") from error
    if not isinstance(found, dict):
        raise PackageError(f"{file.name} of the bundle {name} is no table.")
    return found


class _Plain(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML brings no types
    """YAML without aliases: a few lines of them can stand for more than fits into memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are refused")
        return super().compose_node(parent, index)


def steps_of(value: Any) -> Iterator[_Json]:
    """Yield every transform that stands in a section, wherever."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for inner in value.values():
            yield from steps_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from steps_of(inner)


def one_line(value: object, longest: int) -> str:
    """Return a value as one line of text that a manifest can hold."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"
