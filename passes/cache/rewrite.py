"""Cache entries as codes: the graph rounds what is new, and reads everything from codes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ...ir import Program, Signature, insert_call, set_info
from ...ir.cache import entry_parts
from ...ir.calls import aten
from ...ir.infer import fake_mode
from .entries import PAST, PRESENT, Entry


def quantize_entry(program: Program, graph: str, entry: Entry, bits: int) -> None:
    """Store an entry in ``bits``, with a scale and a zero point for each token and head.

    ``past_key_values.N.key`` and ``present.N.key`` become codes, and ``..key_scale`` and
    ``..key_zero`` join the signature behind them.  All readers of the entry, new tokens included,
    read what the codes stand for.
    """
    nodes, join = program.graphs[graph], entry.join
    inputs = _code_inputs(nodes, entry, bits)
    rounded = _call(nodes, join, torch.ops.modelathe.quantize_cache.default, entry.newest, bits)
    fresh = [_call(nodes, join, operator.getitem, rounded, index) for index in range(3)]
    joined = [
        _call(nodes, join, aten.cat.default, [past, new], 2)
        for past, new in zip(inputs, fresh, strict=True)
    ]
    read = torch.ops.modelathe.dequantize_cache.default
    value = _call(nodes, join, read, *joined, entry.newest, bits)
    for each in joined:
        set_info(each, cache=True)
    join.replace_all_uses_with(value, delete_user_cb=lambda user: user.op != "output")
    _return(nodes, join, joined)
    nodes.erase_node(join)
    program.signatures[graph] = _signature(program.signatures[graph], entry, bits)


def _code_inputs(nodes: fx.Graph, entry: Entry, bits: int) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Make the past an input of codes, with one for scales and one for zero points behind it."""
    past = entry.past
    numbers = past.meta["val"]
    *sizes, width = numbers.shape
    _, scale_name, zero_name = entry_parts(entry.name)
    with nodes.inserting_after(past):
        zeros = nodes.placeholder(zero_name)
        scales = nodes.placeholder(scale_name)
    with fake_mode(nodes):
        past.meta["val"] = torch.empty((*sizes, int(width) * bits // 8), dtype=torch.uint8)
        scales.meta["val"] = torch.empty((*sizes, 1), dtype=numbers.dtype)
        zeros.meta["val"] = torch.empty((*sizes, 1), dtype=torch.uint8)
    return past, scales, zeros


def _call(nodes: fx.Graph, join: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Insert a call in the block of the join that it replaces."""
    node = insert_call(nodes, target, args, before=join, like=join)
    set_info(node, cache=False)
    return node


def _return(nodes: fx.Graph, join: fx.Node, joined: list[fx.Node]) -> None:
    """Return ``joined`` where the graph returned ``join``."""
    results: Any = nodes.output_node().args[0]
    place = list(results).index(join)
    nodes.output_node().args = ((*results[:place], *joined, *results[place + 1 :]),)


def _signature(signature: Signature, entry: Entry, bits: int) -> Signature:
    name = entry.name
    *sizes, width = signature.dims[name]
    dims = {**signature.dims, **dict.fromkeys(entry_parts(name), (*sizes, 1))}
    dims[name] = (*sizes, int(width) * bits // 8)
    return Signature(
        _widened(signature.inputs, name),
        _widened(signature.outputs, name.replace(PAST, PRESENT, 1)),
        dims,
        signature.limits,
    )


def _widened(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Return names with those of an entry's scales and zero points behind its own."""
    place = names.index(name)
    return (*names[:place], *entry_parts(name), *names[place + 1 :])
