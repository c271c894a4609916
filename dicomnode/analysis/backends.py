"""What computes a network: torch on a GPU or the CPU, OpenVINO on an x86 CPU, behind one interface.

Each backend gives the same bits for the same windows on the same machine. Which of them may be used for a package is decided by its
check, which compares their findings with those of torch in fp32. Must never reach for the network or write a file: OpenVINO's
telemetry isn't even imported.
"""

from __future__ import annotations

import copy
import importlib
import os
import platform
import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from dicomnode.analysis.networks import first_line
from dicomnode.errors import AnalysisFailed, PackageError

Choice = Literal["auto", "torch", "openvino"]
TORCH = "torch"
OPENVINO_BF16, OPENVINO_F32 = "openvino-bf16", "openvino-f32"
SHAPES_KEPT = 4  # compiled networks, one for each shape of a window
STREAMS = 4  # windows that OpenVINO computes side by side, at most


class Backend(Protocol):
    """A network ready to compute. `name` is what findings say: device, precision and program."""

    @property
    def name(self) -> str:
        """Device, precision and program, e.g. "cpu bf16 openvino"."""

    @property
    def device(self) -> torch.device:
        """Where windows are wanted and results lie."""

    @property
    def windows(self) -> int:
        """How many windows at a time it wants at least."""

    @property
    def memory_bytes(self) -> int:
        """What it holds while it waits."""

    def __call__(self, windows: torch.Tensor) -> Any:
        """Return what the network says of (n, channels, *window), in float32 where it is a tensor."""


@dataclass(frozen=True, kw_only=True)
class TorchBackend:
    """The network in torch: fp32 on the CPU, autocast to bf16 or fp16 on a GPU, deterministic algorithms on both."""

    network: torch.nn.Module
    device: torch.device
    windows: int = 1

    @property
    def name(self) -> str:
        """See Backend."""
        program = str(getattr(self.network, "program", "torch"))  # a network from a file may be computed by another program
        return f"{self.device.type} {_PRECISIONS[self.precision]} {program}"

    @property
    def precision(self) -> torch.dtype:
        """What its convolutions compute in."""
        if self.device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    @property
    def memory_bytes(self) -> int:
        """See Backend."""
        return bytes_of(self.network)

    def __call__(self, windows: torch.Tensor) -> Any:
        """See Backend."""
        cuda = self.device.type == "cuda"
        layout = torch.channels_last_3d if windows.dim() == 5 else torch.channels_last if windows.dim() == 4 else torch.preserve_format
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast("cuda", dtype=self.precision) if cuda else nullcontext(),
        ):
            result = self.network(windows.to(self.device).contiguous(memory_format=layout))
        return result.float() if isinstance(result, torch.Tensor) else result


@dataclass(frozen=True, kw_only=True)
class OpenVinoBackend:
    """The network in OpenVINO on the CPU, compiled for each shape of window when it first comes; windows go side by side, one a stream."""

    network: torch.nn.Module
    precision: Literal["bf16", "f32"]
    threads: int
    device: torch.device
    _compiled: OrderedDict[tuple[int, ...], list[Any]] = field(default_factory=OrderedDict)

    @property
    def name(self) -> str:
        """See Backend."""
        return f"cpu {'bf16' if self.precision == 'bf16' else 'fp32'} openvino"

    @property
    def windows(self) -> int:
        """See Backend."""
        return max(1, min(self.threads, STREAMS))

    @property
    def memory_bytes(self) -> int:
        """See Backend."""
        return 2 * bytes_of(self.network)  # torch's weights, and those of the compiled network

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """See Backend.

        Raises:
            AnalysisFailed: the network cannot be computed by OpenVINO.
        """
        requests = self._requests(windows[:1])
        results: list[torch.Tensor] = []
        for first in range(0, len(windows), len(requests)):
            pairs = list(zip(requests, windows[first : first + len(requests)], strict=False))
            for request, window in pairs:
                request.start_async([window[None].contiguous().numpy()])
            for request, _ in pairs:
                request.wait()
            results += [torch.from_numpy(request.get_output_tensor(0).data.copy()) for request, _ in pairs]
        return torch.cat(results)

    def _requests(self, window: torch.Tensor) -> list[Any]:
        shape = tuple(window.shape)
        if shape not in self._compiled:
            try:
                self._compiled[shape] = self._compile(window)
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
                raise AnalysisFailed(f"OpenVINO cannot compute the network: {first_line(error)}.") from error
            while len(self._compiled) > SHAPES_KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(shape)
        return self._compiled[shape]

    def _compile(self, window: torch.Tensor) -> list[Any]:
        openvino = _openvino()
        onnx = getattr(self.network, "onnx", None)  # a network from an ONNX file keeps its bytes: OpenVINO reads them itself
        core = openvino.Core()
        model = core.read_model(onnx, b"") if onnx is not None else _converted(openvino, self.network, window)
        model.reshape({model.inputs[0]: openvino.PartialShape(list(window.shape))})
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": self.precision,
                "INFERENCE_NUM_THREADS": max(1, self.threads),
                "NUM_STREAMS": self.windows,
                "CACHE_DIR": "",
            },
        )
        return [compiled.create_infer_request() for _ in range(self.windows)]


