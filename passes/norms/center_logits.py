"""Heads whose weight and bias have no mean over the vocabulary."""

from __future__ import annotations

from torch import Tensor, fx

from ...ir import ComputedWeight, Linear, Program, last_made
from ..base import Remark
from ..canonical.match import MUL, aten, is_call
from .channels import origin
from .readers import CENTERINGS, elsewhere, has_weights, named, nothing, tied, untied

LOGITS = "logits"
_CENTERED = "centered_logits"


def center_logits(program: Program, *, untie: bool) -> list[Remark]:
    """Centre the head of every graph that returns logits; see ``FoldNorms``."""
    heads: list[Linear] = []
    remarks: list[Remark] = []
    for name, graph in program.graphs.items():
        found = _head(program, name) if LOGITS in program.signatures[name].outputs else None
        if isinstance(found, str):
            remarks.append(Remark("missed", graph.output_node().name, f"center-logits: {found}"))
        elif found is not None:
            heads.append(found)
    alike = {head.node for head in heads}
    for head in list(heads):
        others = elsewhere(program, head.weight, alike)
        if others and not untie:
            heads.remove(head)
            why = f"center-logits: {tied(head.node, others[0])}"
            remarks.append(Remark("missed", head.node.name, why))
            continue
        remarks.append(Remark("applied", head.node.name, "mean over the vocabulary removed"))
        remarks += [untied(program, head.node, head.weight, other) for other in others]
    _center(program, heads)
    return remarks or [nothing(program, "center-logits", "no output is called logits")]


def _head(program: Program, graph: str) -> Linear | str:
    """Return the linear that makes the logits, or why shifting them is not shifting its outputs."""
    (results,) = program.graphs[graph].output_node().args
    assert isinstance(results, tuple | list)
    node = results[program.signatures[graph].outputs.index(LOGITS)]
    assert isinstance(node, fx.Node)
    if results.count(node) > 1:
        return f"{named(node)} is another output, too"
    while True:
        if len(node.users) != 1:
            return f"{named(node)} is read by more than one"
        linear = Linear.match(node)
        if linear is not None and has_weights(linear):
            done = last_made(str(linear.weight.target), _CENTERED, *CENTERINGS)
            return "the head is centred already" if done else linear
        before = _before(node)
        if before is None:
            return f"logits come from {named(node)}, which does not keep a shift a shift"
        node = before


def _before(node: fx.Node) -> fx.Node | None:
    """Return the input of a call that moves rows, or multiplies by one number."""
    numbers = [argument for argument in node.args[1:] if isinstance(argument, int | float)]
    if is_call(node, (*MUL, aten.div.Tensor)) and len(numbers) == 1:
        (source,) = node.all_input_nodes
        return source
    last = node.meta["val"].dim() - 1
    found = origin(node, last)
    if found is None or found[1] != found[0].meta["val"].dim() - 1:
        return None
    return found[0]


def _center(program: Program, heads: list[Linear]) -> None:
    """Let heads read centred weights and biases; those that share one share its copy."""
    made: dict[str, str] = {}

    def centered(node: fx.Node, head: Linear) -> fx.Node:
        name = str(node.target)
        if name not in made:
            old = program.weight(node)
            new = ComputedWeight("center-columns", (old,), old.shape, old.dtype, _without_mean)
            made[name] = program.add_weight(f"{name}.{_CENTERED}", new)
        return program.weight_node(head.node.graph, made[name], before=head.node)

    for head in heads:
        bias = None if head.bias is None else centered(head.bias, head)
        head.set_weights(centered(head.weight, head), bias)


def _without_mean(weight: Tensor) -> Tensor:
    wide = weight.double()
    return wide - wide.mean(0, keepdim=True)
