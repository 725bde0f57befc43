"""Scales of keys and queries put into a program: into rows of linears, or as calls."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ...ir import ComputedWeight, Program, TensorWeight, insert_call, is_weight
from ...ir.calls import aten
from .entries import Entry
from .smoothing import Rows, RunTime

_SUFFIX = "smoothed"
_RUN_TIME = "key_sizes"


@dataclass(slots=True)
class Fold:
    """Multiplies rows of linears; weights and biases that are shared stay shared.

    Attributes:
        program: an editable copy.
        rows: its rows as numbered channels.
        factors: what to multiply each row with, float64 [channels].
    """

    program: Program
    rows: Rows
    factors: Tensor
    made: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Give every linear with factors other than 1 its new weights."""
        for linear in self.rows.linears:
            own = self.factors[self.rows.of_linear(linear)]
            if not bool((own == 1).all()):
                bias = None if linear.bias is None else self._scaled(linear.bias, own)
                linear.set_weights(self._scaled(linear.weight, own), bias)

    def _scaled(self, node: fx.Node, own: Tensor) -> fx.Node:
        name = str(node.target)
        if name not in self.made:
            old = self.program.weight(name)
            scaled = ComputedWeight(
                "scale-rows", (old, TensorWeight(own)), old.shape, old.dtype, _times_rows
            )
            self.made[name] = self.program.add_weight(f"{name}.{_SUFFIX}", scaled)
        return self.program.weight_node(node.graph, self.made[name], before=node)


def _times_rows(weight: Tensor, factors: Tensor) -> Tensor:
    return weight.double() * factors.double().view(-1, *[1] * (weight.dim() - 1))


def scale_at_run_time(program: Program, site: RunTime, sizes: Tensor) -> None:
    """Divide new keys by ``sizes`` [heads, width], and multiply the queries that meet them."""
    entry, graph = site.entry, site.entry.join.graph
    label = torch.zeros_like(site.scales.labels, dtype=torch.float64)
    label[site.scales.labels[: sizes.numel()]] = sizes.flatten()
    queries = label[site.scales.labels][sizes.numel() :]
    keys = _weight(program, entry, "", sizes, entry.join)
    smooth = insert_call(
        graph, aten.div.Tensor, (entry.newest, keys), before=entry.join, like=entry.newest
    )
    entry.join.replace_input_with(entry.newest, smooth)
    first = 0
    for attention in site.attentions:
        query = attention.query
        _, heads, _, width = query.meta["val"].shape
        own = queries[first : first + int(heads) * int(width)].view(int(heads), int(width))
        first += own.numel()
        factor = _weight(program, entry, ".queries", own, attention.node)
        scaled = insert_call(
            graph, aten.mul.Tensor, (query, factor), before=attention.node, like=query
        )
        attention.node.replace_input_with(query, scaled)


def _weight(program: Program, entry: Entry, suffix: str, sizes: Tensor, before: fx.Node) -> fx.Node:
    """Return a new weight [heads, 1, width] in the dtype of the keys."""
    dtype = entry.newest.meta["val"].dtype
    shape = (sizes.shape[0], 1, sizes.shape[1])
    own = TensorWeight(sizes.view(shape))
    weight = ComputedWeight("key-sizes", (own,), shape, dtype, lambda value: value)
    name = program.add_weight(f"cache.{entry.number}.{_RUN_TIME}{suffix}", weight)
    return program.weight_node(before.graph, name, before=before)


def is_scaled_at_run_time(entry: Entry) -> bool:
    """Tell whether ``scale_at_run_time`` was there before."""
    made = entry.newest
    divisor = made.args[1] if made.target is aten.div.Tensor else None
    return is_weight(divisor) and _RUN_TIME in str(divisor.target)  # type: ignore[union-attr]
