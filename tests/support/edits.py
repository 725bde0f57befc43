"""Wrong edits of a program, by name: what broken passes do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from modelathe.ir import (
    Attention,
    Linear,
    Norm,
    Program,
    QuantizedLinear,
    Rotary,
    find_blocks,
    insert_call,
    path_of,
)
from modelathe.ir.quant import pack, unpack
from support.views import views

aten = torch.ops.aten
CACHE = "past_key_values.0.key"
Edit = Callable[[Program, fx.Graph], None]
EDITS: dict[str, Edit] = {}


def edit(function: Edit) -> Edit:
    """Put an edit into the table."""
    EDITS[function.__name__] = function
    return function


def linear_at(graph: fx.Graph, path: str) -> Linear:
    return next(view for view in views(Linear, graph) if path_of(view.node).endswith(path))


def replace_weight(found: Program, view: Linear, value: Tensor) -> None:
    """Make a linear read another weight."""
    name = found.add_weight(f"{view.weight.target}.broken", value)
    view.set_weights(found.weight_node(view.node.graph, name, before=view.node), view.bias)


@edit
def drop_bias(found: Program, graph: fx.Graph) -> None:
    view = linear_at(graph, "h.1.mlp.c_fc")
    view.set_weights(view.weight, None)


@edit
def transpose_wrongly(found: Program, graph: fx.Graph) -> None:
    view = linear_at(graph, "h.0.attn.c_proj")
    replace_weight(found, view, found.weight(view.weight).load().t().contiguous())


@edit
def swap_heads(found: Program, graph: fx.Graph) -> None:
    view = linear_at(graph, "layers.1.self_attn.q_proj")
    heads = found.weight(view.weight).load().view(4, 8, 32)
    replace_weight(found, view, heads[[1, 0, 2, 3]].reshape(32, 32))


@edit
def move_epsilon(found: Program, graph: fx.Graph) -> None:
    norm = views(Norm, graph)[-1]
    args = list(norm.node.args)
    args[-1 if norm.kind == "rms" else 4] = 1e-3
    norm.node.args = tuple(args)


@edit
def swap_cache_outputs(found: Program, graph: fx.Graph) -> None:
    result = graph.output_node()
    (values,) = result.args
    assert isinstance(values, tuple)
    result.args = ((values[0], *values[3:5], *values[1:3]),)


@edit
def read_the_next_cache_entry(found: Program, graph: fx.Graph) -> None:
    entries = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    first, second = (entries[f"past_key_values.{n}.value"] for n in (0, 1))
    for user in list(first.users):
        if user.target is aten.cat.default:
            user.replace_input_with(first, second)


@edit
def grow_the_cache_in_front(found: Program, graph: fx.Graph) -> None:
    (entry,) = (n for n in graph.find_nodes(op="placeholder") if n.target == CACHE)
    node = next(user for user in entry.users if user.target is aten.cat.default)
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    node.args = (list(reversed(parts)), *node.args[1:])


@edit
def ignore_the_mask(found: Program, graph: fx.Graph) -> None:
    view = views(Attention, graph)[0]
    view.node.args = (view.query, view.key, view.value)


@edit
def let_padding_in(found: Program, graph: fx.Graph) -> None:
    """The mask of the padding is taken to be all ones."""
    (source,) = (n for n in graph.find_nodes(op="placeholder") if n.target == "attention_mask")
    for user in list(source.users):
        if user.target is not aten.sym_size.int:
            ones = insert_call(graph, aten.ones_like.default, (source,), before=user, like=user)
            user.replace_input_with(source, ones)


@edit
def move_positions(found: Program, graph: fx.Graph) -> None:
    (source,) = (n for n in graph.find_nodes(op="placeholder") if n.target == "position_ids")
    user = next(iter(source.users))
    moved = insert_call(graph, aten.add.Tensor, (source, 1), before=user, like=user)
    source.replace_all_uses_with(moved, delete_user_cb=lambda node: node is not moved)


@edit
def turn_queries_one_position_further(found: Program, graph: fx.Graph) -> None:
    """The rotary angle of the queries, and not of the keys, is that of the next position."""
    query = Rotary.match(views(Attention, graph)[0].query)
    assert query is not None
    turned = insert_call(
        graph, aten.add.Tensor, (query.cos.args[0], 1.0), before=query.node, like=query.cos
    )
    cos = insert_call(graph, aten.cos.default, (turned,), before=query.node, like=query.cos)
    query.node.replace_input_with(query.cos, cos)


@edit
def another_gelu(found: Program, graph: fx.Graph) -> None:
    node = next(node for node in graph.nodes if node.target is aten.gelu.default)
    node.kwargs = {"approximate": "none"}


@edit
def forget_the_scale(found: Program, graph: fx.Graph) -> None:
    node = views(Attention, graph)[1].node
    node.kwargs = {**node.kwargs, "scale": 1.0}


@edit
def cut_the_residual(found: Program, graph: fx.Graph) -> None:
    block = find_blocks(graph)[1]
    assert block.output is not None
    left, right = block.output.all_input_nodes
    block.output.replace_all_uses_with(left if left in block.nodes else right)


@edit
def write_in_place(found: Program, graph: fx.Graph) -> None:
    name = found.add_weight("fresh", torch.ones(8))
    found.weight(name).load().mul_(2)
    view = views(Linear, graph)[0]
    scale = found.weight_node(graph, name, before=view.node)
    call = insert_call(
        graph, aten.mul.Tensor, (view.input, scale), before=view.node, like=view.node
    )
    view.node.args = (call, *view.node.args[1:])


@edit
def untie(found: Program, graph: fx.Graph) -> None:
    head = views(Linear, graph)[-1]
    replace_weight(found, head, found.weight(head.weight).load().clone())


def quantized(graph: fx.Graph, path: str) -> QuantizedLinear:
    """Return the quantised linear of a module."""
    calls = views(QuantizedLinear, graph)
    return next(call for call in calls if path_of(call.node).endswith(path))


def replace_part(found: Program, view: QuantizedLinear, part: fx.Node, value: Tensor) -> None:
    """Make a quantised linear read other codes or scales."""
    name = found.add_weight(f"{part.target}.broken", value)
    view.node.replace_input_with(part, found.weight_node(found.graph, name, before=view.node))


@edit
def scales_off_by_one_group(found: Program, graph: fx.Graph) -> None:
    view = quantized(graph, "layers.1.up")
    replace_part(found, view, view.scales, found.weight(view.scales).load().roll(1, dims=1))


@edit
def one_code_off_by_one(found: Program, graph: fx.Graph) -> None:
    view = quantized(graph, "layers.1.up")
    codes = unpack(found.weight(view.codes).load(), view.bits, view.in_features).clone()
    codes[5, 3] += 1 if codes[5, 3] == 0 else -1
    replace_part(found, view, view.codes, pack(codes, view.bits))


@edit
def nibbles_swapped(found: Program, graph: fx.Graph) -> None:
    view = quantized(graph, "layers.1.up")
    codes = found.weight(view.codes).load()
    replace_part(found, view, view.codes, (codes << 4) | (codes >> 4))


@edit
def zeros_forgotten(found: Program, graph: fx.Graph) -> None:
    node = quantized(graph, "layers.1.up").node
    node.args = (*node.args[:3], None, *node.args[4:])


@edit
def bias_forgotten(found: Program, graph: fx.Graph) -> None:
    node = quantized(graph, "layers.1.up").node
    node.args = (*node.args[:4], None, *node.args[5:])


@edit
def codes_of_a_neighbour(found: Program, graph: fx.Graph) -> None:
    node, other = (quantized(graph, f"layers.{n}.up").node for n in (1, 0))
    node.args = (node.args[0], *other.args[1:])


@edit
def input_of_a_neighbour(found: Program, graph: fx.Graph) -> None:
    view, other = (quantized(graph, f"layers.1.{name}") for name in ("down", "up"))
    view.node.replace_input_with(view.input, other.input)


@edit
def norms_of_a_neighbour(found: Program, graph: fx.Graph) -> None:
    """The first block reads the gain of the second one's norm."""
    first, second = views(Norm, graph)[:2]
    assert first.gain is not None
    assert second.gain is not None
    gain = found.weight_node(graph, str(second.gain.target), before=first.node)
    first.set_affine(gain, first.bias)


@edit
def config_of_another_model(found: Program, graph: fx.Graph) -> None:
    found.config["num_hidden_layers"] = 7
