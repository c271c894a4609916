"""The parts of a MONAI Bundle's configuration that the node uses: network, preprocessing, inferer, postprocessing, and no other.

Its expressions run here, so it must never be called for a bundle that nobody consented to (contract 16). Evaluator, handlers, data set
and `run` are never resolved; what loads or saves files is taken out before anything is built.
"""

from __future__ import annotations

import codecs
import json
import pydoc
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from monai.bundle import ConfigParser

from dicomnode.analysis.bundle_age import in_todays_words, on_our_device
from dicomnode.analysis.manifest import BundleSection
from dicomnode.analysis.networks import first_line
from dicomnode.errors import PackageError

# What the code of others raises: an expression, a class of MONAI's that is given wrong arguments, a script of the bundle.
BUNDLE_FAILS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, NameError, OSError, RuntimeError,
    StopIteration, SyntaxError, TypeError, ValueError, Warning, pydoc.ErrorDuringImport,
)  # fmt: skip

Step = Callable[[dict[str, Any]], dict[str, Any]]

_NEVER = ("dataset", "dataloader", "evaluator", "handlers", "initialize", "run", "evaluating", "finalize", "checkpointloader", "datalist")
_FILES = re.compile(r"(^|\.)(LoadImage|SaveImage|SaveClassification|Save|WriteFile|CSVSaver|SegmentSaver)(d|D|Dict)?$")
_PRETRAINED = re.compile(r"pretrained\s*=\s*True|load_state_dict_from_url|download_url|download_and_extract|hf_hub_download")
_CORES = ("core", "_core")  # of numpy before 2 and since
_IMPORT = re.compile(r"^\$\s*(?:import|from)\s+([A-Za-z_]\w*)[\w.]*(?:.*\bas\s+(\w+))?\s*(?:$|import)")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a bundle brings, resolved. `image_keys` are those that its loader would have filled; empty: it names none."""

    network: torch.nn.Module
    preprocessing: tuple[Step, ...]
    inferer: Callable[..., Any]
    postprocessing: tuple[Step, ...]
    image_keys: tuple[str, ...]
    channel_first: bool  # whether the preprocessing wants images whose channels are first already


def read_config(root: Path, section: BundleSection, name: str) -> dict[str, Any]:
    """Return the bundle's configuration as data: nothing of it runs.

    Raises:
        PackageError: it is absent or neither JSON nor YAML.
    """
    file = root / section.config
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise PackageError(f"{section.config} of the package {name} cannot be read: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise PackageError(f"{section.config} of the package {name} is no table of settings.")
    return content


def resolve(
    content: dict[str, Any], section: BundleSection, root: Path, device: torch.device, network: torch.nn.Module | None, name: str
) -> Parts:
    """Build the parts, with `network` in place of the configuration's where one is given. Enter `BundleModules.present` before.

    Raises:
        PackageError: a part is absent or doesn't build; where a library is missing it is named.
    """
    builder = _Builder(content, root, device, name)
    return builder.parts(section, network)


def checkpoint_of(content: Mapping[str, Any]) -> tuple[str, str]:
    """Return where the configuration loads its weights from and under which key, read as data: (file name or "", key or "model")."""
    for entry in _dicts(content):
        if str(entry.get("_target_", "")).endswith("CheckpointLoader") and isinstance(entry.get("load_dict"), dict):
            file = re.search(r"([\w.-]+\.(?:pt|pth|ts))\b", str(entry.get("load_path", "")))
            return file[1] if file else "", next(iter(entry["load_dict"]), "model")
    return "", "model"


class _Builder:
    """One parser with the bundle's configuration; lives as long as the resolving does."""

    def __init__(self, content: dict[str, Any], root: Path, device: torch.device, name: str) -> None:
        self._name = name
        self._missing: dict[str, str] = {}  # alias -> library that isn't installed
        self._required = [ref for ref in _as_list((content.get("evaluator") or {}).get("_requires_")) if str(ref).startswith("@")]
        self.image_keys, self.channel_first = _loader(content)
        self.channel_first |= not any(re.search("ChannelFirst|AddChannel", str(e.get("_target_", ""))) for e in _dicts(content))
        given_device = content.get("device")
        kept = {key: value for key, value in content.items() if key not in _NEVER}
        kept |= {"bundle_root": str(root), "device": device}
        self._refuse_downloads(kept)
        kept = self._cleaned(kept, given_device, device)
        self._parser = ConfigParser(kept)
        if len(self.image_keys) == 1 and self.image_keys[0].startswith(("@", "$")):
            self.image_keys = ()

    def parts(self, section: BundleSection, network: torch.nn.Module | None) -> Parts:
        if network is not None:
            self._parser[section.network] = network
        elif section.network not in self._parser:
            raise PackageError(f"{section.config} of the package {self._name} has no {section.network}.")
        found = self._resolved(section.network)
        if not isinstance(found, torch.nn.Module):
            raise PackageError(f"{section.network} of the package {self._name} is no network.")
        for reference in self._required:
            self._resolved(str(reference).removeprefix("@"))
        preprocessing = self._resolved(section.preprocessing)
        inferer = self._resolved(section.inferer)
        if not callable(inferer):
            raise PackageError(f"{section.inferer} of the package {self._name} is no inferer.")
        postprocessing = self._resolved(section.postprocessing) if section.postprocessing else None
        return Parts(
            network=found,
            preprocessing=_steps(preprocessing),
            inferer=inferer,
            postprocessing=_steps(postprocessing),
            image_keys=self.image_keys,
            channel_first=self.channel_first,
        )

    def _resolved(self, key: str) -> Any:
        if key not in self._parser:
            raise PackageError(f"the configuration of the package {self._name} has no {key}.")
        try:
            with torch.serialization.safe_globals(_arrays()):
                return self._parser.get_parsed_content(key)
        except BUNDLE_FAILS as error:
            raise PackageError(self._said(key, error)) from error

    def _said(self, key: str, error: BaseException) -> str:
        library = missing_library(error, self._missing)
        if library:
            return f"The package {self._name} needs {library}, which isn't installed."
        return f"{key} of the package {self._name} doesn't build: {first_line(_chain(error)[-1])}."

    def _refuse_downloads(self, content: Any) -> None:
        for entry in _dicts(content):
            for key, value in entry.items():
                if (key in ("pretrained", "use_pretrained") and value is True) or (isinstance(value, str) and _PRETRAINED.search(value)):
                    raise PackageError(
                        f"The configuration of the package {self._name} asks for weights from the network ({key}): nothing is downloaded."
                    )

    def _cleaned(self, value: Any, given_device: Any, device: torch.device) -> Any:
        """Return the configuration without what loads and saves, without imports that fail, on our device."""
        if isinstance(value, dict):
            if isinstance(value.get("_target_"), str) and _FILES.search(value["_target_"]):
                return {"_target_": value["_target_"], "_disabled_": True}
            cleaned = {key: self._cleaned(on_our_device(key, inner, device), given_device, device) for key, inner in value.items()}
            return in_todays_words(cleaned)
        if isinstance(value, list):
            kept = [inner for inner in value if not self._fails_to_import(inner)]
            return [self._cleaned(on_our_device("", inner, device), given_device, device) for inner in kept]
        return device if isinstance(value, str) and value == given_device and value.startswith("$") else value

    def _fails_to_import(self, value: Any) -> bool:
        found = _IMPORT.match(value) if isinstance(value, str) else None
        if found is None:
            return False
        try:
            __import__(found[1])
        except ImportError as error:
            library = (error.name or found[1]).partition(".")[0]
            for alias in {found[1], found[2] or found[1], value.split()[-1]}:
                self._missing[alias] = library
            return True
        return False


