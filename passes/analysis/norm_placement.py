"""Where the norms of each block stand, relative to its residual adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ...ir import (
    Attention,
    Block,
    Convolution,
    Linear,
    Norm,
    Program,
    QuantizedLinear,
    find_blocks,
    is_weight,
)
from ..canonical.match import ADD, MUL, aten, is_call

Placement = Literal["pre", "post", "peri", "sandwich", "parallel", "none"]

# Calls between a norm and what reads it that leave each position's vector as it is.
_MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.clone.default,
    aten.slice.Tensor,
    aten._to_copy.default,
)
_SCALINGS = (*MUL, aten.div.Tensor)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.mm.default)


@dataclass(frozen=True, slots=True)
class BlockNorms:
    """The norms of one block.

    Attributes:
        key: of the block.
        placement: see ``norm_placement``.
        norms: names of its norms in graph order, those of queries and keys left out.
        kinds: ``layer`` or ``rms`` for each of them.
        query_key: names of the norms of queries and keys.
    """

    key: str
    placement: Placement
    norms: tuple[str, ...]
    kinds: tuple[Literal["layer", "rms"], ...]
    query_key: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NormPlacement:
    """The norms of one graph.

    Attributes:
        graph: which graph.
        blocks: one entry per block, in order.
        outside: names of the norms outside of every block: of embeddings, or in front of a head.
    """

    graph: str
    blocks: tuple[BlockNorms, ...]
    outside: tuple[str, ...]


def norm_placement(program: Program, graph: str | None = None) -> NormPlacement:
    """Label the placement of norms in every block, from the graph alone.

    With x the residual value that a sublayer f reads and adds to, and N a norm, a block is

    - ``pre``: x + f(N(x)) for every sublayer;
    - ``post``: N(x + f(x)) for every sublayer, so that the stream itself is normalised;
    - ``sandwich``: x + N(f(N(x))) for every sublayer (Sandwich-LN; the Peri-LN paper, arXiv
      2502.02732, calls this form peri);
    - ``peri``: x + N(f(x)) for every sublayer: norms on their outputs only, inside of the branch;
    - ``parallel``: the stream plus two or more sublayers that all read the block's input, whatever
      their norms;
    - ``none``: no norms, sublayers that differ, or no clear residual input and output.

    Norms of queries and keys are listed apart and decide nothing.  A norm inside of a sublayer,
    such as one between a convolution and a linear, is listed and decides nothing either.

    Args:
        program: in canonical form.
        graph: which graph; None for the only one.

    Source: arXiv 2002.04745 (pre, post), 2105.13290 (sandwich), 2502.02732 (peri); the exact
    definitions by the graph are ours.
    """
    name = next(iter(program.graphs)) if graph is None else graph
    blocks = find_blocks(program.graphs[name])
    inside = {node for block in blocks for node in block.nodes}
    outside = [n.name for n in program.graphs[name].nodes if Norm.match(n) and n not in inside]
    return NormPlacement(name, tuple(map(_block_norms, blocks)), tuple(outside))


def is_query_key_norm(node: fx.Node) -> bool:
    """Tell whether a norm's value goes to attention as queries or keys, and nowhere else.

    Attention written as products of activations counts too.  What a graph returns of it, such as
    the keys of a cache, does not matter.
    """
    found = False
    for user, source in _ends(node):
        if attention := Attention.match(user):
            if source is attention.value or source is attention.mask:
                return False
        elif not _multiplies_activations(user):
            return False
        found = True
    return found


def _ends(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the first calls after a norm that mix entries, and the value that each reads."""
    stack, seen = [node], {node}
    while stack:
        value = stack.pop()
        for user in value.users:
            if not isinstance(user.meta.get("val"), torch.Tensor | tuple | list):
                continue  # the output, or a size
            if _mixes(user):
                yield user, value
            elif user not in seen:
                seen.add(user)
                stack.append(user)


def _mixes(node: fx.Node) -> bool:
    views = (Linear, QuantizedLinear, Norm, Attention, Convolution)
    return any(view.match(node) for view in views) or is_call(node, _PRODUCTS)


def _multiplies_activations(node: fx.Node) -> bool:
    return is_call(node, _PRODUCTS) and not any(map(_from_weight, node.all_input_nodes))


