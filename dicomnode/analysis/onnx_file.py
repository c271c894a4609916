"""What stands in an ONNX file: its tensors, walked in the wire format of protocol buffers (onnx.proto3), with nothing else read.

A session loads the file; this module only says what must be known before: whether weights lie in other files, and whether all are finite.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dicomnode.errors import PackageError

_FLOATS = {1: "<f4", 10: "<f2", 11: "<f8"}  # TensorProto.DataType; bfloat16 (16) is looked at as its own case
_FIELDS = {4: "<f4", 9: "", 10: "<f8"}  # float_data, raw_data (as the data type says), double_data
# Fields that lead to tensors: message -> {field number: message}
_WAY = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor"},
}
_DEPTH = 32  # graphs within graphs


def vet_onnx(data: bytes, name: str) -> None:
    """Look at the tensors of an ONNX file.

    Raises:
        PackageError: the file is malformed, its weights lie in other files, or hold numbers that are not finite.
    """
    try:
        for tensor in _tensors(memoryview(data), "model", 0):
            kind, external, values = _tensor(tensor)
            if external:
                raise PackageError(f"The ONNX file of the package {name} keeps weights in other files, which is refused.")
            if not _finite(kind, values):
                raise PackageError(f"The weights of the package {name} hold numbers that are not finite.")
    except (IndexError, ValueError) as error:
        raise PackageError(f"The ONNX file of the package {name} cannot be read.") from error


def _tensors(data: memoryview, message: str, depth: int) -> Iterator[memoryview]:
    if depth > _DEPTH:
        raise ValueError("too deep")
    if message == "tensor":
        yield data
        return
    for number, value in _fields(data):
        inner = _WAY[message].get(number)
        if inner is not None and isinstance(value, memoryview):
            yield from _tensors(value, inner, depth + 1)


def _tensor(data: memoryview) -> tuple[int, bool, list[tuple[str, memoryview]]]:
    """Return data type, whether its values lie elsewhere, and its values as bytes with the type that their field implies."""
    kind, external = 0, False
    values: list[tuple[str, memoryview]] = []
    for number, value in _fields(data):
        if number == 2 and isinstance(value, int):
            kind = value
        elif number == 13 or (number == 14 and value == 1):
            external = True
        elif isinstance(value, memoryview) and number in _FIELDS:
            values.append((_FIELDS[number], value))
    return kind, external, values


def _finite(kind: int, values: list[tuple[str, memoryview]]) -> bool:
    for of_field, raw in values:
        dtype = of_field or _FLOATS.get(kind, "")
        if dtype and not np.isfinite(np.frombuffer(raw, dtype=dtype)).all():
            return False
        if not of_field and kind == 16 and bool((np.frombuffer(raw, dtype="<u2") & 0x7F80 == 0x7F80).any()):
            return False
    return True


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of one message: whole numbers as such, what has a length as its bytes, fixed ones as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            whole, at = _varint(data, at)
            yield key >> 3, whole
            continue
        length = {1: 8, 5: 4}.get(wire, -1)
        if wire == 2:
            length, at = _varint(data, at)
        if length < 0 or at + length > len(data):
            raise ValueError("malformed")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("malformed")
