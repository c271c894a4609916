"""What torch would execute of a file with a network, looked at before torch reads it.

`torch.jit.load` compiles TorchScript and runs none of Python, but its operators can read and write files. `torch.export.load` unpickles
payloads, looks up functions by their dotted names and evaluates the expressions of sizes: each of these can run anything. So only what a
network of tensors needs passes here. Reads archives as data alone.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from collections.abc import Iterator
from typing import Any

from dicomnode.errors import PackageError

# Names that torch's own reader of TorchScript (C++) knows in a pickle; it refuses others too, but only after a part was built.
_SCRIPT_GLOBALS = re.compile(
    r"__torch__\.\S+ \S+|collections OrderedDict|torch (device|\w+Storage)|torch\._utils _rebuild_\w+|torch\.jit\._pickle \w+"
    r"|torch\.serialization \w+|torch\.storage \w+"
)
_SCRIPT_FILES = re.compile(r"\b(?:torch|ops\.aten)\.(?:from_file|save|load)\(|\brpc_\w+\(|\bops\.(?:prim\.rpc|rpc|c10d|distributed)\b")
_TARGET = re.compile(
    r"torch\.ops\.aten\.(?!from_file|save|load)\w+\.\w+|torch\.ops\.(?:prims|quantized)\.\w+\.\w+"
    r"|torch\.ops\.higher_order\.(?:cond|while_loop|scan|wrap_with_set_grad_enabled|wrap_with_autocast)|torch\.sym_\w+"
    r"|_operator\.(?:add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|math\.(?:trunc|ceil|floor|sqrt)|torch\.ops\.profiler\.\w+\.\w+"
)
_WORD = re.compile(r"[^\W\d]\w*")
_SIZE_WORDS = re.compile(r"[A-Z][A-Za-z]*|[su]\d+|positive|integer|nonnegative|real|zero|nonzero|evaluate")
_GUARD_WORDS = re.compile(r"L|args|kwargs|size|dim|dtype|device|shape|stride|and|or|not|True|False|None|[su]\d+|Ne|Eq|Max|Min|Mod")


def vet_script(data: bytes, name: str) -> None:
    """Look at a TorchScript archive.

    Raises:
        PackageError: its pickles name more than tensors and modules, or its code reaches for files or the network.
    """
    with _opened(data, name) as archive:
        for file in archive.namelist():
            if file.endswith((".pkl", ".debug_pkl")):
                for found in _globals(archive.read(file), name):
                    if not _SCRIPT_GLOBALS.fullmatch(found):
                        raise PackageError(f"The TorchScript of the package {name} unpickles {found.replace(' ', '.')}: code is refused.")
            elif file.endswith(".py"):
                reaches = _SCRIPT_FILES.search(archive.read(file).decode("utf-8", "replace"))
                if reaches:
                    raise PackageError(f"The TorchScript of the package {name} calls {reaches[0].rstrip('(')}, which is refused.")


def vet_export(data: bytes, name: str) -> list[bytes]:
    """Look at an archive of torch.export and return the pickles in it, which must be readable as tensors alone before it is loaded.

    Raises:
        PackageError: it is of another format, holds compiled code or pickled objects, or names functions other than torch's operators.
    """
    refused = f"The exported program of the package {name}"
    pickles: list[bytes] = []
    with _opened(data, name) as archive:
        names = archive.namelist()
        models = [file for file in names if re.fullmatch(r"[^/]+/models/[^/]+\.json", file)]
        if len(models) != 1:
            raise PackageError(f"{refused} has {len(models)} models in the format of torch.export.save, and must have one.")
        for file in names:
            inner = file.partition("/")[2]
            if inner.startswith(("data/aotinductor/", "data/executorch/", "data/mtia/")):
                raise PackageError(f"{refused} holds compiled code, which is refused.")
            if inner.endswith("_config.json"):
                _vet_payloads(archive.read(file), refused)
            elif inner.endswith(".pt"):
                pickles.append(archive.read(file))
        _vet_graph(_json(archive.read(models[0]), refused), refused)
    return pickles


def _vet_payloads(config: bytes, refused: str) -> None:
    for key, value in _entries(_json(config, refused)):
        if (key == "use_pickle" and value) or (key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", str(value))):
            raise PackageError(f"{refused} holds pickled objects: code is refused.")


def _vet_graph(graph: Any, refused: str) -> None:
    for key, value in _entries(graph):
        if key == "target" and isinstance(value, str) and value and not _TARGET.fullmatch(value):
            raise PackageError(f"{refused} calls {value[:80]}, which is none of torch's operators on tensors.")
        if key == "expr_str" and not _only(str(value), _SIZE_WORDS):
            raise PackageError(f"{refused} has a size that is computed by more than arithmetic: code is refused.")
        if key == "guards_code" and isinstance(value, list) and not all(_only(str(line), _GUARD_WORDS) for line in value):
            raise PackageError(f"{refused} has a guard that is more than a comparison: code is refused.")


def _only(text: str, words: re.Pattern[str]) -> bool:
    """Whether all words of an expression are among these, and no attribute that isn't is reached."""
    return "__" not in text and all(words.fullmatch(word) for word in _WORD.findall(text))


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of every entry of nested JSON."""
    pairs = value.items() if isinstance(value, dict) else (("", inner) for inner in value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield key, inner
        yield from _entries(inner)


def _globals(data: bytes, name: str) -> Iterator[str]:
    """Yield the names "module attribute" that a pickle would look up; what hides them on the stack is yielded as it stands."""
    try:
        for code, argument, _ in pickletools.genops(data):
            if code.name in ("GLOBAL", "INST"):
                yield str(argument)
            elif code.name == "STACK_GLOBAL" or code.name.startswith("EXT"):
                yield f"something by {code.name}"
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise PackageError(f"The TorchScript of the package {name} holds a pickle that cannot be read.") from error


def _json(data: bytes, refused: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{refused} cannot be read.") from error


def _opened(data: bytes, name: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile as error:
        raise PackageError(f"The network of the package {name} is no archive that torch writes.") from error
