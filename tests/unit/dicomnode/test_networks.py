"""Networks from files: what they compute is what torch computed, and nothing but a network gets in."""

import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dicomnode.analysis.networks import load_network, load_state
from dicomnode.errors import PackageError

CPU = torch.device("cpu")
PROBE = torch.linspace(-1, 1, 2 * 6 * 8 * 8).reshape(2, 1, 6, 8, 8)


class Folder:
    """What code in a pickle would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Conv3d(1, 3, 3, padding=1), torch.nn.PReLU(), torch.nn.Conv3d(3, 2, 1)).eval()


@pytest.fixture(scope="module")
def files(network: torch.nn.Module) -> dict[str, bytes]:
    """The network in each format."""
    scripted = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # torch calls its own format deprecated
        torch.jit.save(torch.jit.trace(network, PROBE), scripted)
    exported = io.BytesIO()
    any_size = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    torch.export.save(torch.export.export(network, (PROBE,), dynamic_shapes=(any_size,)), exported)
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    return {"ts": scripted.getvalue(), "pt2": exported.getvalue(), "onnx": onnx_of(weights)}


def onnx_of(weights: dict[str, Any]) -> bytes:
    """The network as ONNX, written by hand: its exporter needs half a minute."""
    make = onnx.helper
    nodes = [
        make.make_node("Conv", ["image", "0.weight", "0.bias"], ["a"], kernel_shape=[3, 3, 3], pads=[1] * 6),
        make.make_node("PRelu", ["a", "1.weight"], ["b"]),
        make.make_node("Conv", ["b", "2.weight", "2.bias"], ["c"], kernel_shape=[1, 1, 1]),
    ]
    shape = ["n", 1, "z", "y", "x"]
    graph = make.make_graph(
        nodes,
        "g",
        [make.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)],
        [make.make_tensor_value_info("c", onnx.TensorProto.FLOAT, ["n", 2, "z", "y", "x"])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return bytes(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=9).SerializeToString())


def rewritten(archive: bytes, change: Any) -> bytes:
    """The archive with the contents that `change(name, data)` gives; None leaves a file out, a dict adds files."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return result.getvalue()


@pytest.mark.parametrize("ending", ["ts", "pt2", "onnx"])
def test_a_network_in_a_file_computes_what_torch_computed(network: torch.nn.Module, files: dict[str, bytes], ending: str) -> None:
    loaded = load_network({f"bundle/models/model.{ending}": files[ending]}, "p", CPU)
    with torch.no_grad():
        torch.testing.assert_close(loaded(PROBE), network(PROBE), rtol=1e-4, atol=1e-5)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_torchscript_under_the_name_of_weights_is_recognised(network: torch.nn.Module, files: dict[str, bytes]) -> None:
    loaded = load_network({"bundle/models/model.pt": files["ts"]}, "p", CPU)
    with torch.no_grad():
        torch.testing.assert_close(loaded(PROBE), network(PROBE))


