"""A first manifest for a MONAI Bundle as the Model Zoo ships it, from `metadata.json` and what its configuration says as data.

Whatever the bundle doesn't say stands in `decide`: what a person must settle before the model is used. Must never import torch or
MONAI, nor import, evaluate or resolve anything that a bundle names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dicomnode.analysis.bundle_files import CONFIGS, METADATA, About, one_line, read_table, steps_of
from dicomnode.analysis.manifest import Manifest
from dicomnode.analysis.terms import NORMAL, Term, find_abnormal, is_background, is_negative, term_of
from dicomnode.errors import PackageError
from dicomnode.findings import Code

LICENCES = ("LICENSE", "LICENSE.txt", "docs/license.txt", "docs/LICENSE")
RESEARCH = "RESEARCH USE ONLY. Not for diagnosis."

Kind = Literal["segmentation", "detection", "classification"]
_Json = dict[str, Any]

_MODALITIES = {
    "ct": "CT", "computed tomography": "CT", "mr": "MR", "mri": "MR", "magnetic resonance": "MR", "x-ray": "XR", "xray": "XR", "xr": "XR",
    "cxr": "XR", "dx": "XR", "cr": "XR", "radiograph": "XR", "chest x-ray": "XR", "mammogram": "MG", "mammography": "MG", "mg": "MG",
}  # fmt: skip
_VALUES = {"CT": ["CT"], "MR": ["MR"], "XR": ["CR", "DX"], "MG": ["MG"]}
_SOP_CLASSES = {
    "CT": ["1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"],  # CT, Enhanced, Legacy Converted
    "MR": ["1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4"],
    "XR": ["1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1"],  # CR, Digital X-Ray For Presentation
    "MG": ["1.2.840.10008.5.1.4.1.1.1.2"],  # Digital Mammography X-Ray For Presentation
}
_CONTRASTS = {
    "t1c": "t1c", "t1ce": "t1c", "t1gd": "t1c", "t1 gd": "t1c", "t1wce": "t1c", "t1w ce": "t1c", "t1 c": "t1c", "t1 ce": "t1c",
    "t1 post": "t1c", "t1post": "t1c", "t1": "t1", "t1w": "t1", "t1n": "t1", "t2": "t2", "t2w": "t2", "flair": "flair", "t2f": "flair",
    "t2 flair": "flair", "fla": "flair", "pd": "pd", "pdw": "pd", "adc": "adc", "dwi": "diffusion", "hbv": "diffusion",
    "high b": "diffusion", "trace": "diffusion", "swi": "susceptibility",
}  # fmt: skip
_LICENCES = {
    r"Apache License\s+Version 2\.0": "Apache-2.0",
    r"MIT License|Permission is hereby granted, free of charge": "MIT",
    r"Redistribution and use in source and binary forms": "BSD",
    r"Attribution-NonCommercial-ShareAlike 4\.0": "CC-BY-NC-SA-4.0",
    r"Attribution-NonCommercial 4\.0": "CC-BY-NC-4.0",
    r"Attribution-ShareAlike 4\.0": "CC-BY-SA-4.0",
    r"Attribution 4\.0": "CC-BY-4.0",
    r"NCLS|NVIDIA": "NVIDIA licence: see LICENSE",
}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A manifest that is sound, and its text as a file."""

    manifest: Manifest
    text: str


