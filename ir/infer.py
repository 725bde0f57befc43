"""Shapes and dtypes: fake runs of calls under a program's own symbolic sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from .blocks import marks_of, set_info
from .dims import evaluate
from .errors import VerifyError
from .program import Signature
from .weights import Weight, Weights

# Hints of sizes that no example tells: different primes, so that no two sizes look equal by
# accident; small ones, so that they are within a model's positions.
_HINTS = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """Return the mode that the values of ``graph`` live in."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    raise VerifyError("typed", "graph", "has no tensor with a shape and dtype")


def fake_weight(mode: FakeTensorMode, weight: Weight) -> torch.Tensor:
    """Return a tensor without data that has the weight's shape and dtype."""
    with mode:
        return torch.empty(weight.shape, dtype=weight.dtype)


class Sizes:
    """Named symbolic sizes under one shape environment.

    Args:
        hints: values to have in mind for sizes by name, where any small number would not do: a
            sequence that is cut into chunks must have more than one.
    """

    def __init__(self, hints: Mapping[str, int] | None = None) -> None:
        self.hints = dict(hints or {})
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self._sizes: dict[str, torch.SymInt] = {}

    def named(self, name: str) -> torch.SymInt:
        """Return the size called ``name``, new or known."""
        if name not in self._sizes:
            from torch._dynamo.source import ConstantSource

            hint = self.hints.get(name, _HINTS[len(self._sizes) % len(_HINTS)])
            source = ConstantSource(f"size_{name}")
            symbol = self.env.create_symbol(
                hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
            )
            size = self.env.create_symintnode(symbol, hint=hint, source=source)
            assert isinstance(size, torch.SymInt)
            self._sizes[name] = size
        return self._sizes[name]

    def size(self, text: int | str) -> int | torch.SymInt:
        """Return the size that ``text`` stands for: a number, or a sum of products of names."""
        size: int | torch.SymInt = evaluate(text, self.named)
        return size

    def tensor(self, dims: tuple[int | str, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor without data of those sizes."""
        with self.mode:
            return torch.empty(tuple(self.size(dim) for dim in dims), dtype=dtype)


def size_hints(graph: fx.Graph, signature: Signature) -> dict[str, int]:
    """Return the values that the named sizes of a graph's inputs were given as hints."""
    found = [
        (text, int(size.node.hint))
        for node, name in zip(graph.find_nodes(op="placeholder"), signature.inputs, strict=True)
        for size, text in zip(node.meta["val"].shape, signature.dims[name], strict=True)
        if isinstance(text, str) and isinstance(size, torch.SymInt)
    ]
    hints: dict[str, int] = {}
    for text, value in sorted(found, key=lambda each: not each[0].isidentifier()):
        learn(text, value, hints)
    return hints


def learn(text: str, value: int, known: dict[str, int]) -> None:
    """Note the value of the one name in a size that is not known yet, if there is just one."""
    names = {name for name in re.findall(r"[A-Za-z_]\w*", text) if name not in known}
    if len(names) == 1:
        at_0, at_1 = (evaluate(text, {**dict.fromkeys(names, n), **known}.get) for n in (0, 1))
        known[names.pop()] = (value - at_0) // (at_1 - at_0)


def infer_graph(
    graph: fx.Graph,
    signature: Signature,
    weights: Weights,
    dtypes: Mapping[str, torch.dtype],
    sizes: Sizes,
    step: Callable[[], None] = lambda: None,
) -> None:
    """Give every node of ``graph`` its shape and dtype, from the inputs' sizes and dtypes.

    ``step`` is called after every node.
    """
    names = iter(signature.inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            name = next(names)
            node.meta["val"] = sizes.tensor(signature.dims[name], dtypes[name])
        elif node.op == "get_attr":
            node.meta["val"] = fake_weight(sizes.mode, weights[str(node.target)])
        elif node.op == "call_function":
            node.meta["val"] = infer_call(sizes.mode, node)
            note_inferred(node)
        step()


def infer_call(mode: FakeTensorMode, node: fx.Node) -> Any:
    """Return shape and dtype of a call from those of its arguments."""
    args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
    assert callable(node.target)
    # The python dispatcher knows shape rules for symbolic sizes that the C++ kernels refuse.
    with enable_python_dispatcher(), mode, torch.no_grad():
        return node.target(*args, **kwargs)


def _arguments(node: fx.Node) -> list[Any]:
    """Return what a call depends on: its target, and the values and constants it is given."""
    found: list[Any] = [node.target, node.meta["val"]]

    def note(leaf: Any) -> Any:
        found.append(leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf)
        return leaf

    fx.node.map_aggregate((node.args, node.kwargs), note)
    return found


def note_inferred(node: fx.Node) -> None:
    """Note that the type of a call follows from its arguments as they are."""
    node.meta["inferred"] = _arguments(node)


def is_inferred(node: fx.Node) -> bool:
    """Tell whether neither a call nor the types of its arguments changed since it was inferred.

    Copies of a graph share these notes, so that only what a pass edited is inferred again.
    """
    noted = node.meta.get("inferred")
    if noted is None:
        return False
    found = _arguments(node)
    return len(noted) == len(found) and all(map(_same, noted, found))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    plain = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
    return type(a) is type(b) and isinstance(a, plain) and a == b


def insert_call(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    before: fx.Node,
    like: fx.Node,
) -> fx.Node:
    """Insert a typed call.

    Args:
        graph: the graph to edit.
        target: the operator.
        args: its arguments; nodes stand for their values.
        kwargs: its keyword arguments.
        before: the node that the call is listed before.
        like: the node whose place in the model (module path, block) the call takes over.
    """
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs or {})
    node.meta["val"] = infer_call(fake_mode(graph), node)
    note_inferred(node)
    if "custom" in like.meta:
        node.meta["custom"] = like.meta["custom"]
    if marks_of(node):
        set_info(node, marks={})
    return node
