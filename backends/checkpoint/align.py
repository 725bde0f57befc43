"""Which weight of a program plays the part of which weight of an architecture.

Both graphs are walked from their outputs, two calls at a time.  Names and numbers of blocks do not
matter, and where the graphs differ, that is what the architecture cannot express.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir import Norm, Program, block_of, kept_calls, path_of
from ...ir.calls import argument, is_weight
from ...passes.blame import place_of
from ...passes.canonical.match import aten, is_call

Source = str | float
_CASTS = (aten._to_copy.default, aten.type_as.default)
_NO_MATTER = ("cudnn_enable",)  # arguments that choose a kernel, and no value


@dataclass(frozen=True, slots=True)
class Difference:
    """A call that the architecture does not make, and what it has in its place."""

    order: tuple[int, int]
    text: str


@dataclass(slots=True)
class Alignment:
    """What was found by walking a program and an architecture side by side.

    Attributes:
        weights: for each weight of the architecture what stands for it: names of weights of the
            program, or the number that all its entries are (1 for a gain, 0 for a bias that the
            program does without).
        biases: module paths of calls whose bias the architecture has no place for, and the calls.
        blocks: block of the architecture to block of the program.
        differences: where the graphs compute something else.
    """

    weights: dict[str, list[Source]] = field(default_factory=dict)
    biases: dict[str, fx.Node] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)


def align(program: Program, architecture: Program) -> Alignment:
    """Pair the calls of two canonical programs."""
    found = Alignment()
    names = _interface(program), _interface(architecture)
    if names[0] != names[1]:
        text = "graphs, inputs or outputs have other names than the architecture's"
        found.differences.append(Difference((-1, 0), text))
        return found
    for number, graph in enumerate(program.graphs):
        _Walk(program, architecture, graph, number, found).run()
    return found


def _interface(program: Program) -> dict[str, tuple[set[str], set[str]]]:
    return {name: (set(s.inputs), set(s.outputs)) for name, s in program.signatures.items()}


class _Walk:
    """Pairs the calls of one graph.

    Conversions between floating-point dtypes are stepped over: a program whose dtype was converted
    makes them at other places than one that was built in that dtype.  But a norm or a softmax
    that computes in a wider dtype than the architecture's was kept there on purpose.
    """

    def __init__(
        self, program: Program, architecture: Program, graph: str, number: int, found: Alignment
    ) -> None:
        self.found, self.number = found, number
        self.programs = program, architecture
        self.graphs = program.graphs[graph], architecture.graphs[graph]
        self.signatures = program.signatures[graph], architecture.signatures[graph]
        self.order = {node: place for place, node in enumerate(self.graphs[0].nodes)}
        self.sizes = _Sizes(program, graph), _Sizes(architecture, graph)
        self.kept = {*kept_calls(program, "norms"), *kept_calls(program, "softmax")}
        self.waiting: deque[tuple[fx.Node, fx.Node]] = deque()
        self.seen: set[tuple[fx.Node, fx.Node]] = set()

    def run(self) -> None:
        outputs = [
            dict(zip(signature.outputs, _results(graph), strict=True))
            for graph, signature in zip(self.graphs, self.signatures, strict=True)
        ]
        self.waiting.extend((node, outputs[1][name]) for name, node in outputs[0].items())
        while self.waiting:
            ours, theirs = map(_value, self.waiting.popleft())
            if (ours, theirs) not in self.seen:
                self.seen.add((ours, theirs))
                self._pair(ours, theirs)

    def _pair(self, ours: fx.Node, theirs: fx.Node) -> None:
        if ours.op != theirs.op or (ours.op != "get_attr" and ours.target != theirs.target):
            return self._differ(ours, theirs)
        if ours.op == "get_attr":
            return self._read(theirs, str(ours.target), ours)
        if ours.op == "placeholder":
            return None
        if ours in self.kept and (text := _wider(ours, theirs)):
            self._differ(ours, theirs, text)
        keys = block_of(theirs), block_of(ours)
        if keys[0] is not None and keys[1] is not None:
            self.found.blocks.setdefault(keys[0].partition("@")[0], keys[1].partition("@")[0])
        given, wanted = _arguments(ours), _arguments(theirs)
        if len(given) != len(wanted):
            return self._differ(ours, theirs)
        for (name, a), (_, b) in zip(given, wanted, strict=True):
            self._argument(ours, theirs, name, a, b)
        return None

    def _argument(self, ours: fx.Node, theirs: fx.Node, name: str, a: Any, b: Any) -> None:
        if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            for x, y in zip(a, b, strict=True):
                self._argument(ours, theirs, name, x, y)
        elif _is_size(a) and _is_size(b):
            sizes = self.sizes[0].of(a), self.sizes[1].of(b)
            if sizes[0] != sizes[1]:
                self._differ(ours, theirs, f"its {name} is {sizes[0]}, not {sizes[1]}")
        elif isinstance(a, fx.Node) and isinstance(b, fx.Node):
            self.waiting.append((a, b))
        elif is_weight(a) and b is None and name == "bias":
            self.found.biases.setdefault(path_of(theirs), ours)
        elif a is None and is_weight(b) and (value := _neutral(theirs, name)) is not None:
            self._read(b, value, ours)
        elif not _same_constant(a, b):
            self._differ(ours, theirs, f"its {name} is {_text(a)}, not {_text(b)}")

    def _read(self, theirs: fx.Node, source: Source, ours: fx.Node) -> None:
        program, architecture = self.programs
        wanted = architecture.weight(theirs).shape
        if isinstance(source, str) and program.weights[source].shape != wanted:
            shape = list(program.weights[source].shape)
            text = f"@{source} is {shape}, and the configuration says {list(wanted)}"
            self.found.differences.append(Difference((self.number, self.order[ours]), text))
            return
        sources = self.found.weights.setdefault(str(theirs.target), [])
        if source not in sources:
            sources.append(source)

    def _differ(self, ours: fx.Node, theirs: fx.Node, detail: str = "") -> None:
        text = f"{_place(ours)}: {detail or f'the architecture has {_place(theirs)} in its place'}"
        self.found.differences.append(Difference((self.number, self.order[ours]), text))


def _results(graph: fx.Graph) -> tuple[fx.Node, ...]:
    results: Any = graph.output_node().args[0]
    return tuple(results)


def _value(node: fx.Node) -> fx.Node:
    """Return the value that a chain of conversions between floating-point dtypes started from."""
    while is_call(node, _CASTS):
        source = argument(node, 0, "self")
        if not (_is_floating(node) and _is_floating(source)):
            break
        node = source
    return node


def _is_floating(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _wider(ours: fx.Node, theirs: fx.Node) -> str:
    """Say in which dtypes two calls compute, where the first one's is the wider; else nothing."""
    dtypes = []
    for node in (ours, theirs):
        value = node.meta["val"]
        value = value[0] if isinstance(value, tuple | list) else value
        dtypes.append(value.dtype)
    if dtypes[0].itemsize <= dtypes[1].itemsize:
        return ""
    mine, other = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"it computes in {mine}, and the architecture in {other}"


