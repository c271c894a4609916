"""Networks from the files of a package: MONAI's and torch's classes by name with their weights, TorchScript, torch.export, ONNX.

Must never run a bundle's expressions, unpickle code, or reach for the network.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pickle  # only for the name of the error that torch's weights_only loader raises
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
from monai.bundle import ConfigParser
from safetensors import SafetensorError

from dicomnode.analysis.onnx_file import vet_onnx
from dicomnode.analysis.package import NETWORK_CONFIG, WEIGHTS
from dicomnode.analysis.vetting import vet_export, vet_script
from dicomnode.errors import PackageError

FILES = ("bundle/models/model.ts", "bundle/models/model.pt2", "bundle/models/model.onnx")  # a network with its weights
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


def load_network(contents: Mapping[str, bytes], name: str, device: torch.device) -> torch.nn.Module:
    """Return the network among a package's files (name -> bytes) on a device, without gradients and not in training.

    It is in one of the files of FILES, or built as `network_def` says and given its weights.

    Raises:
        PackageError: none of them holds an acceptable network.
    """
    file = next((file for file in FILES if file in contents), None)
    if file is None:
        weights = next((w for w in WEIGHTS if w in contents and is_scripted(contents[w])), None)
        if weights is not None:
            return scripted_network(contents[weights], name, device)
        network = build_network(contents[NETWORK_CONFIG], name)
        load_weights(network, contents, name)
        return at_rest(network).to(device)
    loader = {".ts": scripted_network, ".pt2": exported_network, ".onnx": OnnxNetwork}[PurePosixPath(file).suffix]
    return loader(contents[file], name, device)


def at_rest(network: torch.nn.Module) -> torch.nn.Module:
    """Return the network out of training, its weights without gradients."""
    for parameter in network.parameters():  # TorchScript refuses requires_grad_ of the whole
        parameter.requires_grad = False
    return network.eval()


def scripted_network(data: bytes, name: str, device: torch.device) -> torch.nn.Module:
    """Return the network of a TorchScript archive.

    Raises:
        PackageError: it can't be read, its code reaches for files, or it holds numbers that are not finite.
    """
    vet_script(data, name)
    try:
        with _quiet():
            network: torch.nn.Module = torch.jit.load(io.BytesIO(data), map_location=device)  # type: ignore[no-untyped-call]  # torch's own
    except (RuntimeError, ValueError) as error:
        unknown = re.search(r"Unknown (?:builtin )?op(?:erator)?: '?(\w+)::", str(error))
        if unknown:
            raise PackageError(f"The TorchScript of the package {name} needs {unknown[1]}, which isn't installed.") from error
        raise PackageError(f"The TorchScript of the package {name} cannot be read: {first_line(error)}.") from error
    check_finite((*network.parameters(), *network.buffers()), name)
    return at_rest(network)


def exported_network(data: bytes, name: str, device: torch.device) -> torch.nn.Module:
    """Return the network of an archive of torch.export.

    Raises:
        PackageError: it can't be read, holds more than tensors and torch's operators on them, or numbers that are not finite.
    """
    for inner in vet_export(data, name):
        try:
            torch.load(io.BytesIO(inner), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError, ValueError, AttributeError) as error:
            raise PackageError(f"The exported program of the package {name} holds a pickle with more than tensors: refused.") from error
    try:
        with _quiet():
            program = torch.export.load(io.BytesIO(data))
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, AssertionError) as error:
        raise PackageError(f"The exported program of the package {name} cannot be read: {first_line(error)}.") from error
    check_finite(program.state_dict.values(), name)
    return at_rest(ExportedNetwork(program.module().to(device)))


class ExportedNetwork(torch.nn.Module):
    """An exported program: it can't be put into training or out of it, so it isn't asked to."""

    def __init__(self, program: torch.nn.Module) -> None:
        super().__init__()
        self.program_module = program

    def train(self, mode: bool = False) -> Self:  # noqa: ARG002  # torch's signature
        """Do nothing: an exported program is as it was exported."""
        self.training = False
        return self

    def forward(self, windows: torch.Tensor) -> Any:
        """Run the program."""
        return self.program_module(windows)


class OnnxNetwork(torch.nn.Module):
    """A network in ONNX, computed by onnxruntime: on the GPU where it has the provider for it, else on the CPU."""

    program = "onnxruntime"

    def __init__(self, data: bytes, name: str, device: torch.device) -> None:
        """Load it.

        Raises:
            PackageError: it can't be read, or takes or gives more than one tensor.
        """
        super().__init__()
        vet_onnx(data, name)
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.use_deterministic_compute = True
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        there = runtime.get_available_providers()
        providers = ["CUDAExecutionProvider"] if device.type == "cuda" and "CUDAExecutionProvider" in there else []
        try:
            self._session = runtime.InferenceSession(data, options, providers=[*providers, "CPUExecutionProvider"])
        except _onnx_fails() as error:
            raise PackageError(f"The ONNX file of the package {name} cannot be read: {first_line(error)}.") from error
        if len(self._session.get_inputs()) != 1:
            raise PackageError(f"The ONNX file of the package {name} takes {len(self._session.get_inputs())} tensors, and must take one.")
        self.onnx = data  # another backend may compile it for itself
        self._entry = self._session.get_inputs()[0]
        self.eval()

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Run the session; one window at a time where the file fixes that."""
        dtype = {"tensor(float16)": np.float16, "tensor(double)": np.float64}.get(self._entry.type, np.float32)
        array = windows.detach().cpu().numpy().astype(dtype, copy=False)
        parts = [array] if self._entry.shape[0] != 1 else [array[i : i + 1] for i in range(len(array))]
        try:
            answers = [self._session.run(None, {self._entry.name: np.ascontiguousarray(part)})[0] for part in parts]
        except _onnx_fails() as error:
            raise RuntimeError(first_line(error)) from error
        return torch.from_numpy(np.concatenate(answers)).to(windows.device)


def _onnx_fails() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: it has no class of its own above them."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    names = ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    return tuple(getattr(state, name) for name in names)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what torch warns of its own formats: they are the package's choice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _entries(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield (key, value) of every entry of nested JSON; what stands in a list comes under the list's key."""
    pairs = value.items() if isinstance(value, dict) else ((key, inner) for inner in value) if isinstance(value, list) else ()
    for inner_key, inner in pairs:
        yield inner_key, inner
        yield from _entries(inner, inner_key)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
