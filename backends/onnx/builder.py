"""Appends nodes and initializers to an ONNX graph; nothing here knows torch's operators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from ...ir.errors import LoweringError

Scalar = bool | int | float

_STORED = {
    torch.bool: ir.DataType.BOOL,
    torch.uint8: ir.DataType.UINT8,
    torch.int8: ir.DataType.INT8,
    torch.int16: ir.DataType.INT16,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
}


def stored_dtype(dtype: torch.dtype) -> ir.DataType:
    """Return ONNX's name of a torch dtype, as inputs, outputs and weights have it.

    Raises:
        LoweringError: ONNX Runtime has no such numbers.
    """
    if dtype not in _STORED:
        raise LoweringError(f"{dtype} has no counterpart in ONNX Runtime")
    return _STORED[dtype]


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """Return the dtype in which numbers of a torch dtype are computed.

    bfloat16 is computed in float32: ONNX Runtime has next to no kernels for it on processors.
    """
    stored = stored_dtype(dtype)
    return ir.DataType.FLOAT if stored == ir.DataType.BFLOAT16 else stored


class Builder:
    """One ONNX graph under construction.

    Attributes:
        graph: the graph, inputs and outputs included.
        opset: version of the standard operators.
        scope: prefix of the names of new nodes; the module path of the call being translated.
    """

    def __init__(self, name: str, opset: int) -> None:
        imports = {"": opset, "com.microsoft": 1}
        self.graph = ir.Graph([], [], nodes=[], opset_imports=imports, name=name)
        self.opset = opset
        self.scope = ""
        self._constants: dict[tuple[object, ...], ir.Value] = {}
        self._count = 0
        self._names: set[str] = set()

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        domain: str = "",
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Append a node with one output and return that.

        Args:
            kind: the ONNX operator.
            inputs: its inputs; None leaves an optional one out.
            domain: the operator set; empty: the standard one.
            dtype: of the result, where somebody will ask for it; default: that of the first
                input, which is right for most operators.
            attributes: Python values; an attribute that is None is left out.
        """
        (output,) = self.multi(kind, *inputs, count=1, domain=domain, **attributes)
        given = dtype if dtype is not None else next((x.dtype for x in inputs if x), None)
        if given is not None:
            output.dtype = given
        return output

    def multi(
        self, kind: str, *inputs: ir.Value | None, count: int, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Append a node with ``count`` outputs and return them."""
        kept = {key: value for key, value in attributes.items() if value is not None}
        last = max((i for i, value in enumerate(inputs) if value is not None), default=-1)
        self._count += 1
        node = ir.Node(
            domain,
            kind,
            inputs[: last + 1],
            ir.convenience.convert_attributes(kept),
            num_outputs=count,
            name=f"{self.scope}/{kind}_{self._count}",
        )
        for index, output in enumerate(node.outputs):
            output.name = f"{kind}_{self._count}" + (f".{index}" if count > 1 else "")
        self.graph.append(node)
        return tuple(node.outputs)

    def append(self, node: ir.Node) -> None:
        """Append a node that somebody else made."""
        self._count += 1
        node.name = f"{self.scope}/{node.op_type}_{self._count}"
        for index, output in enumerate(node.outputs):
            output.name = f"{node.op_type}_{self._count}.{index}"
        self.graph.append(node)

    def array(self, array: NDArray[Any]) -> ir.Value:
        """Return an initializer holding a small array; equal ones are one."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self.initializer(ir.tensor(array, name=name), name)
        return self._constants[key]

    def constant(self, value: Scalar | Sequence[Scalar], dtype: ir.DataType) -> ir.Value:
        """Return a number or a row of numbers as an initializer; equal ones are one."""
        with np.errstate(over="ignore"):
            return self.array(np.array(value).astype(dtype.numpy()))

    def ints(self, *values: int) -> ir.Value:
        """Return a row of ``int64``."""
        return self.array(np.array(values, dtype=np.int64))

    def initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """Add a tensor to the graph's initializers."""
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return ``value`` in ``dtype``: itself when it is of that already."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", value, dtype=dtype, to=int(dtype))

    def reserve(self, names: Iterable[str]) -> None:
        """Keep names of inputs, outputs and weights from being given to anything else."""
        self._names.update(names)

    def rename(self, value: ir.Value, name: str) -> None:
        """Give a value a name, or the next free one like it."""
        free, number = name, 0
        while free in self._names:
            number += 1
            free = f"{name}_{number}"
        self._names.add(free)
        value.name = free

    def prune(self) -> None:
        """Remove nodes whose results nobody reads, and initializers that no node reads."""
        for node in reversed(self.graph):
            if not any(out.is_graph_output() or out.uses() for out in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]