def draft_manifest(folder: Path) -> Draft:
    """Write the manifest of the bundle in `folder`, as far as its files say what it holds.

    Raises:
        PackageError: its metadata can't be read, or it is a model that makes no findings on CT, MR or X-ray.
    """
    metadata = read_table(folder / METADATA, folder.name)
    config_name = next((name for name in CONFIGS if (folder / name).is_file()), None)
    if config_name is None:
        raise PackageError(f"The bundle {folder.name} has none of {', '.join(CONFIGS)}: without one nobody knows how it is run.")
    about = About(folder=folder, metadata=metadata, config=read_table(folder / config_name, folder.name))
    decide: list[str] = []
    kind = _kind(about)
    inputs = _inputs(about, decide)
    outputs = _outputs(about, kind, decide)
    entries: _Json = {
        "schema": 1,
        "name": _word(folder.name, "bundle"),
        "version": _word(str(metadata.get("version") or ""), "0"),
        "title": one_line(metadata.get("name") or metadata.get("task") or folder.name, 64),
        "manufacturer": one_line(metadata.get("authors") or "unknown", 64),
        "algorithm_name": one_line(folder.name, 64),
        "licence": _licence(about),
        "intended_use": one_line(f"{RESEARCH} {about.text('intended_use')}", 1024),
        "training_data": one_line(about.text("data_source") or "The bundle doesn't say.", 1024),
        "kind": kind,
        "maximum_findings": 50,
        "decide": _decisions(kind, outputs, decide),
        "inputs": inputs,
        "bundle": _bundle(about, config_name),
        "outputs": outputs,
    }
    return Draft(manifest=Manifest.model_validate(entries), text=_HEAD + as_toml(entries))


_HEAD = """\
# A draft from the bundle's metadata.json. Lines of `decide` say what a person must still settle:
# edit this file, take a line away when it is settled, give it a new version and add the bundle again with --manifest.
"""


def _kind(about: About) -> Kind:
    key, output = about.section("outputs")
    made, form = str(output.get("type", "")).lower(), str(output.get("format", "")).lower()
    said = about.text("task", "name", "description").lower()
    shape = output.get("spatial_shape")
    is_flat = isinstance(shape, list) and (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1))
    if made == "object" or form in ("dict", "box", "boxes", "bounding box", "detection") or "detector" in about.config:
        return "detection"
    if made in ("probabilities", "probability", "classes") or form in ("classes", "classification", "class") or is_flat:
        return "classification"
    if form in ("segmentation", "labels", "label", "mask", "binary", "binary segmentation") or ("segment" in said and made == "image"):
        return "segmentation"
    raise PackageError(
        f"The bundle {about.folder.name} gives {made or 'something'} of the format {form or 'unknown'} ({key}): this node reports"
        " segmentations, detections and classifications."
    )


def _modality(about: About) -> str:
    _, image = about.section("inputs")
    stated = str(image.get("modality", "")).strip().lower()
    found = _MODALITIES.get(stated)
    if found is None:
        said = f"{stated} {about.text('task', 'name', 'description', 'image_classes').lower()}"
        found = next((value for word, value in _MODALITIES.items() if re.search(rf"\b{re.escape(word)}\b", said)), None)
    if found is None or str(image.get("format", "")).lower() in ("rgb", "bgr"):
        kind_of_images = f"is for images of the modality {stated}" if stated else "doesn't say of which modality its images are"
        raise PackageError(
            f"The bundle {about.folder.name} {kind_of_images}: this node analyses CT, MR and X-ray."
            " Bring a manifest (--manifest) if it is one of them."
        )
    if found == "XR" and re.search(r"mammogra", about.text("task", "name", "description").lower()):
        return "MG"
    return found


def _enabled_steps(about: About) -> Iterator[_Json]:
    """The transforms of the configuration without those that it turns off, as far as its own values say so."""
    for step in steps_of(about.config):
        off = step.get("_disabled_", False)
        name = off[1:] if isinstance(off, str) and off.startswith("@") else ""
        off = about.config.get(name, off) if name else off
        negated = re.fullmatch(r"\$\(?\s*not @(\w+)\s*\)?", off) if isinstance(off, str) else None
        if negated:
            off = not about.config.get(negated[1])
        if off is not True:
            yield step


_ADDS_CHANNELS = re.compile(r"(^|\.)(AddGuidanceSignal|AddExtremePointsChannel|AddInitialSeedPoint|AddRandomGuidance)\w*$")


