"""What a bundle's configuration says in words that MONAI has given up since, said in today's words.

Only what never changed an answer is dropped, and only where the class no longer takes it. Builds nothing and evaluates nothing.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import monai.inferers
import monai.networks.blocks
import monai.networks.nets
import monai.transforms
import torch

_MODULES = (monai.transforms, monai.networks.nets, monai.networks.blocks, monai.inferers)
_CLASSES = {"AddChannel": "no_channel", "AsChannelFirst": -1}  # gone since MONAI 1.3 -> what EnsureChannelFirst is told instead
_WITHOUT_EFFECT = frozenset({"img_size", "meta_keys", "meta_key_postfix", "image_meta_key_postfix", "image_only"})
_RENAMED = {"dimensions": "spatial_dims", "pos_embed": "proj_type"}
_CUDA_DEVICE = re.compile(r"""torch\.device\(\s*(['"])cuda(?::\d+)?\1\s*\)""")
_CUDA_NAME = re.compile(r"cuda(?::\d+)?")


def in_todays_words(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a table of a configuration with the classes and arguments that the MONAI that is installed knows."""
    target = entry.get("_target_")
    if not isinstance(target, str) or ("." in target and not target.startswith("monai.")):  # a bundle's own class is its own matter
        return entry
    last = target.rpartition(".")[2]
    old = re.fullmatch(rf"({'|'.join(_CLASSES)})(d|D|Dict)?", last)
    if old is not None and _found(last) is None:
        entry = {"channel_dim": _CLASSES[old[1]]} | entry | {"_target_": f"EnsureChannelFirst{old[2] or ''}"}
        last = str(entry["_target_"])
    accepted = _arguments(_found(last))
    if accepted is None:
        return entry
    said: dict[str, Any] = {}
    for key, value in entry.items():
        if key.startswith("_") or key in accepted:
            said[key] = value
        elif _RENAMED.get(key) in accepted and _RENAMED[key] not in entry:
            said[_RENAMED[key]] = value
        elif key not in _WITHOUT_EFFECT:
            said[key] = value  # MONAI refuses it, in its own words
    return said


def on_our_device(key: str, value: Any, device: torch.device) -> Any:
    """Return a value of a configuration with the GPU that it names replaced by the device that is used here."""
    if not isinstance(value, str):
        return value
    if value.startswith("$"):
        return _CUDA_DEVICE.sub("@device", value)
    return device if key.endswith("device") and _CUDA_NAME.fullmatch(value) else value


def _found(name: str) -> Any:
    return next((getattr(module, name) for module in _MODULES if inspect.isclass(getattr(module, name, None))), None)


def _arguments(found: Any) -> frozenset[str] | None:
    """The names of the arguments of a class; None where it isn't known or takes any."""
    if found is None:
        return None
    parameters = inspect.signature(found).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)
