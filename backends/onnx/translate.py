"""The adapter to onnxscript's torchlib: translations of single ATen calls that we have none for.

torchlib functions are Python functions that call ONNX operators.  They run here under an evaluator
of ours, which turns each operator call into a node of the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import evaluator
from onnxscript.function_libs.torch_lib import ops as torchlib  # fills the registry
from onnxscript.function_libs.torch_lib import registration
from torch import fx

from ...ir.errors import LoweringError
from .builder import Builder, onnx_dtype
from .emitter import Emitter, Result, is_size

assert torchlib

# What the attributes of a ``Constant`` make of their numbers.
_CONSTANTS = {
    "value_int": ir.DataType.INT64,
    "value_ints": ir.DataType.INT64,
    "value_float": ir.DataType.FLOAT,
    "value_floats": ir.DataType.FLOAT,
}

# What changes no value: where and how a result lies, and a sum of sizes that is known anyway.
_WITHOUT_VALUE = {"device", "layout", "pin_memory", "requires_grad", "output_size"}


def translate(e: Emitter, node: fx.Node) -> Result:
    """Append the nodes of torchlib's translation of a call that it knows and return the results."""
    function = _function(node.target)
    args = [_argument(e, arg) for arg in node.args]
    kwargs = {key: _argument(e, arg) for key, arg in _accepted(function, node).items()}
    recorder = _Recorder(e.builder)
    try:
        with _recording(recorder):
            results = recorder.eval_function(function, args, kwargs)
    except Exception as error:
        error.add_note(f"in torchlib's translation of %{node.name}: {node.target}")
        raise
    if isinstance(results, Sequence):
        return tuple(results)
    if not isinstance(results, ir.Value):
        raise LoweringError(f"%{node.name}: {node.target} is translated to {results!r}")
    return results


def knows(target: Any) -> bool:
    """Tell whether torchlib has a translation of an overload."""
    return _function(target) is not None


@functools.cache
def _function(target: Any) -> Any:
    """Return torchlib's function for an overload, or None."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = str(target.name())  # type: ignore[no-untyped-call]  # "aten::add.Tensor"
    registry = registration.default_registry
    overloads = registry[name].overloads if name in registry else []
    return overloads[0] if overloads else None


def _accepted(function: Any, node: fx.Node) -> dict[str, Any]:
    """Return the keywords that torchlib asks for.

    Raises:
        LoweringError: it does not ask for one that the values may depend on.
    """
    known = {key: value for key, value in node.kwargs.items() if key in function.op_signature}
    for key, value in node.kwargs.items():
        if key not in known and key not in _WITHOUT_VALUE and value is not None:
            raise LoweringError(f"%{node.name}: {node.target} has no translation with {key}=")
    return known


def _argument(e: Emitter, argument: Any) -> Any:
    """Return an argument as torchlib takes it: values, ONNX's dtypes, plain numbers."""
    if isinstance(argument, fx.Node):
        if is_size(argument) and isinstance(argument.meta["val"], int):
            return argument.meta["val"]
        result = e.values.get(argument)
        return list(result) if isinstance(result, tuple) else e.value(argument)
    if isinstance(argument, list | tuple):
        return [_argument(e, item) for item in argument]
    if isinstance(argument, torch.dtype):
        return int(onnx_dtype(argument))
    if isinstance(argument, torch.device | torch.memory_format | torch.layout):
        return str(argument)
    return argument


@contextmanager
def _recording(recorder: _Recorder) -> Iterator[None]:
    """Make operator calls, and arithmetic on values, append nodes."""
    before = ir.set_value_magic_handler(_Arithmetic(recorder))
    try:
        with evaluator.default_as(recorder):
            yield
    finally:
        ir.set_value_magic_handler(before)


