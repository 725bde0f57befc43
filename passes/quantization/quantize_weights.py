"""Round weights to a few bits: data-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from ...ir import (
    Embedding,
    Linear,
    PassError,
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
    call_name,
    insert_call,
    path_of,
)
from ...ir.quant import QuantType
from ..base import Fidelity, Pass, PassResult, Remark
from ..compare import Same, check_same_values, rewritten_calls
from ..context import PassContext
from ..select import check_globs, check_matches, chosen
from .readers import Shared, find_shared, made_weights, quantized_paths, seen_paths
from .store import Stored, check_rounded, quality, store_rounded

Bits = Literal[2, 3, 4, 8]


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Round the weights of linears and embeddings to the nearest numbers of a coarse grid.

    With W: [out, in] in groups of ``group_size`` neighbours along ``in``, one scale s and one zero
    point z each:  code = clamp(round(W / s) + z, 0, 2**bits - 1),  W' = s * (code - z).

    - Asymmetric: lo = min(group, 0), hi = max(group, 0), s = (hi - lo) / (2**bits - 1),
      z = round(-lo / s).  Symmetric: z = 2**(bits-1), and s carries the sign that gives the longer
      side to the larger extreme.  ``clip="weight"`` shrinks s by the factor (1, 0.99, ..., 0.21)
      that has the least squared error over the group.  No data is needed.
    - Scales are stored in W's dtype, rounded up; so without clipping no number moves by more than
      half a step.  A weight is rounded once, from the value that the program has for it.
    - A weight read in several places stays one tensor.  One that an embedding shares with a linear
      is ruled by ``head_bits``, and so is a linear outside the blocks that makes the logits.
    - Embeddings inside blocks (relative positions) are left alone.

    Refuses (``missed``) weights that something else reads too, such as stacked experts or
    convolutions, those that the graph computes, and those that are quantised already.  An input
    width that ``group_size`` does not divide is an error, and so is a glob that matches nothing.

    Source: the min/max grid and the range search of QuantEase (arXiv 2309.01885, its
    method/quant.py), with the squared error in place of the power 2.4.

    Attributes:
        bits: width of a code.
        group_size: neighbours along the input axis that share a scale; -1: all of them.
        symmetric: store no zero points.
        clip: whether to search for a narrower range.
        head_bits: width for the head and for a weight that an embedding shares with a linear;
            ``bits``: as the others; none: not quantised.
        embedding_bits: width for embeddings of their own; none: not quantised.
        only: globs of module paths; other modules are left alone.
        ignore: globs of module paths to leave alone.
    """

    name: ClassVar[str] = "quantize-weights"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    bits: Bits = 4
    group_size: int = 32
    symmetric: bool = False
    clip: Literal["none", "weight"] = "none"
    head_bits: Literal["bits", 2, 3, 4, 8] | None = "bits"
    embedding_bits: Bits | None = None
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for bits in (self.bits, self._head_bits or self.bits, self.embedding_bits or self.bits):
            QuantType(bits, self.group_size, self.symmetric)
        if self.clip not in ("none", "weight"):
            raise ValueError(f"clip is none or weight, got {self.clip!r}")
        check_globs("only", self.only)
        check_globs("ignore", self.ignore)

    @property
    def _head_bits(self) -> int | None:
        return self.bits if self.head_bits == "bits" else self.head_bits

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Replace the weights that the options choose; one remark per weight."""
        found = find_shared(program)
        self._check_globs(program, found)
        remarks: list[Remark] = []
        plan: list[tuple[Shared, QuantType]] = []
        for shared in found:
            if not chosen(shared.paths, self.only, self.ignore):
                continue
            bits = self._bits_of(shared)
            if bits is None:
                continue
            if shared.obstacle:
                remarks.append(Remark("missed", f"@{shared.name}", shared.obstacle))
                continue
            plan.append((shared, self._type_of(program, shared, bits)))
        remarks += self._missed_calls(program)
        total = sum(program.weight(shared.name).bytes for shared, _ in plan)
        with context.progress.task("quantizing weights", total=total) as advance:
            for shared, qtype in plan:
                size = program.weight(shared.name).bytes
                remarks.append(self._replace(program, shared, qtype))
                advance(size)
        return PassResult(program, tuple(remarks))

    def _check_globs(self, program: Program, found: list[Shared]) -> None:
        paths = seen_paths(program, found)
        check_matches(paths, self.only, "only")
        check_matches(paths, self.ignore, "ignore")

    def _missed_calls(self, program: Program) -> list[Remark]:
        """Return remarks on chosen calls that have no weight to round."""
        missed: list[Remark] = []
        for name, paths, bits in quantized_paths(program):
            if chosen(paths, self.only, self.ignore):
                missed.append(Remark("missed", f"@{name}", f"quantised to {bits} bits already"))
        for node, maker in made_weights(program):
            if chosen((path_of(node),), self.only, self.ignore):
                reason = f"its weight is made by {call_name(maker)}"
                missed.append(Remark("missed", f"%{node.name}", reason))
        return missed

    def _bits_of(self, shared: Shared) -> int | None:
        if shared.head or (shared.embedding and shared.linear):
            return self._head_bits
        return self.embedding_bits if shared.embedding else self.bits

    def _type_of(self, program: Program, shared: Shared, bits: int) -> QuantType:
        """Return the number type of a weight.

        Raises:
            PassError: its rows do not fall into whole groups.
        """
        qtype = QuantType(bits, self.group_size, self.symmetric)
        width = program.weight(shared.name).shape[1]
        if qtype.divides(width):
            return qtype
        raise PassError(
            f"@{shared.name}: {width} wide, which group-size={self.group_size} does not divide",
            remedy="group-size=-1 (one group per row) is always legal; "
            f'or leave it alone with ignore="{shared.paths[0]}"',
        )

    def _replace(self, program: Program, shared: Shared, qtype: QuantType) -> Remark:
        """Make every reader of a weight read its codes instead."""
        name = shared.name
        weight = program.weight(name)
        stored = store_rounded(name, weight, qtype, self.clip)
        names = {
            part: program.add_weight(f"{name}.{part}", value)
            for part in ("codes", "scales", "zeros")
            if (value := getattr(stored, part)) is not None
        }
        for graph, node in shared.readers:
            _rewrite(program, graph, node, names, stored)
        noise = quality(weight.load(), stored.load())
        size = qtype.nbytes(weight.shape[0], weight.shape[1], weight.dtype)
        return Remark(
            "applied",
            f"@{name}",
            f"{qtype}, {noise:.1f} dB signal to error, {weight.bytes} -> {size} bytes",
        )

    def ensures(self, before: Program, after: Program) -> None:
        """Check that only weights changed, and that each is its rounded self, stored right.

        Raises:
            PassError: naming the call or the weight that is not.
        """
        check_same_values(before, after)
        stored_as: dict[str, Any] = {}
        for name, graph in before.graphs.items():
            for old, new in rewritten_calls(graph, after.graphs[name], _is_quantized):
                source, call = _weight_of(old), _quantized(new)
                parts = (call.codes.target, call.scales.target, call.zeros and call.zeros.target)
                if source not in stored_as:
                    stored_as[source] = parts
                    stored = Stored.of(after, call)
                    check_rounded(source, before.weight(source).load(), stored.load(), self.clip)
                elif stored_as[source] != parts:
                    raise PassError(f"%{new.name}: @{source} was shared, and is stored twice now")


def _rewrite(
    program: Program,
    graph: fx.Graph,
    node: fx.Node,
    names: dict[str, str],
    stored: Stored,
) -> None:
    """Put the quantised call in the place of ``node``."""
    parts = [
        program.weight_node(graph, names[part], before=node) if part in names else None
        for part in ("codes", "scales", "zeros")
    ]
    numbers = (stored.qtype.bits, stored.qtype.group_size, stored.in_features)
    ops: Any = torch.ops.modelathe
    # matched only now: the input may be a call that was replaced a moment ago
    if linear := Linear.match(node):
        target, args = ops.quantized_linear.default, (linear.input, *parts, linear.bias, *numbers)
    elif embedding := Embedding.match(node):
        target, args = ops.quantized_embedding.default, (embedding.ids, *parts, *numbers)
    else:
        raise AssertionError(f"%{node.name} is neither a linear nor an embedding")
    new = insert_call(graph, target, args, before=node, like=node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _is_quantized(old: fx.Node, new: fx.Node, same: Same) -> bool:
    """Whether ``new`` is ``old`` with a quantised weight: same input, same bias."""
    if (linear := Linear.match(old)) and (call := QuantizedLinear.match(new)):
        if linear.bias is None or call.bias is None:
            return same(linear.input, call.input) and linear.bias is call.bias
        return same(linear.input, call.input) and same(linear.bias, call.bias)
    if (embedding := Embedding.match(old)) and (rows := QuantizedEmbedding.match(new)):
        return same(embedding.ids, rows.ids)
    return False


def _weight_of(node: fx.Node) -> str:
    call = Linear.match(node) or Embedding.match(node)
    assert call is not None
    return str(call.weight.target)


def _quantized(node: fx.Node) -> QuantizedLinear | QuantizedEmbedding:
    call = QuantizedLinear.match(node) or QuantizedEmbedding.match(node)
    assert call is not None
    return call