def _arguments(node: fx.Node) -> list[tuple[str, Any]]:
    """Return name and value of every argument of a call, with defaults where none is given."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [(str(place), value) for place, value in enumerate(node.args)]
    return [
        (one.name, argument(node, place, one.name, _default(one)))
        for place, one in enumerate(schema.arguments)
        if one.name not in _NO_MATTER
    ]


def _default(one: Any) -> Any:
    return one.default_value if one.has_default_value() else None


def _neutral(node: fx.Node, name: str) -> float | None:
    """Return the value of a gain or bias that changes nothing; None for another argument."""
    if name == "bias":
        return 0.0
    return 1.0 if name == "weight" and Norm.match(node) else None


def _is_size(value: Any) -> bool:
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


class _Sizes:
    """Sizes of one graph, as expressions in the names that its inputs' sizes have."""

    def __init__(self, program: Program, graph: str) -> None:
        import sympy

        signature = program.signatures[graph]
        self.names: dict[Any, Any] = {}
        for node in program.graphs[graph].find_nodes(op="placeholder"):
            dims = signature.dims[str(node.target)]
            for size, dim in zip(node.meta["val"].shape, dims, strict=True):
                if isinstance(size, torch.SymInt) and str(dim).isidentifier():
                    self.names.setdefault(size.node.expr, sympy.Symbol(str(dim)))

    def of(self, value: Any) -> Any:
        """Return a number, or an expression that equals another one of the same size."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, int):
            return value
        return value.node.expr.xreplace(self.names).expand()


def _same_constant(a: Any, b: Any) -> bool:
    """Tell whether two constants are the same; which floating dtype and device does not matter."""
    if isinstance(a, torch.dtype) and isinstance(b, torch.dtype):
        return a == b or (a.is_floating_point and b.is_floating_point)
    if isinstance(a, torch.device) or isinstance(b, torch.device):
        return True
    return type(a) is type(b) and bool(a == b)


def _text(value: Any) -> str:
    return "absent" if value is None else str(value)


def _place(node: fx.Node) -> str:
    """Return a call, weight or input as messages name it."""
    if node.op == "get_attr":
        return f"@{node.target}"
    return f"input {node.target}" if node.op == "placeholder" else place_of(node)


def first(differences: list[Difference]) -> str:
    """Return the text of the difference that comes first in the program."""
    return min(differences, key=lambda one: one.order).text
