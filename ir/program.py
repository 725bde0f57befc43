"""The unit that passes transform: graphs, weights, signatures, origin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from .dims import Limits
from .errors import CaptureError
from .weights import TensorWeight, Weight, Weights

if TYPE_CHECKING:
    from .execute import Bound
    from .watch import Report

Kind = Literal["decoder", "encoder", "encoder-decoder", "vision", "module"]
MAIN = "main"


@dataclass(frozen=True, slots=True)
class Signature:
    """Names of a graph's inputs and outputs, in graph order.

    Attributes:
        inputs: such as ``input_ids`` or ``past_key_values.0.key``.
        outputs: such as ``logits`` or ``present.0.key``.
        dims: sizes of each input; a symbolic size is a name or a sum of names such as
            ``past + sequence``.
        limits: the smallest and the largest value of sizes by name, where they were declared.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    limits: Mapping[str, Limits] = field(default_factory=dict)

    def without(self, inputs: set[str], outputs: set[str]) -> Signature:
        """Return the signature with those names left out."""
        return Signature(
            tuple(name for name in self.inputs if name not in inputs),
            tuple(name for name in self.outputs if name not in outputs),
            {name: dims for name, dims in self.dims.items() if name not in inputs},
            self.limits,
        )

    def renamed(self, names: Mapping[str, str]) -> Signature:
        """Return the signature with names replaced as ``names`` says."""
        return Signature(
            tuple(names.get(name, name) for name in self.inputs),
            tuple(names.get(name, name) for name in self.outputs),
            {names.get(name, name): dims for name, dims in self.dims.items()},
            self.limits,
        )


@dataclass(frozen=True, slots=True)
class Origin:
    """What the end of a pipeline needs to know about its beginning.

    Attributes:
        model: the model as the user named it.
        kind: what the model is.
        folder: where config and tokenizer lie; None for a model that never was in a folder.
        captured_from: what ``capture`` makes the untouched program of, in another process too: an
            absolute path or ``package.module:factory``; None for a module.
        passes: text of every pass applied so far.
        notes: what a reader of the manifest must know, such as "runs the user's own code".
        source: identifies the weights: by names and sizes of their files, without reading bytes, or
            by the values that a module holds.
        record: how the program was made: seed, texts, steps with their remarks and figures; plain
            JSON values.
        checks: what fidelity was measured with, for the check of the artifact; never saved.
        recapture: makes the untouched program again; None when that is not possible.
        allow_pickle: whether pickled files of the source are trusted; never saved.
    """

    model: str
    kind: Kind
    folder: Path | None = None
    passes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    checks: Any = None
    recapture: Callable[[Report | None], Program] | None = None
    captured_from: Path | str | None = None
    allow_pickle: bool = False

    def reference(self, report: Report | None = None) -> Program:
        """Return the program as it was captured; ``report`` is as ``capture`` takes it.

        Raises:
            CaptureError: the source of a program that was loaded from a folder is gone.
        """
        if self.recapture is None:
            raise CaptureError(
                f"the untouched model behind {self.model} is not available",
                remedy="keep the source model where it was, or pass it with --against",
            )
        return self.recapture(report)


