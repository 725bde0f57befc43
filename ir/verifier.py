"""The invariants that hold between any two passes.

One function per invariant; the function's name is the invariant's name in the error.  What needs
the bytes of weights (no nan, codes in range) is checked by whoever first reads them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from .blocks import block_of
from .errors import VerifyError
from .infer import fake_mode, infer_call, is_inferred, note_inferred
from .printer import call_name
from .program import Program

_ON_SIZES = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


def defined_before_use(program: Program, graph: fx.Graph) -> None:
    """A node is listed after every node it reads."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                detail = f"is listed before %{source.name}, which it reads"
                raise VerifyError("defined-before-use", f"%{node.name}", detail)
        seen.add(node)


def typed(program: Program, graph: fx.Graph) -> None:
    """Every input, weight and call has a shape and a dtype, in ``node.meta["val"]``."""
    for node in graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            raise VerifyError("typed", f"%{node.name}", "has no shape and dtype")


def only_known_ops(program: Program, graph: fx.Graph) -> None:
    """Every call is a torch operator or one of ours, or arithmetic on sizes, or ``getitem``."""
    for node in graph.nodes:
        if node.op in ("call_module", "call_method"):
            raise VerifyError("only-known-ops", f"%{node.name}", f"is a {node.op}")
        if node.op != "call_function":
            continue
        if isinstance(node.target, OpOverload):
            if node.target.namespace not in ("aten", "modelathe", "prims"):
                raise VerifyError("only-known-ops", f"%{node.name}", f"calls {node.target}")
        elif node.target is not operator.getitem and not isinstance(node.meta["val"], _ON_SIZES):
            raise VerifyError("only-known-ops", f"%{node.name}", f"calls {node.target}")


def functional(program: Program, graph: fx.Graph) -> None:
    """No call writes to a tensor that it was given."""
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            raise VerifyError("functional", f"%{node.name}", f"{node.target} writes in place")


def weights_exist(program: Program, graph: fx.Graph) -> None:
    """Every weight that a graph names is in the program's table, and has the type noted there."""
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in program.weights:
            raise VerifyError("weights-exist", f"@{name}", "is not a weight of the program")
        weight, value = program.weights[name], node.meta["val"]
        if tuple(value.shape) != weight.shape or value.dtype != weight.dtype:
            detail = f"is {weight.dtype} {list(weight.shape)}, and the graph has {value}"
            raise VerifyError("weights-exist", f"@{name}", detail)


def weights_unwritten(program: Program, graph: fx.Graph) -> None:
    """Nobody wrote into a weight in memory: other programs hold the same tensor."""
    for node in graph.find_nodes(op="get_attr"):
        if program.weight(node).written:
            detail = "was written to in place; a changed weight is a new weight"
            raise VerifyError("weights-unwritten", f"@{node.target}", detail)


def aliases_intact(program: Program, graph: fx.Graph) -> None:
    """Every alias stands for a weight of the program."""
    for alias, name in program.weights.aliases.items():
        if name not in list(program.weights):
            raise VerifyError("aliases-intact", f"@{alias}", f"stands for @{name}, which is gone")


def signature_matches(program: Program, graph: fx.Graph) -> None:
    """Inputs and outputs of the graph are those that the signature names, in that order."""
    (name,) = (n for n, g in program.graphs.items() if g is graph)
    signature = program.signatures[name]
    inputs = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    if inputs != list(signature.inputs):
        detail = f"has inputs {inputs}, and the signature {list(signature.inputs)}"
        raise VerifyError("signature-matches", f"graph {name}", detail)
    results = graph.output_node().args[0]
    if not isinstance(results, tuple) or len(results) != len(signature.outputs):
        detail = f"does not return {len(signature.outputs)} values, as the signature says"
        raise VerifyError("signature-matches", f"graph {name}", detail)


def blocks_partition(program: Program, graph: fx.Graph) -> None:
    """The calls of a block depend on no later block."""
    order: dict[str, int] = {}
    for node in graph.nodes:
        key = block_of(node) if node.op == "call_function" else None
        if key is None:
            continue
        order.setdefault(key, len(order))
        for source in node.all_input_nodes:
            other = block_of(source) if source.op == "call_function" else None
            if other is not None and order.get(other, -1) > order[key]:
                detail = f"is in block {key} and reads %{source.name} of the later block {other}"
                raise VerifyError("blocks-partition", f"%{node.name}", detail)


def shapes_agree(program: Program, graph: fx.Graph) -> None:
    """The noted shape and dtype of each call are those that its arguments give."""
    mode = fake_mode(graph)
    for node in graph.nodes:
        if node.op != "call_function" or is_inferred(node):
            continue
        try:
            value = infer_call(mode, node)
        except Exception as error:  # shape rules raise nearly anything
            first = str(error).partition("\n")[0]
            detail = f"{call_name(node)} rejects its arguments: {first}"
            raise VerifyError("shapes-agree", f"%{node.name}", detail) from error
        if (found := _type(value)) != (noted := _type(node.meta["val"])):
            raise VerifyError("shapes-agree", f"%{node.name}", f"gives {found}, noted is {noted}")
        note_inferred(node)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} [{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_type, value))})"
    return "size" if isinstance(value, _ON_SIZES) else type(value).__name__


INVARIANTS = (
    defined_before_use,
    typed,
    only_known_ops,
    functional,
    weights_exist,
    weights_unwritten,
    aliases_intact,
    signature_matches,
    blocks_partition,
    shapes_agree,
)


def verify(program: Program) -> None:
    """Check every invariant of every graph.

    Raises:
        VerifyError: naming the first invariant that fails, and the node.
    """
    for graph in program.graphs.values():
        for invariant in INVARIANTS:
            invariant(program, graph)