class _Arithmetic:
    """What ``+`` and the like do on values."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __getattr__(self, kind: str) -> Callable[..., ir.Value]:
        return lambda *operands: self._recorder.plain(kind, operands)


class _Recorder:
    """An onnxscript evaluator that appends nodes instead of computing."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder

    def eval_op(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Append one operator.

        Args:
            op: an onnxscript operator.
            args: its inputs, then attributes, by position.
            kwargs: inputs and attributes by name.
        """
        return self._record(op.op_signature, args, kwargs)

    def eval_function(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a torchlib function, whose operator calls come back here."""
        signature = function.op_signature
        inputs, attributes = _by_name(signature, args, kwargs)
        types = _bound_types(signature, inputs)
        for name, value in inputs.items():
            if isinstance(value, bool | int | float):
                dtype = _dtype_for(signature.params_map[name], types, value)
                inputs[name] = self._builder.constant(value, dtype)
        plain = function.func if hasattr(function, "func") else function.function
        return plain(**inputs, **attributes)

    def plain(self, kind: str, operands: Sequence[Any]) -> ir.Value:
        """Append an arithmetic operator of values and numbers."""
        dtype = next(x.dtype for x in operands if isinstance(x, ir.Value))
        values = [x if isinstance(x, ir.Value) else self._number(x, dtype) for x in operands]
        return self._builder.op(kind, *values)

    def _number(self, value: Any, dtype: ir.DataType | None) -> ir.Value:
        return self._builder.constant(value, dtype or _natural(value))

    def _record(self, signature: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        inputs, attributes = _by_name(signature, args, kwargs)
        types = _bound_types(signature, inputs)
        flat: list[ir.Value | None] = []
        for name, value in inputs.items():
            parameter = signature.params_map[name]
            if parameter.variadic:
                flat.extend(self._input(parameter, types, item) for item in value)
            else:
                flat.append(self._input(parameter, types, value))
        count = _output_count(signature, attributes)
        outputs = self._builder.multi(
            signature.name, *flat, count=count, domain=signature.domain, **attributes
        )
        for output, parameter in zip(outputs, signature.outputs, strict=False):
            dtype = _result_dtype(parameter, types, attributes)
            if dtype is not None:
                output.dtype = dtype
        return outputs[0] if count == 1 else outputs

    def _input(
        self, parameter: Any, types: Mapping[str, ir.DataType], value: Any
    ) -> ir.Value | None:
        if value is None or isinstance(value, ir.Value):
            return value
        if isinstance(value, ir.TensorProtocol):
            return self._builder.array(value.numpy())
        if isinstance(value, list | tuple) and any(isinstance(v, ir.Value) for v in value):
            return self._join(value)
        dtype = _dtype_for(parameter, types, value)
        return self._builder.constant(value, dtype)

    def _join(self, items: Sequence[Any]) -> ir.Value:
        """Return numbers and scalars as one row."""
        row = self._builder.ints(-1)
        parts = [
            self._builder.op("Reshape", item, row)
            if isinstance(item, ir.Value)
            else self._builder.ints(item)
            for item in items
        ]
        return self._builder.op("Concat", *parts, axis=0)


def _by_name(
    signature: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return inputs and attributes by name; an attribute that was not given keeps its default."""
    rest = list(args)
    inputs: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for parameter in signature.params:
        name, is_input = parameter.name, isinstance(parameter, ir.schemas.Parameter)
        if is_input and parameter.variadic:
            inputs[name], rest = rest, []
            continue
        given = rest.pop(0) if rest else kwargs.get(name)
        if is_input:
            inputs[name] = given
        elif given is not None:
            value = given.value if isinstance(given, ir.Attr) else given
            floats = parameter.type == ir.AttributeType.FLOAT
            attributes[name] = float(value) if floats else value
    return inputs, attributes


def _bound_types(signature: Any, inputs: Mapping[str, Any]) -> dict[str, ir.DataType]:
    """Return the dtype of each type variable that an input with a known dtype binds."""
    types: dict[str, ir.DataType] = {}
    for name, value in inputs.items():
        constraint = signature.params_map[name].type_constraint.name
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, ir.Value) and item.dtype is not None:
                types.setdefault(constraint, item.dtype)
    return types


def _dtype_for(parameter: Any, types: Mapping[str, ir.DataType], value: Any) -> ir.DataType:
    """Return the dtype that a Python number takes as this input."""
    constraint = parameter.type_constraint
    if constraint.name in types:
        return types[constraint.name]
    if len(constraint.allowed_types) == 1:
        dtype: ir.DataType = next(iter(constraint.allowed_types)).dtype
        return dtype
    return _natural(value[0] if isinstance(value, list | tuple) and value else value)


def _natural(value: Any) -> ir.DataType:
    if isinstance(value, bool):
        return ir.DataType.BOOL
    return ir.DataType.FLOAT if isinstance(value, float) else ir.DataType.INT64


def _output_count(signature: Any, attributes: Mapping[str, Any]) -> int:
    if signature.name == "BatchNormalization" and not attributes.get("training_mode"):
        return 1
    if signature.name == "Split":
        return int(attributes["num_outputs"])
    return len(signature.outputs)


def _result_dtype(
    parameter: Any, types: Mapping[str, ir.DataType], attributes: Mapping[str, Any]
) -> ir.DataType | None:
    """Return a result's dtype, as far as the operator's types say it."""
    constraint = parameter.type_constraint
    if constraint.name in types:
        return types[constraint.name]
    if "to" in attributes:
        return ir.DataType(attributes["to"])
    for key, value in attributes.items():
        if key == "value" and isinstance(value, ir.TensorProtocol):
            return value.dtype
        if key in _CONSTANTS:
            return _CONSTANTS[key]
    if len(constraint.allowed_types) == 1:
        dtype: ir.DataType = next(iter(constraint.allowed_types)).dtype
        return dtype
    return None