def _from_weight(node: fx.Node) -> bool:
    while is_call(node, _MOVES) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return is_weight(node)


def _block_norms(block: Block) -> BlockNorms:
    found = [norm for node in block.nodes if (norm := Norm.match(node))]
    special = {norm.node for norm in found if is_query_key_norm(norm.node)}
    plain = [norm for norm in found if norm.node not in special]
    return BlockNorms(
        block.key,
        _Trunk(block).placement(),
        tuple(norm.node.name for norm in plain),
        tuple(norm.kind for norm in plain),
        tuple(norm.node.name for norm in found if norm.node in special),
    )


@dataclass(frozen=True, slots=True)
class _Sublayer:
    """One summand of a residual add.

    Attributes:
        starts: the values of the stream that it is computed from.
        in_front: whether it reads them through norms only.
        behind: whether a norm is the last of its calls.
        after: whether a norm follows the add.
    """

    starts: frozenset[fx.Node]
    in_front: bool
    behind: bool
    after: bool


_LABELS: dict[tuple[bool, bool, bool], Placement] = {
    (True, False, False): "pre",
    (False, False, True): "post",
    (True, True, False): "sandwich",
    (False, True, False): "peri",
}


class _Trunk:
    """The path of the residual stream through one block, and what is added to it."""

    def __init__(self, block: Block) -> None:
        self.input, self.inside = block.input, set(block.nodes)
        self.values: list[fx.Node] = []  # from output to input
        self.branches: list[tuple[fx.Node, bool]] = []  # and whether a norm follows the add
        self._known: dict[fx.Node, bool] = {}
        node, normalised = block.output, False
        while node is not None and self._is_stream(node):
            self.values.append(node)
            if node is self.input:
                break
            carrier, *added = sorted(node.all_input_nodes, key=self._is_stream, reverse=True)
            if is_call(node, ADD):
                self.branches += [(branch, normalised) for branch in added]
            if not is_call(node, _MOVES):
                normalised = Norm.match(node) is not None
            node = carrier

    def placement(self) -> Placement:
        """Return the label of the block."""
        found = [
            self._sublayer(end, after)
            for branch, after in self.branches
            for end in self._summands(branch)
        ]
        if len(found) > 1 and all(each.starts == {self.input} for each in found):
            return "parallel"
        forms = {(each.in_front, each.behind, each.after) for each in found}
        return _LABELS.get(forms.pop(), "none") if len(forms) == 1 else "none"

    def _is_stream(self, node: fx.Node) -> bool:
        """Tell whether a value is the block's input but for adds, norms, moves and scalings."""
        if node not in self._known:
            self._known[node] = node is self.input or (
                node in self.inside and any(map(self._is_stream, _along(node)))
            )
        return self._known[node]

    def _summands(self, node: fx.Node) -> list[fx.Node]:
        if node in self.inside and is_call(node, ADD):
            return [end for source in node.all_input_nodes for end in self._summands(source)]
        return [node]

    def _sublayer(self, end: fx.Node, after: bool) -> _Sublayer:
        trunk, starts, in_front = set(self.values), set(), True
        stack, seen = [end], {end}
        while stack:
            node = stack.pop()
            for source in node.all_input_nodes:
                if source in trunk and _is_tensor(node):
                    starts.add(source)
                    in_front &= _is_normalised(node)
                elif source in self.inside and source not in trunk | seen:
                    seen.add(source)
                    stack.append(source)
        last = end
        while Norm.match(last) is None and last in self.inside and (carriers := _along(last)):
            last = carriers[0]
        return _Sublayer(frozenset(starts), in_front, Norm.match(last) is not None, after)


def _along(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a call that it may carry through, as a residual stream or out of one."""
    if is_call(node, (*ADD, *_SCALINGS, *_MOVES)):
        return [s for s in node.all_input_nodes if _is_tensor(s) and not is_weight(s)]
    norm = Norm.match(node)
    return [norm.input] if norm else []


def _is_normalised(node: fx.Node) -> bool:
    """Tell whether a reader of the stream is a norm, or moves it to norms only."""
    if is_call(node, _MOVES):
        return all(map(_is_normalised, filter(_is_tensor, node.users)))
    return Norm.match(node) is not None


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
