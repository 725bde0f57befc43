"""A functional graph of ATen calls to an ONNX graph, one call after the other."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ...ir.errors import LoweringError
from ...ir.program import Signature
from ...ir.weights import Weight
from .builder import Builder, onnx_dtype, stored_dtype
from .emitter import Emitter, Result, is_size, torch_dtype
from .handlers import HANDLERS
from .products import readers_are_linears
from .quantized import EMBEDDING
from .sizes import Sizes, UnknownSizeError, expression

IR_VERSION = 10
_SMALL = 4096  # numbers; a larger constant is made when the model runs


def emit(
    graph: fx.Graph,
    signature: Signature,
    weights: Mapping[str, Weight],
    *,
    name: str = "main",
    opset: int = 23,
    accuracy_level: int = 4,
) -> ir.Model:
    """Translate a graph; weights are not read before the model is written.

    Args:
        graph: functional calls on typed nodes, as programs hold them.
        signature: names of its inputs and outputs, and of the inputs' symbolic sizes.
        weights: name to weight, for every ``get_attr`` node.
        name: of the ONNX graph.
        opset: version of the standard operators, 18 to 23.
        accuracy_level: of quantised products: 4 rounds activations to 8-bit integers, 1 does not.

    Raises:
        LoweringError: a call that has no translation; the message names it.
    """
    builder = Builder(name, opset)
    builder.reserve((*signature.inputs, *signature.outputs, *weights))
    sizes = Sizes(builder, _symbol_names(graph, signature))
    emitter = Emitter(builder, sizes, weights, accuracy_level)
    emitter.transposed = _transposed(graph)
    emitter.looked_up = _looked_up(graph)
    inputs = iter(signature.inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            _add_input(emitter, node, next(inputs))
        elif node.op == "call_function":
            _add_call(emitter, node)
        elif node.op == "output":
            _add_outputs(emitter, node, signature)
    builder.prune()
    return ir.Model(builder.graph, ir_version=IR_VERSION, producer_name="modelathe")


def _symbol_names(graph: fx.Graph, signature: Signature) -> dict[Any, str]:
    """Return what to call each symbol: the name of the input size that it is."""
    names: dict[Any, str] = {}
    for node, name in zip(graph.find_nodes(op="placeholder"), signature.inputs, strict=True):
        for size, text in zip(node.meta["val"].shape, signature.dims.get(name, ()), strict=False):
            made = expression(size)
            if made.is_Symbol and isinstance(text, str):
                names.setdefault(made, text)
    return names


def _transposed(graph: fx.Graph) -> set[str]:
    """Return the weights that are stored as ``[in, out]``."""
    readers: dict[str, list[fx.Node]] = {}
    for node in graph.find_nodes(op="get_attr"):
        readers.setdefault(str(node.target), []).append(node)
    return {name for name, nodes in readers.items() if readers_are_linears(nodes)}


def _looked_up(graph: fx.Graph) -> set[str]:
    """Return the codes that an embedding reads."""
    return {
        str(codes.target)
        for node in graph.find_nodes(op="call_function", target=EMBEDDING)
        if isinstance(codes := node.args[1], fx.Node)
    }


def _add_input(e: Emitter, node: fx.Node, name: str) -> None:
    fake = node.meta["val"]
    value = ir.Value(
        name=name,
        type=ir.TensorType(stored_dtype(fake.dtype)),
        shape=ir.Shape([e.sizes.text(size) for size in fake.shape]),
    )
    e.builder.graph.inputs.append(value)
    e.values[node] = e.builder.cast(value, onnx_dtype(fake.dtype))
    e.sizes.bind(value, fake.shape)


def _add_call(e: Emitter, node: fx.Node) -> None:
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        e.values[node] = e.values[node.args[0]][node.args[1]]  # type: ignore[index]
        return
    if is_size(node):
        _add_size(e, node)
        return
    if isinstance(node.meta["val"], torch.SymFloat):
        _add_number(e, node)
        return
    e.builder.scope = _scope(node)
    result = _folded(e, node)
    if result is None:
        handler = HANDLERS.get(node.target)
        result = handler(e, node, *node.args, **node.kwargs) if handler else NotImplemented
        if result is NotImplemented:
            result = _add_unknown(e, node)
    e.values[node] = result
    _describe(e, node, result)


def _folded(e: Emitter, node: fx.Node) -> ir.Value | None:
    """Return a call that reads nothing as its value, when that is small."""
    fake, target = node.meta["val"], node.target
    if node.all_input_nodes or not isinstance(fake, torch.Tensor) or fake.numel() > _SMALL:
        return None
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    result = target(*node.args, **node.kwargs)
    wide = result.float() if result.dtype == torch.bfloat16 else result
    return e.builder.array(wide.numpy())


def _add_unknown(e: Emitter, node: fx.Node) -> Result:
    """Translate a call by torchlib, or by the simpler calls that torch makes of it."""
    from .decompose import decompose
    from .translate import knows, translate

    if knows(node.target):
        return translate(e, node)
    inner = decompose(node)
    if inner is None:
        raise _unknown(node)
    sources = iter(node.all_input_nodes)
    for part in inner.nodes:
        if part.op == "placeholder":
            e.values[part] = e.values.get(source := next(sources), ()) or e.value(source)
        elif part.op == "call_function":
            _add_call(e, part)
        elif part.op != "output":
            raise _unknown(node)
    (output,) = inner.find_nodes(op="output")
    results = output.args[0]
    if isinstance(results, fx.Node):
        return e.value(results)
    return tuple(e.value(result) for result in results)


def _scope(node: fx.Node) -> str:
    stack = node.meta.get("custom", {}).get("modelathe", {})
    path = stack.get("path", "")
    return f"{path}/{node.name}" if path else node.name


def _add_size(e: Emitter, node: fx.Node) -> None:
    """Translate an integer: by its formula, or, where it depends on data, by its own operator."""
    size = node.meta["val"]
    try:
        e.sizes.row(size)
    except UnknownSizeError:
        rule = _SIZE_RULES.get(node.target)
        if rule is None:
            raise _unknown(node) from None
        parts = [e.row(arg) for arg in node.args if isinstance(arg, int | fx.Node)]
        e.sizes.remember(size, e.op(rule, *parts))


def _add_number(e: Emitter, node: fx.Node) -> None:
    """Translate a fraction that is made of sizes."""
    rule = _NUMBER_RULES.get(node.target)
    if rule is None:
        raise _unknown(node)
    parts = [e.tensor(arg, ir.DataType.FLOAT) for arg in node.args]  # type: ignore[arg-type]
    e.values[node] = parts[0] if rule == "Identity" else e.op(rule, *parts)


_SIZE_RULES: dict[Any, str] = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul"}
_NUMBER_RULES: dict[Any, str] = {
    **_SIZE_RULES,
    operator.truediv: "Div",
    operator.pow: "Pow",
    torch.sym_float: "Identity",
    torch.sym_sqrt: "Sqrt",
}


def _unknown(node: fx.Node) -> LoweringError:
    return LoweringError(f"%{node.name}: {node.target} has no translation to ONNX")


def _describe(e: Emitter, node: fx.Node, result: Result) -> None:
    """Give results the names, dtypes and sizes of the node."""
    fakes = node.meta["val"]
    if isinstance(result, ir.Value):
        _describe_one(e, result, fakes, node.name)
        return
    for index, (value, fake) in enumerate(zip(result, fakes, strict=True)):
        _describe_one(e, value, fake, f"{node.name}.{index}")


def _describe_one(e: Emitter, value: ir.Value, fake: Any, name: str) -> None:
    known = value.producer() is None or value.meta.get("described")
    if known or not isinstance(fake, torch.Tensor):
        return
    value.meta["described"] = True
    e.builder.rename(value, name)
    value.dtype = onnx_dtype(fake.dtype)
    value.shape = ir.Shape([e.sizes.text(size) for size in fake.shape])
    e.sizes.bind(value, fake.shape)


def _add_outputs(e: Emitter, node: fx.Node, signature: Signature) -> None:
    results = node.args[0]
    assert isinstance(results, tuple)
    for source, name in zip(results, signature.outputs, strict=True):
        assert isinstance(source, fx.Node)
        value = e.builder.cast(e.value(source), stored_dtype(torch_dtype(source)))
        if value.producer() is None or value.is_graph_output():
            value = e.op("Identity", value)  # an output is a result of its own, by its own name
        value.name = name
        fake = source.meta["val"]
        shape = fake.shape if isinstance(fake, torch.Tensor) else ()
        value.shape = ir.Shape([e.sizes.text(size) for size in shape])
        e.builder.graph.outputs.append(value)
