"""Writes ONNX files, one weight in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import onnx_ir as ir

from ...ir.errors import ModelatheError

if TYPE_CHECKING:
    import onnx

ALIGNMENT = 4096  # of each tensor in the data file, so that it can be memory-mapped
_SMALL = 1024  # bytes; smaller tensors stay with the graph, where shape inference sees them

# Field numbers of ModelProto.graph, GraphProto.initializer and TensorProto.raw_data.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers; nothing is read."""
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def save_model(
    model: ir.Model, path: Path, *, external: bool, advance: Callable[[int], None]
) -> None:
    """Write a model, and next to it ``NAME.onnx.data`` when the data goes to a file of its own.

    Args:
        model: its initializers are read one after the other; it is used up.
        path: the file; its folder exists.
        external: write the weights to the data file.
        advance: called with 1 for each initializer written.
    """
    large = _detach_large(model)
    if external:
        data = path.with_name(f"{path.name}.data")
        with data.open("wb") as stream:
            for value, tensor in large:
                value.const_value = _write_aligned(tensor, stream, data)
                model.graph.initializers.add(value)
                advance(1)
        large = []
    with path.open("wb") as stream:
        stream.write(_to_proto(model).SerializeToString())
        for _, tensor in large:
            _append_initializer(tensor, stream)
            advance(1)


def _to_proto(model: ir.Model) -> onnx.ModelProto:
    """Return the message of a model; what a weight raises comes through as it is."""
    try:
        return ir.to_proto(model)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # one for each level of the model
            cause = cause.__cause__
        if isinstance(cause, ModelatheError | OSError):
            raise cause from None
        raise


def _detach_large(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """Take the large initializers out of the model and return them."""
    initializers = model.graph.initializers
    large = []
    for value in list(initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _SMALL:
            large.append((value, tensor))
            del initializers[str(value.name)]
    return large


def _write_aligned(tensor: ir.TensorProtocol, stream: BinaryIO, data: Path) -> ir.ExternalTensor:
    """Append a tensor's bytes at the next aligned place and return what stands for them."""
    offset = -(-stream.tell() // ALIGNMENT) * ALIGNMENT
    stream.seek(offset)
    tensor.tofile(stream)
    return ir.ExternalTensor(
        location=data.name,
        offset=offset,
        length=stream.tell() - offset,
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape),
        name=str(tensor.name),
        base_dir=data.parent,
    )


def _append_initializer(tensor: ir.TensorProtocol, stream: BinaryIO) -> None:
    """Append one initializer to a serialised model.

    A message that is followed by a further piece of itself is merged with it, which is how
    protobuf is defined; so no more than one tensor need be in memory.
    """
    import onnx

    head = onnx.TensorProto(name=tensor.name, data_type=int(tensor.dtype), dims=tensor.shape)
    start = head.SerializeToString() + _field(_RAW_DATA, tensor.nbytes)
    inner = _field(_INITIALIZER, len(start) + tensor.nbytes)
    stream.write(_field(_GRAPH, len(inner) + len(start) + tensor.nbytes))
    stream.write(inner + start)
    tensor.tofile(stream)


def _field(number: int, length: int) -> bytes:
    """Return the start of a field that ``length`` bytes follow."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(number: int) -> bytes:
    """Return a number in groups of 7 bits, low ones first.

    >>> _varint(300).hex()
    'ac02'
    """
    groups = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])