def _arrays() -> list[Any]:
    """What a file of numpy's arrays names: a configuration may load one beside the weights (a searched architecture), as data alone."""
    module, numbers = np._core.multiarray, "?bBhHiIlLqQefd"  # type: ignore[attr-defined]  # where numpy's own pickles look them up
    functions = [(getattr(module, name), f"numpy.{core}.multiarray.{name}") for name in ("_reconstruct", "scalar") for core in _CORES]
    return [*functions, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in numbers}, codecs.encode]


def missing_library(error: BaseException, aliases: Mapping[str, str]) -> str | None:
    """Return the library whose absence is behind an error, if it is that; `aliases` are names whose import failed before."""
    for link in reversed(_chain(error)):
        if isinstance(link, NameError) and (link.name or "") in aliases:
            return aliases[link.name or ""]
        found = re.search(r"No module named '?(\w+)|[Rr]equired package `(\w+)|^(\w+)[\w.]* required\.$", str(link))  # MONAI's own words
        if found:
            return next(name for name in found.groups() if name).lower()
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """The error, what caused it, what caused that."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _loader(content: Any) -> tuple[tuple[str, ...], bool]:
    """The keys of the first loader of images, and whether it puts the channels first by itself."""
    for entry in _dicts(content):
        if re.search(r"(^|\.)LoadImage(d|D|Dict)$", str(entry.get("_target_", ""))):
            return tuple(str(key) for key in _as_list(entry.get("keys"))), entry.get("ensure_channel_first") is True
    return (), False


def _steps(transform: Any) -> tuple[Step, ...]:
    """The transforms of a Compose, also of one within another; a single transform; none."""
    if transform is None:
        return ()
    inner = transform if isinstance(transform, (list, tuple)) else getattr(transform, "transforms", None)
    if inner is None:
        return (transform,)
    return tuple(step for entry in inner for step in _steps(entry))


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _dicts(inner)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