def backend_for(network: torch.nn.Module, which: str, *, device: torch.device, threads: int) -> Backend:
    """Return the backend `which` (one of `available`) for a network that is loaded on `device`.

    Raises:
        PackageError: it isn't available here.
    """
    if which == TORCH:
        return TorchBackend(network=network, device=device)
    if which not in available(device):
        raise PackageError(f"the backend {which} is not available on this machine")
    precision: Literal["bf16", "f32"] = "bf16" if which == OPENVINO_BF16 else "f32"
    return OpenVinoBackend(network=network, precision=precision, threads=threads or cores(), device=device)


def available(device: torch.device) -> tuple[str, ...]:
    """Return the backends that this machine has for a device, the one that others are compared with first."""
    if device.type != "cpu" or platform.machine() not in {"x86_64", "AMD64"}:
        return (TORCH,)
    try:
        capabilities = _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except (ImportError, RuntimeError):
        return (TORCH,)
    return (TORCH, OPENVINO_BF16, OPENVINO_F32) if "BF16" in capabilities else (TORCH, OPENVINO_F32)


def choose(report: Mapping[str, Any] | None, choice: Choice, device: torch.device) -> str:
    """Return the fastest backend whose findings agreed with torch's when the package was checked; `report` is that check's.

    torch where `choice` says so, where there is another device, or where the check showed nothing.
    """
    compared = (report or {}).get("backends", {})
    if choice == "torch" or device.type != "cpu":
        return TORCH
    here = set(available(device))
    passed = {name: row["seconds"] for name, row in compared.items() if name in here and row.get("passed")}
    if choice == "openvino":
        passed.pop(TORCH, None)
    return min(passed, key=lambda name: (passed[name], name), default=TORCH)


def device_named(name: str) -> torch.device:
    """Return the device that the setting `auto`, `cpu` or `cuda` means here.

    Raises:
        AnalysisFailed: it is cuda and there is no GPU.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise AnalysisFailed("The device is set to cuda, but torch finds no GPU.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and there) else "cpu")


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bytes_of(network: torch.nn.Module) -> int:
    """Return the bytes of a network's weights."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, on the device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("out of memory", "can't allocate memory", "bad_alloc"))


_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _openvino() -> Any:
    """Import OpenVINO without its telemetry, which would write files and call home: it is made unfindable before."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: importing it fails, and OpenVINO has a stub
    return importlib.import_module("openvino")


def _converted(openvino: Any, network: torch.nn.Module, window: torch.Tensor) -> Any:
    """Return a torch network as OpenVINO's model, traced on a window; by the frontend itself: the converter would load telemetry."""
    decoder = importlib.import_module("openvino.frontend.pytorch.ts_decoder").TorchScriptPythonDecoder
    if isinstance(network, torch.jit.ScriptModule):
        traced = network
    else:
        plain = copy.deepcopy(network)
        for parameter in plain.parameters():
            parameter.data = parameter.data.contiguous()  # OpenVINO reads no other layout
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shapes are fixed, as the tracer warns; and OpenVINO has no quicker way in than tracing
            traced = torch.jit.freeze(torch.jit.trace(plain, window, check_trace=False))  # type: ignore[no-untyped-call]  # torch's own
    frontend = openvino.frontend.FrontEndManager().load_by_framework("pytorch")
    graph = decoder(traced, example_input=window, skip_freeze=True)  # it must outlive its conversion
    return frontend.convert(frontend.load(graph))
