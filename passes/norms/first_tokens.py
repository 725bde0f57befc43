"""Factors that bring special tokens, such as the first of a text, to the usual deviation."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, fx

from ...ir import ComputedWeight, Norm, Program, TensorWeight, call_key, insert_call
from ...ir.calls import aten
from ...ir.config import end_tokens
from .freezing import Constant

_NAME = "first_tokens.shares"


def knows_first(graph: fx.Graph) -> bool:
    """Tell whether a graph can tell the first token of a text from one that follows a cache."""
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    cached = any(name.startswith("past_key_values.") for name in names)
    reads = any(name.endswith("input_ids") for name in names)
    return "position_ids" in names or (reads and not cached)


def first_factors(program: Program, plan: Mapping[str, Constant]) -> dict[str, fx.Node]:
    """Insert what inputs of norms are multiplied by: ``usual / first`` at special tokens, 1 else.

    One call computes the factors of all norms with the same special tokens, and another one takes
    them apart; norms with the same factor share it.

    Args:
        program: an editable copy.
        plan: by key of a norm's call.

    Returns:
        [batch, sequence, 1] or [sequence, 1], by key of a norm's call, where it has a constant for
        first tokens.
    """
    made: dict[str, fx.Node] = {}
    for name, graph in program.graphs.items():
        alike: dict[tuple[bool, torch.dtype], dict[str, Constant]] = defaultdict(dict)
        for node in graph.nodes:
            constant = plan.get(key := call_key(name, node))
            if constant is not None and constant.first is not None:
                norm = Norm.match(node)
                assert norm is not None
                alike[constant.ends, norm.input.meta["val"].dtype][key] = constant
        for (ends, dtype), wanted in alike.items():
            made |= _factors(program, graph, wanted, ends, dtype)
    return made


def _factors(
    program: Program,
    graph: fx.Graph,
    wanted: Mapping[str, Constant],
    ends: bool,
    dtype: torch.dtype,
) -> dict[str, fx.Node]:
    shares = {key: one.usual / (one.first or 1.0) for key, one in wanted.items()}
    columns = {share: place for place, share in enumerate(dict.fromkeys(shares.values()))}
    exact = TensorWeight(torch.tensor(list(columns), dtype=torch.float64))
    weight = ComputedWeight("first-token-shares", (exact,), exact.shape, dtype, Tensor.clone)
    added = program.add_weight(_NAME, weight)
    program.weights.buffers |= {added}  # not for training: what it is follows from two deviations
    first = next(node for node in graph.nodes if node.op == "call_function")
    call = partial(insert_call, graph, before=first, like=first)
    special = call(aten.unsqueeze.default, (_special(program, graph, ends, first), -1))
    source = program.weight_node(graph, added, before=first)
    whole = call(aten.where.ScalarOther, (special, source, 1.0))
    if len(columns) == 1:
        return dict.fromkeys(shares, whole)
    parts = call(aten.split.Tensor, (whole, 1, -1))
    made = [call(operator.getitem, (parts, place)) for place in columns.values()]
    return {key: made[columns[share]] for key, share in shares.items()}


def _special(program: Program, graph: fx.Graph, ends: bool, first: fx.Node) -> fx.Node:
    """Insert what tells first positions (and end-of-text tokens) from others; without a last axis.

    Args:
        program: whose configuration names the end-of-text tokens.
        graph: where ``knows_first`` holds.
        ends: whether end-of-text tokens are special, too.
        first: the call to insert it before.
    """
    inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    call = partial(insert_call, graph, before=first, like=first)
    ids = next((node for name, node in inputs.items() if name.endswith("input_ids")), None)
    positions = inputs.get("position_ids")
    if positions is None:
        assert ids is not None
        size = call(aten.sym_size.int, (ids, 1))
        positions = call(aten.arange.default, (size,))
    found = call(aten.eq.Scalar, (positions, 0))
    for end in end_tokens(program.config) if ends else ():
        assert ids is not None
        more = call(aten.eq.Scalar, (ids, end))
        found = call(aten.logical_or.default, (found, more))
    return found
