"""The streaming interpreter: weights are loaded on use, values are freed after their last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import DataError
from .program import MAIN, Program


def run(
    program: Program,
    inputs: Mapping[str, Tensor],
    graph: str = MAIN,
    observe: Callable[[fx.Node, Any], None] | None = None,
    dtype: torch.dtype | None = None,
    bypass: Mapping[fx.Node, fx.Node] | None = None,
    device: str = "cpu",
    amend: Callable[[fx.Node, Any], Any] | None = None,
) -> dict[str, Tensor]:
    """Run a graph of ``program`` without gradients.

    Args:
        program: what to run.
        inputs: a tensor for every input of the graph's signature.
        graph: which graph.
        observe: called with each node and its value.
        dtype: compute every floating-point value in this dtype instead of the graph's own;
            computed weights then round to it, not to the dtype they are stored in.
        bypass: node to the node whose value its readers get instead.
        device: where to compute; weights go there one at a time, outputs come back.
        amend: from each node and its value to the value that its readers get.

    Raises:
        DataError: an input is missing, or is not one of the signature's.
    """
    signature = program.signatures[graph]
    if set(inputs) != set(signature.inputs):
        missing = [name for name in signature.inputs if name not in inputs]
        unknown = [name for name in inputs if name not in signature.inputs]
        raise DataError(f"inputs do not fit {graph}: missing {missing}, unknown {unknown}")
    place = Place(dtype, None if device == "cpu" else torch.device(device))
    feed = [place.tensor(inputs[name]) for name in signature.inputs]

    def load(node: fx.Node) -> Tensor:
        weight = program.weight(node)
        value = place.tensor(weight.load(dtype if weight.dtype.is_floating_point else None))
        return program.weights.as_held(str(node.target), value)

    with torch.no_grad():
        values = interpret(program.graphs[graph], feed, load, observe, place, bypass, amend)
    outputs = zip(signature.outputs, values, strict=True)
    return {name: _plain(value).cpu() for name, value in outputs}


@dataclass(frozen=True, slots=True)
class Place:
    """What to compute in and where, instead of what a graph says; None leaves it as it is."""

    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def tensor(self, value: Tensor) -> Tensor:
        """Return a tensor in this place."""
        dtype = self.dtype if value.is_floating_point() else None
        return value.to(dtype=dtype or value.dtype, device=self.device or value.device)

    def constant(self, argument: Any) -> Any:
        """Return an argument of a call, with a dtype or device that it names replaced."""
        if isinstance(argument, torch.dtype) and argument.is_floating_point:
            return self.dtype or argument
        if isinstance(argument, torch.device):
            return self.device or argument
        return argument


def interpret(
    graph: fx.Graph,
    inputs: list[Tensor],
    load: Callable[[fx.Node], Tensor],
    observe: Callable[[fx.Node, Any], None] | None = None,
    place: Place | None = None,
    bypass: Mapping[fx.Node, fx.Node] | None = None,
    amend: Callable[[fx.Node, Any], Any] | None = None,
) -> tuple[Tensor, ...]:
    """Call every node in order and return the outputs.

    Args:
        graph: a graph of calls.
        inputs: one value per placeholder, in order.
        load: gives the tensor of a ``get_attr`` node.
        observe: called with each node and its value.
        place: replaces the dtypes and devices that calls name.
        bypass: node to the node whose value its readers get instead; what nobody reads then is
            not called.
        amend: from each node and its value to the value that its readers get, and ``observe``.
    """
    stands_for = _followed(bypass or {})
    order = _needed(graph, stands_for) if bypass else list(graph.nodes)
    dying = _last_uses(order, stands_for)
    values: dict[fx.Node, Any] = {}

    def value_of(node: fx.Node) -> Any:
        return values[stands_for.get(node, node)]

    feed = iter(inputs)
    for node in order:
        if node.op == "placeholder":
            value: Any = next(feed)
        elif node.op == "get_attr":
            value = load(node)
        elif node.op == "output":
            results: Any = node.args[0]
            return tuple(value_of(result) for result in results)
        else:
            args = fx.node.map_arg(node.args, value_of)
            kwargs = fx.node.map_arg(node.kwargs, value_of)
            if place is not None and place != Place():
                args, kwargs = fx.node.map_aggregate((args, kwargs), place.constant)
            target: Any = node.target
            value = target(*args, **kwargs)
            del args, kwargs
        if amend is not None:
            value = amend(node, value)
        if observe is not None:
            observe(node, _plain(value))
        values[node] = value
        for source in dying.get(node, ()):
            values.pop(source, None)
    raise AssertionError("a graph ends with its output node")


def _plain(value: Any) -> Any:
    """Return a value that is a parameter, and not trained, as a tensor without a gradient.

    A weight is one, and so is what a call gives that hands it on.
    """
    trained = torch.is_grad_enabled() or not isinstance(value, Tensor)
    return value if trained or not value.requires_grad else value.detach()


def _followed(bypass: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return ``bypass`` with chains of bypassed nodes followed to their end."""
    found = {}
    for node, instead in bypass.items():
        while instead in bypass:
            instead = bypass[instead]
        found[node] = instead
    return found


def _needed(graph: fx.Graph, stands_for: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """Return the inputs, the output and what it is made from, in graph order."""
    needed = set(graph.find_nodes(op="placeholder"))
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed:
            needed.add(node)
            needed.update(stands_for.get(source, source) for source in node.all_input_nodes)
    return [node for node in graph.nodes if node in needed]


def _last_uses(
    order: list[fx.Node], stands_for: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, list[fx.Node]]:
    """Return the values that nobody reads after a node, by that node."""
    last_reader: dict[fx.Node, fx.Node] = {}
    for node in order:
        for source in node.all_input_nodes:
            last_reader[stands_for.get(source, source)] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for source, reader in last_reader.items():
        dying.setdefault(reader, []).append(source)
    return dying


class Bound(nn.Module):
    """A graph of a program with its weights in memory, as a module.

    What training may change are parameters; the rest, such as codes and rotary frequencies, are
    buffers.  Dots in names become ``/``: a module's own names must not hold dots.

    Args:
        program: holds the graph.
        graph: which one.
        dtype: hold floating-point weights, and compute, in this dtype instead of the graph's own.
        shared: bound graphs of the same program; weights that they hold are theirs here too.
    """

    def __init__(
        self,
        program: Program,
        graph: str = MAIN,
        dtype: torch.dtype | None = None,
        shared: tuple[Bound, ...] = (),
    ) -> None:
        super().__init__()
        self._graph, self._place = program.graphs[graph], Place(dtype)
        weights = program.weights
        for name in dict.fromkeys(str(n.target) for n in self._graph.find_nodes(op="get_attr")):
            key = name.replace(".", "/")
            held = next((one for one in shared if hasattr(one, key)), None)
            wide = dtype if weights[name].dtype.is_floating_point else None
            if held is not None:
                setattr(self, key, getattr(held, key))
            elif weights.is_parameter(name):
                setattr(self, key, nn.Parameter(weights[name].load(wide).clone()))
            else:
                self.register_buffer(key, weights[name].load(wide).clone())

    def forward(
        self, *inputs: Tensor, observe: Callable[[fx.Node, Any], None] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the outputs in the order of the signature; ``observe`` is told every value."""
        return interpret(
            self._graph,
            [self._place.tensor(value) for value in inputs],
            lambda node: getattr(self, str(node.target).replace(".", "/")),
            observe,
            self._place,
        )