def test_code_in_an_exported_program_never_runs(files: dict[str, bytes], tmp_path: Path) -> None:
    trap = io.BytesIO()
    torch.save(Folder(tmp_path / "run"), trap)

    def with_inputs(name: str, data: bytes) -> bytes:
        return trap.getvalue() if name.endswith("sample_inputs/model.pt") else data

    with pytest.raises(PackageError, match="more than tensors"):
        load_network({"bundle/models/model.pt2": rewritten(files["pt2"], with_inputs)}, "p", CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda g: {**g, "guards_code": ["__import__('os').system('x')"]}, "guard that is more"),
        (lambda g: json.loads(json.dumps(g).replace("torch.ops.aten.conv3d.default", "torch.os.system")), "calls torch.os.system"),
        (lambda g: json.loads(json.dumps(g).replace("torch.ops.aten.conv3d.default", "torch.ops.aten.from_file.default")), "from_file"),
        (lambda g: json.loads(json.dumps(g).replace("Symbol('s16'", "exec('s16'")), "more than arithmetic"),
    ],
)
def test_a_graph_that_names_more_than_operators_on_tensors_is_refused(files: dict[str, bytes], change: Any, sentence: str) -> None:
    def changed(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        new = json.dumps(change(json.loads(data)))
        assert new != json.dumps(json.loads(data))
        return new.encode()

    archive = rewritten(files["pt2"], changed)
    with pytest.raises(PackageError, match=sentence):
        load_network({"bundle/models/model.pt2": archive}, "p", CPU)


def test_pickled_payloads_of_an_exported_program_are_refused(files: dict[str, bytes]) -> None:
    def pickled(name: str, data: bytes) -> bytes:
        return data.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("weights_config.json") else data

    with pytest.raises(PackageError, match="pickled objects"):
        load_network({"bundle/models/model.pt2": rewritten(files["pt2"], pickled)}, "p", CPU)


def test_torchscript_that_reads_files_is_refused(tmp_path: Path) -> None:
    class Reader(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image + torch.from_file("/etc/hostname", shared=False, size=1)

    data = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(Reader()), data)
    with pytest.raises(PackageError, match=r"torch\.from_file, which is refused"):
        load_network({"bundle/models/model.ts": data.getvalue()}, "p", CPU)


def test_a_pickle_in_torchscript_that_names_other_things_is_refused(files: dict[str, bytes]) -> None:
    def other(name: str, data: bytes) -> bytes:
        return data.replace(b"collections\nOrderedDict", b"posix\nsystem") if name.endswith("/data.pkl") else data

    with pytest.raises(PackageError, match=r"unpickles posix\.system"):
        load_network({"bundle/models/model.ts": rewritten(files["ts"], other)}, "p", CPU)


@pytest.mark.parametrize("ending", ["ts", "pt2", "onnx"])
def test_what_is_no_network_is_refused_in_one_sentence(ending: str) -> None:
    with pytest.raises(PackageError, match=r"of the package p .*\.$"):
        load_network({f"bundle/models/model.{ending}": b"nothing of the kind"}, "p", CPU)


def test_weights_that_are_not_finite_are_refused_in_every_format(network: torch.nn.Module, files: dict[str, bytes]) -> None:
    weights = {name: value.numpy().copy() for name, value in network.state_dict().items()}
    weights["2.bias"][0] = np.nan
    with pytest.raises(PackageError, match="not finite"):
        load_network({"bundle/models/model.onnx": onnx_of(weights)}, "p", CPU)

    def not_a_number(name: str, data: bytes) -> bytes:
        return np.full(len(data) // 4, np.inf, dtype=np.float32).tobytes() if name.endswith(("/data/0", "/weight_0")) else data

    for ending in ("ts", "pt2"):
        with pytest.raises(PackageError, match="not finite"):
            load_network({f"bundle/models/model.{ending}": rewritten(files[ending], not_a_number)}, "p", CPU)


def test_onnx_with_weights_in_other_files_is_refused(network: torch.nn.Module) -> None:
    model = onnx.load_from_string(onnx_of({name: value.numpy() for name, value in network.state_dict().items()}))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(PackageError, match="other files"):
        load_network({"bundle/models/model.onnx": model.SerializeToString()}, "p", CPU)


@pytest.mark.parametrize(
    "wrap",
    [lambda s: s, lambda s: {"model": s}, lambda s: {"net": s, "epoch": 3}, lambda s: {f"module.{k}": v for k, v in s.items()}],
)
def test_a_checkpoint_is_loaded_as_the_one_who_saved_it_meant(network: torch.nn.Module, wrap: Any) -> None:
    fresh = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 3, padding=1), torch.nn.PReLU(), torch.nn.Conv3d(3, 2, 1)).eval()
    data = io.BytesIO()
    torch.save(wrap(network.state_dict()), data)
    load_state(fresh, "model.pt", data.getvalue(), "p", "net")
    with torch.no_grad():
        torch.testing.assert_close(fresh(PROBE), network(PROBE))
