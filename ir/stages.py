"""A graph run on many inputs at once, stopping at chosen calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .execute import Place
from .program import MAIN, Program


class Stages:
    """Every input reaches one call before any of them goes on.

    What a stop is for, such as choosing the weights that come next, then needs one pass over the
    inputs for the whole graph.  Between stops only values that are still to be read are held.  A
    weight is loaded once for each stretch between two stops that reads it.

    Args:
        program: what to run; its graphs must not change meanwhile, but its weights may.
        inputs: for every run a tensor for every input of the graph's signature.
        graph: which graph.
        dtype: compute every floating-point value in this dtype.
        device: where to compute.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Mapping[str, Tensor]],
        graph: str = MAIN,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self._order = list(program.graphs[graph].nodes)
        self._place = Place(dtype, None if device == "cpu" else torch.device(device))
        self._program, self._dtype = program, dtype
        self._next = 0
        names = program.signatures[graph].inputs
        starts = [node for node in self._order if node.op == "placeholder"]
        self._values: list[dict[fx.Node, Any]] = [
            {
                node: self._place.tensor(given[name])
                for node, name in zip(starts, names, strict=True)
            }
            for given in inputs
        ]
        self._dying: dict[fx.Node, list[fx.Node]] = {}
        last: dict[fx.Node, fx.Node] = {}
        for node in self._order:
            last |= dict.fromkeys(node.all_input_nodes, node)
        for source, reader in last.items():
            self._dying.setdefault(reader, []).append(source)

    @torch.no_grad()
    def advance(self, stop: fx.Node) -> Iterator[Tensor]:
        """Run every input as far as a call, and yield its values, one for each input.

        Args:
            stop: a call or input of the graph, none that an earlier stop has passed.
        """
        end = self._order.index(stop) + 1
        stretch = [node for node in self._order[self._next : end] if node.op == "call_function"]
        self._next = max(self._next, end)
        weights: dict[fx.Node, Tensor] = {}
        for values in self._values:
            for node in stretch:
                values[node] = self._call(node, values, weights)
                for source in self._dying.get(node, ()):
                    values.pop(source, None)
            yield values[stop]

    def _call(
        self, node: fx.Node, values: Mapping[fx.Node, Any], weights: dict[fx.Node, Tensor]
    ) -> Any:
        def value_of(source: fx.Node) -> Any:
            if source.op != "get_attr":
                return values[source]
            if source not in weights:
                weight = self._program.weight(source)
                wide = self._dtype if weight.dtype.is_floating_point else None
                weights[source] = self._place.tensor(weight.load(wide))
            return weights[source]

        args = fx.node.map_arg(node.args, value_of)
        kwargs = fx.node.map_arg(node.kwargs, value_of)
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._place.constant)
        target: Any = node.target
        return target(*args, **kwargs)
