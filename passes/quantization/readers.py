"""Who reads which weight: the linears and embeddings of a program, by the weight they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ...ir import (
    Embedding,
    Linear,
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
    block_of,
    call_name,
    marks_of,
    path_of,
)
from ...ir.sparse import is_beside


@dataclass(frozen=True, slots=True)
class Shared:
    """One weight and all its readers, in every graph of the program.

    Attributes:
        name: of the weight.
        readers: linears and embeddings whose weight it is, each with its graph.
        paths: module paths of all calls that read it.
        linear: whether a linear is among them.
        embedding: whether an embedding is.
        head: whether one of the linears makes the logits.
        obstacle: why it cannot be quantised; empty: it can.
    """

    name: str
    readers: tuple[tuple[fx.Graph, fx.Node], ...]
    paths: tuple[str, ...]
    linear: bool
    embedding: bool
    head: bool
    obstacle: str


def find_shared(program: Program) -> list[Shared]:
    """Return the floating-point weights of two or more dimensions, in the order of first use.

    Embeddings inside blocks are left out, and weights that are no factor of a product.
    """
    readers: dict[str, list[tuple[fx.Graph, fx.Node, fx.Node]]] = {}
    for graph in program.graphs.values():
        for node in graph.find_nodes(op="get_attr"):
            readers.setdefault(str(node.target), []).extend(
                (graph, node, user) for user in node.users
            )
    heads = set().union(*(head_linears(program, name) for name in program.graphs))
    return [
        shared
        for name, uses in readers.items()
        if program.weight(name).dtype.is_floating_point and len(program.weight(name).shape) >= 2
        if (shared := _shared(program, name, uses, heads))
    ]


def _shared(
    program: Program,
    name: str,
    uses: list[tuple[fx.Graph, fx.Node, fx.Node]],
    heads: set[fx.Node],
) -> Shared | None:
    if any(is_beside(user) for _, _, user in uses):
        return None  # outliers: what codes could not hold
    calls = [(graph, user, _as_weight(node, user)) for graph, node, user in uses]
    others = [user for _, user, call in calls if call is None]
    linear = any(isinstance(call, Linear) for _, _, call in calls)
    embedding = any(isinstance(call, Embedding) for _, _, call in calls)
    if not linear and any(call and block_of(user) is not None for _, user, call in calls):
        return None  # a table of relative positions: tiny, and added to attention scores
    if not linear and not embedding and not any(map(_is_product, others)):
        return None
    obstacle = ""
    if others:
        kinds = ", ".join(sorted({call_name(user) for user in others}))
        obstacle = f"{list(program.weight(name).shape)}, read by {kinds}: not a linear or embedding"
    return Shared(
        name,
        tuple((graph, user) for graph, user, call in calls if call),
        tuple(dict.fromkeys(path_of(user) for _, user, _ in calls)),
        linear,
        embedding,
        any(user in heads for _, user, _ in calls),
        obstacle,
    )


def _as_weight(node: fx.Node, user: fx.Node) -> Linear | Embedding | None:
    """Return the call that reads ``node`` as its weight and as nothing else."""
    linear = Linear.match(user)
    if linear is not None:
        once = linear.input is not node and linear.bias is not node
        return linear if linear.weight is node and once else None
    embedding = Embedding.match(user)
    return embedding if embedding is not None and embedding.weight is node else None


_PRODUCTS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "einsum")
_CONVOLUTIONS = ("convolution", "conv1d", "conv2d", "conv3d")
_VIEWS = ("t", "transpose", "permute", "view", "reshape", "unsqueeze", "select", "index", "slice")


def _is_product(node: fx.Node) -> bool:
    """Whether a call, or one that reads this view of a weight, is a product with activations."""
    name = call_name(node).split(".")[1] if "." in call_name(node) else ""
    if name in _PRODUCTS or name in _CONVOLUTIONS:
        return True
    return name in _VIEWS and any(map(_is_product, node.users))


WIDTH = "bits"
"""The mark of a linear whose width a pass has chosen; its text is the number of bits."""


def width_choice(shared: Shared) -> int | None:
    """Return the bits that were chosen for a weight: the most that any of its readers asks for."""
    widths = [marks_of(node)[WIDTH] for _, node in shared.readers if WIDTH in marks_of(node)]
    return max(map(int, widths), default=None)


def head_linears(program: Program, graph: str) -> set[fx.Node]:
    """Return the linears outside the blocks that the output ``logits`` is made from.

    Calls between the linear and the output (soft-capping, a cast) do not matter.
    """
    outputs = program.signatures[graph].outputs
    if "logits" not in outputs:
        return set()
    results = program.graphs[graph].output_node().args[0]
    assert isinstance(results, tuple)
    waiting = [results[outputs.index("logits")]]
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen or block_of(node) is not None:
            continue
        seen.add(node)
        if node.target is torch.ops.aten.linear.default:
            found.add(node)
        elif QuantizedLinear.match(node) is None:
            waiting += node.all_input_nodes
    return found


def quantized_paths(program: Program) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Yield the name of the codes, the readers' paths and the bits of each quantised weight."""
    found: dict[str, tuple[list[str], int]] = {}
    for graph in program.graphs.values():
        for node in graph.nodes:
            call = QuantizedLinear.match(node) or QuantizedEmbedding.match(node)
            if call is not None:
                paths, _ = found.setdefault(str(call.codes.target), ([], call.bits))
                paths.append(path_of(node))
    for name, (paths, bits) in found.items():
        yield name, tuple(paths), bits


def made_weights(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the linears whose weight another call makes, and that call."""
    for graph in program.graphs.values():
        for node in graph.nodes:
            linear = Linear.match(node)
            if linear is not None and linear.weight.op == "call_function":
                yield node, linear.weight


def seen_paths(program: Program, found: list[Shared]) -> set[str]:
    """Return the module paths that globs can mean."""
    quantized = {path for _, paths, _ in quantized_paths(program) for path in paths}
    made = {path_of(node) for node, _ in made_weights(program)}
    return quantized | made | {path for shared in found for path in shared.paths}