def _inputs(about: About, decide: list[str]) -> list[_Json]:
    _, image = about.section("inputs")
    modality = _modality(about)
    dimensions = _dimensions(about, image)
    if dimensions == 2 and modality in ("CT", "MR"):
        raise PackageError(
            f"The bundle {about.folder.name} looks at single slices of {modality}: this node runs networks of whole volumes."
        )
    resampled = any(re.search(r"(^|\.)(Spacing|ResampleToMatch)(d|D|Dict)?$", str(step["_target_"])) for step in _enabled_steps(about))
    if dimensions == 3 and not resampled and re.search(r"\d\s*mm\b", about.text("image_classes")):
        decide.append(
            f"inputs: the bundle resamples nothing and was made for {one_line(about.text('image_classes'), 200)!r}: narrow pixel_spacing_mm"
            " and slice_spacing_mm to that"
        )
    named = image.get("channel_def")
    channels = [str(label) for _, label in _numbered(named)] if isinstance(named, dict) else []
    count = image["num_channels"] if isinstance(image.get("num_channels"), int) else max(1, len(channels))
    shared = {"modalities": _VALUES[modality], "sop_classes": _SOP_CLASSES[modality], "dimensions": dimensions}
    if dimensions == 3:
        shared |= {"minimum_slices": 8, "slice_spacing_mm": [0.1, 20.0], "pixel_spacing_mm": [0.05, 5.0]}
    else:
        shared |= {"pixel_spacing_may_be_absent": True}
    weightings = [_CONTRASTS.get(" ".join(re.sub(r"[^a-z0-9]+", " ", label.lower()).split()), "") for label in channels]
    if modality == "MR" and count > 1 and len(channels) == count and all(weightings) and len(set(weightings)) == count:
        return [{"name": weighting, **shared, "mr_contrasts": [weighting]} for weighting in weightings]
    clicks = any(_ADDS_CHANNELS.search(str(step["_target_"])) for step in steps_of(about.config))
    if count > 1 and dimensions == 3 and len(channels) == 1 and clicks:
        count = 1  # the bundle's own steps add the others to the image: maps of clicks, of which there are none here
        decide.append("inputs: the bundle's own steps add channels for a person's clicks to the image; here they stay empty")
    if count > 1 and dimensions == 3:
        raise PackageError(
            f"The bundle {about.folder.name} wants {count} channels of {modality} that its metadata doesn't tell apart"
            f" ({', '.join(channels) or 'no channel_def'}): bring a manifest (--manifest) with an input for each."
        )
    if count > 1:
        decide.append(f"inputs: the network wants {count} channels and is given the one gray image in each of them")
    if modality == "MR":
        words = re.findall(r"[a-z0-9]+", about.text("task", "description", "image_classes").lower())
        said = {_CONTRASTS[word] for word in words if word in _CONTRASTS}
        if len(said) == 1:
            [weighting] = said
            decide.append(f"inputs: mr_contrasts; the bundle's description speaks of {weighting} and of no other weighting")
            return [{"name": "image", **shared, "mr_contrasts": [weighting]}]
        decide.append('inputs: which weighting the series must have, e.g. mr_contrasts = ["t2"]; any is accepted')
    return [{"name": "image", **shared}]


def _dimensions(about: About, image: _Json) -> int:
    if any(str(step["_target_"]).rpartition(".")[2] == "SliceInferer" for step in steps_of(about.config.get("inferer"))):
        return 3  # a network of slices, and an inferer that takes it through a volume
    shape = image.get("spatial_shape")
    network = about.config.get("network_def")
    stated = network.get("spatial_dims") if isinstance(network, dict) else None
    stated = stated if stated in (2, 3) else about.config.get("spatial_dims")
    if stated in (2, 3):
        return int(stated)
    return 2 if isinstance(shape, list) and len(shape) == 2 else 3


