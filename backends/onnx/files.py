"""Writes ONNX files, one weight in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

ALIGNMENT = 4096  # of each tensor in the data file, so that it can be memory-mapped
_INLINE = 1024  # bytes; smaller tensors stay in the ONNX file, where shape inference sees them


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers; nothing is read."""
    return sum(tensor.nbytes for tensor in _tensors(model))


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
    if external:
        data = path.with_name(f"{path.name}.data")
        with data.open("wb") as stream:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and tensor.nbytes > _INLINE:
                    value.const_value = _write_tensor(tensor, stream, data)
                advance(1)
    else:
        advance(len(model.graph.initializers))
    path.write_bytes(ir.to_proto(model).SerializeToString())


def _tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    values = model.graph.initializers.values()
    return [value.const_value for value in values if value.const_value is not None]


def _write_tensor(tensor: ir.TensorProtocol, stream: BinaryIO, data: Path) -> ir.ExternalTensor:
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
