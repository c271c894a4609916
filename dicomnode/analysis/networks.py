"""Networks from the files of a package: MONAI's and torch's classes by name, and their weights.

Must never run a bundle's expressions, unpickle code, or reach for the network.
"""

from __future__ import annotations

import importlib
import io
import json
import pickle  # only for the name of the error that torch's weights_only loader raises
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import safetensors.torch
import torch
from monai.bundle import ConfigParser
from safetensors import SafetensorError

from dicomnode.analysis.package import NETWORK_CONFIG, WEIGHTS
from dicomnode.errors import PackageError

NETWORK_ROOTS = ("monai.networks.", "torch.nn.")  # where a bundle's classes may come from


Between = Callable[[float], None]
"""Called between windows with the share that is done (0..1). It may take its time, and what it raises ends the analysis."""


def go_on(_: float) -> None:
    """Do nothing between windows."""


def build_network(config: bytes, name: str) -> torch.nn.Module:
    """Build the network that `network_def` of a bundle's `inference.json` describes, with fresh weights.

    Only classes of MONAI's and torch's networks may be named, and nothing is evaluated.

    Raises:
        PackageError: the configuration is not JSON, asks for more than that, or doesn't build.
    """
    try:
        content = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{NETWORK_CONFIG} of the package {name} is not JSON: {first_line(error)}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("network_def"), dict):
        raise PackageError(f"{NETWORK_CONFIG} of the package {name} has no network_def.")
    if "imports" in content or any(isinstance(value, str) and value.startswith("$") for _, value in _entries(content)):
        raise PackageError(f"{NETWORK_CONFIG} of the package {name} holds imports or expressions ($…): code in a bundle is refused.")
    definition = content["network_def"]
    for key, value in _entries(definition):
        if key == "_target_":
            _network_class(value, name)
        elif key.startswith("_") and key != "_desc_":
            raise PackageError(f"network_def of the package {name} has the key {key}, which is refused.")
        elif key == "pretrained" and value:
            raise PackageError(f"network_def of the package {name} asks for pretrained weights: nothing is downloaded at run time.")
        elif isinstance(value, str) and value.startswith(("@", "%")):
            raise PackageError(f"network_def of the package {name} refers to something outside itself ({value}), which is refused.")
    try:
        network = ConfigParser({"network_def": definition}).get_parsed_content("network_def", instantiate=True, eval_expr=False)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PackageError(f"network_def of the package {name} doesn't build: {first_line(error.__cause__ or error)}.") from error
    if not isinstance(network, torch.nn.Module):
        raise PackageError(f"network_def of the package {name} has no _target_ that is a network.")
    return network


def _network_class(target: object, name: str) -> None:
    """Refuse a `_target_` that isn't a network class defined in one of NETWORK_ROOTS; a module's other contents are never reached."""
    refusal = PackageError(
        f"network_def of the package {name} names {target!r}; only network classes of monai.networks and torch.nn may be."
    )
    if not isinstance(target, str) or not target.startswith(NETWORK_ROOTS):
        raise refusal
    module, _, attribute = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise refusal from error
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module) and f"{found.__module__}.".startswith(NETWORK_ROOTS)):
        raise refusal


def load_weights(network: torch.nn.Module, contents: Mapping[str, bytes], name: str) -> None:
    """Load the weights among a package's files into its network.

    Raises:
        PackageError: they are no table of finite tensors that fits the network, or hold code.
    """
    file = next(weights for weights in WEIGHTS if weights in contents)
    load_state(network, file, contents[file], name)


def load_state(network: torch.nn.Module, file: str, data: bytes, name: str, key: str = "model") -> None:
    """Load one file of weights: a table of tensors, or a checkpoint that holds one under `key`, as MONAI's CheckpointLoader takes it.

    A prefix `module.` of all names, left by training on several devices, is dropped.

    Raises:
        PackageError: as `load_weights` does.
    """
    try:
        if file.endswith(".safetensors"):
            state: Any = safetensors.torch.load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PackageError(f"The weights of the package {name} are a pickle with more than tensors: code is refused.") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, KeyError, ValueError, AttributeError) as error:
        raise PackageError(f"The weights of the package {name} cannot be read: {first_line(error)}.") from error
    if isinstance(state, dict):
        inner = (state[k] for k in (key, "model", "state_dict", "network") if isinstance(state.get(k), dict))
        state = next(inner, state)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise PackageError(f"The weights of the package {name} are not a table of tensors.")
    if state and all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    check_finite(state.values(), name)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise PackageError(f"The weights of the package {name} don't fit its network: {mismatch(error)}.") from error


def check_finite(tensors: Iterable[torch.Tensor], name: str) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        PackageError: one of them does.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise PackageError(f"The weights of the package {name} hold numbers that are not finite.")


def mismatch(error: BaseException) -> str:
    """Return what torch says about weights that don't fit, in one line."""
    return " ".join(str(error).split()).rstrip(".")[:300]


def is_scripted(data: bytes) -> bool:
    """Whether a file of weights is a TorchScript archive: a zip with code and constants."""
    if not data.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def scripted_network(data: bytes, name: str, device: torch.device) -> torch.nn.Module:
    """Return the network of a TorchScript archive.

    Raises:
        PackageError: it can't be read, or holds numbers that are not finite.
    """
    try:
        network: torch.nn.Module = torch.jit.load(io.BytesIO(data), map_location=device)  # type: ignore[no-untyped-call]  # torch's own
    except (RuntimeError, ValueError) as error:
        raise PackageError(f"The TorchScript of the package {name} cannot be read: {first_line(error)}.") from error
    check_finite((*network.parameters(), *network.buffers()), name)
    return network.eval()


def _entries(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield (key, value) of every entry of nested JSON; what stands in a list comes under the list's key."""
    pairs = value.items() if isinstance(value, dict) else ((key, inner) for inner in value) if isinstance(value, list) else ()
    for inner_key, inner in pairs:
        yield inner_key, inner
        yield from _entries(inner, inner_key)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