def _outputs(about: About, kind: Kind, decide: list[str]) -> list[_Json]:
    labels = _labels(about, kind, decide)
    softmax = _is_softmax(about, labels)
    outputs: list[_Json] = []
    unknown: list[str] = []
    vague: list[str] = []
    for channel, label in labels:
        negative = kind == "classification" and is_negative(label)
        term = term_of(label, context=about.subject)
        if negative:
            term = Term(category=term.category, type=NORMAL, site=None, side=None, exact=True)
        if not term.exact:
            (vague if term.type.value != "85756007" else unknown).append(label)
        outputs.append(_output(channel, label, term, kind) | {"activation": "softmax" if softmax else "sigmoid"})
        if kind == "classification":
            outputs[-1] |= {"finding": not negative}
        if kind == "detection":
            outputs[-1] |= {"minimum_score": _box_threshold(about)}
        outputs[-1] |= {"colour_cielab": [70.0, 60.0, 60.0] if term.is_abnormal else _colour(len(outputs))}
    if unknown:
        decide.append(f"outputs: no code is known for {_some(unknown)}: they are coded as Tissue, which says nothing")
    if vague:
        decide.append(f"outputs: the codes of {_some(vague)} say less than the labels")
    return outputs


def _output(channel: int, label: str, term: Term, kind: Kind) -> _Json:
    each = kind == "segmentation" and term.is_abnormal
    output: _Json = {"channel": channel, "label": one_line(label, 64), "threshold": 0.5, "components": "each" if each else "one"}
    if each:
        output |= {"minimum_ml": 0.03}
    output |= {"category": _entry(term.category), "type": _entry(term.type)}
    if term.site is not None:
        output |= {"site": _entry(term.site)}
    if term.side is not None:
        output |= {"side": term.side}
    return output


def _labels(about: About, kind: Kind, decide: list[str]) -> list[tuple[int, str]]:
    """The outputs that mean something, by channel."""
    _, output = about.section("outputs")
    named = next((output[key] for key in ("channel_def", "label_def", "class_def") if isinstance(output.get(key), dict)), None)
    labels = list(_numbered(named)) if named is not None else []
    count = output["num_channels"] if isinstance(output.get("num_channels"), int) else len(labels)
    if kind == "detection" and not labels:
        said = find_abnormal(about.text("task")) or find_abnormal(about.text("name", "description")) or "lesion"
        decide.append(f"outputs: the bundle names no classes; its boxes are called {said!r} after what it is for")
        return [(number, said.capitalize() if count <= 1 else f"{said} {number}") for number in range(max(1, count))]
    if not labels:
        pairs = re.findall(r"(?:^|[,;.]|\bchannel)\s*(\d+)\s*(?:is|for|:|=)?\s*([A-Za-z][A-Za-z _-]*)", about.text("pred_classes") or "")
        labels = [(int(number), label.strip()) for number, label in pairs] or [(i, f"label {i}") for i in range(max(1, count))]
        decide.append("outputs: the bundle has no channel_def; the labels are taken from its description or are mere numbers")
    chosen = [(channel, label) for channel, label in labels if kind == "classification" or not is_background(label)]
    if not chosen:
        raise PackageError(f"{METADATA} of the bundle {about.folder.name} names no output but background: nothing could be found.")
    if len(labels) > count > 1:
        decide.append(f"outputs: channel_def names {len(labels)} labels and num_channels says {count}")
    return chosen


def _is_softmax(about: About, labels: list[tuple[int, str]]) -> bool:
    """Whether the channels exclude one another, as the postprocessing shows, else as a background among the channels does."""
    steps = list(steps_of(about.config.get("postprocessing")))
    if any(step.get("sigmoid") is True for step in steps):
        return False
    if any(step.get("softmax") is True or step.get("argmax") in (True, [True], [True, False]) for step in steps):
        return True
    if any(isinstance(step.get("threshold"), int | float) and not isinstance(step.get("threshold"), bool) for step in steps):
        return False
    _, output = about.section("outputs")
    return 0 not in {channel for channel, _ in labels} and output.get("num_channels") != 1