@dataclass(slots=True)
class Program:
    """Graphs of ATen calls over one table of weights.

    A program is a value: nobody edits one that somebody else holds.  ``editable`` returns a copy
    with graphs and name table of its own; tensors are shared between copies and never written.

    Attributes:
        graphs: name to graph; ``main``, or ``encoder`` and ``decoder``.
        signatures: name to signature, for the same names.
        weights: every weight that a ``get_attr`` node of a graph names.
        config: the model's configuration, as the graph now is.
        origin: where the program came from.
    """

    graphs: dict[str, fx.Graph]
    signatures: dict[str, Signature]
    weights: Weights
    config: dict[str, Any]
    origin: Origin

    @property
    def graph(self) -> fx.Graph:
        """The only graph of a program that has one."""
        (graph,) = self.graphs.values()
        return graph

    @property
    def signature(self) -> Signature:
        """The signature of the only graph."""
        (signature,) = self.signatures.values()
        return signature

    @property
    def kind(self) -> Kind:
        """What the model is."""
        return self.origin.kind

    def editable(self) -> Program:
        """Return a copy whose graphs, names and config may be changed."""
        return Program(
            {name: copy.deepcopy(graph) for name, graph in self.graphs.items()},
            dict(self.signatures),
            self.weights.copy(),
            copy.deepcopy(self.config),
            self.origin,
        )

    def after(self, pass_text: str) -> Program:
        """Return the program with one more pass in its history."""
        origin = replace(self.origin, passes=(*self.origin.passes, pass_text))
        return replace(self, origin=origin)

    def weight(self, node: fx.Node | str) -> Weight:
        """Return the weight that a ``get_attr`` node or a name stands for."""
        return self.weights[node if isinstance(node, str) else str(node.target)]

    def add_weight(self, name: str, value: Tensor | Weight) -> str:
        """Add a weight and return its name: ``name``, or a free variation of it."""
        weight = TensorWeight(value) if isinstance(value, Tensor) else value
        return self.weights.add(name, weight)

    def weight_node(self, graph: fx.Graph, name: str, *, before: fx.Node) -> fx.Node:
        """Return a new node that reads the weight ``name``, listed before ``before``."""
        from .infer import fake_mode, fake_weight

        with graph.inserting_before(before):
            node = graph.get_attr(name)
        node.meta["val"] = fake_weight(fake_mode(graph), self.weights[name])
        return node

    def clean(self) -> None:
        """Remove calls that nobody reads and weights that no graph names."""
        used: set[str] = set()
        for graph in self.graphs.values():
            for node in reversed(graph.nodes):
                if node.op in ("call_function", "get_attr") and not node.users:
                    graph.erase_node(node)
            used |= {str(node.target) for node in graph.find_nodes(op="get_attr")}
        self.weights.keep_only(used)

    def run(
        self,
        inputs: Mapping[str, Tensor],
        graph: str = MAIN,
        observe: Callable[[fx.Node, Any], None] | None = None,
        dtype: torch.dtype | None = None,
        bypass: Mapping[fx.Node, fx.Node] | None = None,
        device: str = "cpu",
        amend: Callable[[fx.Node, Any], Any] | None = None,
    ) -> dict[str, Tensor]:
        """Run one graph, loading each weight when it is read and freeing values after last use.

        Args:
            inputs: a tensor for every input of the signature.
            graph: which graph.
            observe: called with each node and its value.
            dtype: compute in this floating-point dtype instead of the graph's own.
            bypass: node to the node whose value its readers get instead.
            device: where to compute; outputs come back to the processor.
            amend: from each node and its value to the value that its readers get.
        """
        from .execute import run

        return run(self, inputs, graph, observe, dtype, bypass, device, amend)

    def bind(self, graph: str = MAIN, dtype: torch.dtype | None = None) -> Bound:
        """Return a module with the weights as parameters; its forward takes inputs by position.

        Args:
            graph: which graph.
            dtype: hold weights and compute in this floating-point dtype instead of the graph's own.
        """
        from .execute import Bound

        return Bound(self, graph, dtype)


def call_key(graph: str, node: fx.Node) -> str:
    """Return what tells a call from all others of a program, whose graphs may share names."""
    return node.name if graph == MAIN else f"{graph}.{node.name}"


def stored_bytes(program: Program) -> int:
    """Return the bytes that all weights take, each counted once."""
    return sum(program.weights[name].bytes for name in program.weights)


def parameter_count(program: Program) -> int:
    """Return how many floating-point numbers the weights hold, each counted once; no buffers."""
    weights = program.weights
    return sum(
        torch.Size(weights[name].shape).numel() for name in weights if weights.is_parameter(name)
    )