def _box_threshold(about: About) -> float:
    found = re.search(r"score_thresh\s*=\s*([0-9.]+)", json.dumps(about.config.get("detector_ops", "")))
    try:
        return min(1.0, float(found.group(1))) if found else 0.0
    except ValueError:
        return 0.0


def _bundle(about: About, config_name: str) -> _Json:
    key, _ = about.section("inputs")
    entries: _Json = {"config": config_name, "image_key": key}
    if "postprocessing" not in about.config and "post_processing" in about.config:
        entries["postprocessing"] = "post_processing"
    return entries


def _decisions(kind: Kind, outputs: list[_Json], found: list[str]) -> list[str]:
    """All that a person must settle: what every bundle leaves open, then what this one does."""
    lines = [
        'inputs: which body parts the model was trained on, e.g. body_parts = ["ABDOMEN"]; any is accepted',
        "inputs: which distances of slices and pixels, orientations, ages and contrast phases it may be given; nearly all are accepted",
        "outputs: thresholds and smallest sizes; they are the bundle's own or 0.5, and nobody has measured them here",
        "licence and training_data: whether the weights and the data behind them may be used for what is meant here",
        "intended_use: what the results are for, and who looks at them",
    ]
    if kind == "detection":
        lines[2] = (
            f"outputs: minimum_score; it is the bundle's own, {outputs[0]['minimum_score']:g}, which may let many false boxes through"
        )
    organs = sum(output["components"] == "one" for output in outputs)
    if kind == "segmentation" and organs > 50:
        lines.append(f"maximum_findings: 50 of {organs} structures are reported, the others counted; raise it to have them all")
    return [one_line(line, 1024) for line in [*lines, *found]]


def _licence(about: About) -> str:
    for name in LICENCES:
        file = about.folder / name
        if file.is_file():
            text = file.read_bytes()[:20000].decode("utf-8", "replace")
            known = next((short for pattern, short in _LICENCES.items() if re.search(pattern, text)), None)
            return known or f"see {name} of the bundle"
    return one_line(about.text("license") or "The bundle doesn't say.", 1024)


def _numbered(table: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """The entries of a channel_def in the order of their numbers."""
    pairs = [(int(key), value) for key, value in table.items() if str(key).isdecimal()]
    yield from ((number, " ".join(str(label).split()) or f"label {number}") for number, label in sorted(pairs, key=lambda pair: pair[0]))


def _word(text: str, fallback: str) -> str:
    """A name or version as the manifest allows it."""
    fitted = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).lstrip("._-")[:64]
    return fitted or fallback


def _some(labels: list[str]) -> str:
    shown = ", ".join(repr(label) for label in labels[:8])
    return shown if len(labels) <= 8 else f"{shown} and {len(labels) - 8} more"


def _entry(code: Code) -> _Json:
    return {"value": code.value, "scheme": code.scheme, "meaning": code.meaning}


def _colour(number: int) -> list[float]:
    """Colours that neighbours in a list don't share: turned by the golden angle."""
    angle = number * 2.399963
    return [66.0, round(55 * math.cos(angle), 1), round(55 * math.sin(angle), 1)]


def as_toml(entries: Mapping[str, Any]) -> str:
    """Write entries as TOML: plain ones, then tables, then lists of tables; a table inside those stands in one line."""
    plain = {key: value for key, value in entries.items() if not isinstance(value, dict) and not _is_tables(value)}
    parts = ["".join(f"{key} = {_value(value)}\n" for key, value in plain.items())]
    for key, value in entries.items():
        if isinstance(value, dict):
            parts.append(f"[{key}]\n" + "".join(f"{inner} = {_value(v)}\n" for inner, v in value.items()))
        elif _is_tables(value):
            parts += [f"[[{key}]]\n" + "".join(f"{inner} = {_value(v)}\n" for inner, v in table.items()) for table in value]
    return "\n".join(parts)


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        items = [_value(inner) for inner in value]
        one_line = f"[{', '.join(items)}]"
        return one_line if len(one_line) <= 120 else "[\n" + "".join(f"  {item},\n" for item in items) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "")
