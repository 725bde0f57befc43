"""Loop a few unique blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from ...ir import (
    ComputedWeight,
    PassError,
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
)
from ..base import Fidelity, Pass, PassResult, Remark
from ..compare import Same, check_same_values, rewritten_calls, same_arguments
from ..context import PassContext
from .stacks import Stack, find_stacks, match_weights, weight_names


@dataclass(frozen=True, kw_only=True)
class TieBlocks(Pass):
    """Make L blocks read the weights of K unique ones, again and again in the same order (CYCLE).

    Block l (from 0) reads W'[l mod K], norms and biases included, and keeps its own cache.  With
    W[l] the weights of the input program, W'[k] is

    - ``stepwise``: W[round(k * (L - 1) / (K - 1))], halves rounded up: equal spacing, first and
      last block kept; the first for K = 1.
    - ``average``: the mean over all l with l mod K = k, summed in float64 and rounded once.
    - ``lower``: W[k].

    Without training afterwards this ruins most models, as the paper says: see ``heal``.

    Refuses, as an error: a graph without repeated blocks; a K that does not divide L; blocks that
    are not interchangeable (other calls, constants, shapes or masks, so one with sliding attention
    never gets the weights of one with full attention); averaging codes of quantised weights.  An
    encoder-decoder has two stacks of blocks, and each is tied.

    Source: Relaxed Recursive Transformers (arXiv 2410.20672), the looping and the initialisations.
    The rounding of ``stepwise`` is ours: the paper does not give it.

    Attributes:
        unique: K, the number of unique blocks.
        init: where their weights come from.
    """

    name: ClassVar[str] = "tie-blocks"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    unique: int
    init: Literal["stepwise", "average", "lower"] = "stepwise"

    def __post_init__(self) -> None:
        if self.unique < 1:
            raise ValueError(f"unique is at least 1, got {self.unique}")
        if self.init not in ("stepwise", "average", "lower"):
            raise ValueError(f"init is stepwise, average or lower, got {self.init!r}")

    def requires(self, program: Program) -> None:
        """Check that there are blocks, and that they fall into whole loops.

        Raises:
            PassError: they do not.
        """
        stacks = find_stacks(program)
        if not stacks:
            raise PassError(
                f"{self.name}: the graph has no repeated blocks", remedy="leave the pass out"
            )
        for stack in stacks:
            count = len(stack.blocks)
            if count % self.unique:
                legal = ", ".join(str(k) for k in range(1, count + 1) if count % k == 0)
                raise PassError(
                    f"{self.name}: unique={self.unique} does not divide the {count} blocks"
                    f" {stack.name}",
                    remedy=f"unique is one of {legal}; or prune blocks first",
                )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Tie every stack; one remark per unique block."""
        remarks: list[Remark] = []
        for stack in find_stacks(program):
            if self._is_tied(stack):
                reason = f"the blocks repeat after {self.unique} already"
                remarks.append(Remark("missed", stack.name, reason))
                continue
            # decide everything first: the sources are blocks that are tied too
            shared = [self._shared(program, stack, k) for k in range(self.unique)]
            for k, names in enumerate(shared):
                remarks.append(self._tie(program, stack, k, names))
        return PassResult(program, tuple(remarks))

    def _is_tied(self, stack: Stack) -> bool:
        names = [weight_names(stack.nodes(index)) for index in range(len(stack.blocks))]
        return all(own == names[index % self.unique] for index, own in enumerate(names))

    def _source(self, k: int, count: int) -> int:
        """Return the block whose weights, or whose place, the k-th unique one takes."""
        if self.init != "stepwise" or self.unique == 1:
            return k
        return math.floor(k * (count - 1) / (self.unique - 1) + 0.5)

    def _shared(self, program: Program, stack: Stack, k: int) -> dict[int, dict[str, str]]:
        """Return, for each block of the k-th kind, its weights' names and the shared ones.

        Raises:
            PassError: the blocks are not interchangeable, or their weights cannot be averaged.
        """
        source = self._source(k, len(stack.blocks))
        members = range(k, len(stack.blocks), self.unique)
        matched = {index: match_weights(program, stack, index, source) for index in members}
        if self.init != "average":
            return matched
        codes = _quantized(stack, members)
        if codes is not None:
            raise PassError(
                f"{self.name}: %{codes.name} reads codes, which have no average",
                remedy="tie before quantize-weights, or use init=stepwise or init=lower",
            )
        averages = {
            name: _average(program, [_inverse(matched[index])[name] for index in members])
            for name in matched[k]
        }
        return {
            index: {own: averages[name] for own, name in names.items()}
            for index, names in matched.items()
        }

    def _tie(
        self, program: Program, stack: Stack, k: int, shared: dict[int, dict[str, str]]
    ) -> Remark:
        """Make the blocks of the k-th kind read the shared weights."""
        before = {name for names in shared.values() for name in names}
        after = {name for names in shared.values() for name in names.values()}
        for index, names in shared.items():
            for node in stack.nodes(index):
                for read in node.all_input_nodes:
                    name = str(read.target)
                    if read.op == "get_attr" and names[name] != name:
                        other = program.weight_node(node.graph, names[name], before=node)
                        node.replace_input_with(read, other)
        origin = stack.blocks[self._source(k, len(stack.blocks))].key
        which = ", ".join(map(str, shared))
        what = "their mean" if self.init == "average" else f"the weights of {origin}"
        sizes = [sum(program.weight(name).bytes for name in names) for names in (before, after)]
        return Remark(
            "applied",
            stack.blocks[k].key,
            f"blocks {which} read {what}, {sizes[0]} -> {sizes[1]} bytes",
        )

    def ensures(self, before: Program, after: Program) -> None:
        """Check that blocks read the right weights, and that nothing else changed.

        Raises:
            PassError: naming the call, block or weight that is wrong.
        """
        check_same_values(before, after)
        stacks = {stack.name: stack for stack in find_stacks(before)}
        blocks = {n for s in stacks.values() for i in range(len(s.blocks)) for n in s.nodes(i)}
        for name, graph in before.graphs.items():
            for old, new in rewritten_calls(graph, after.graphs[name], _differs_in_weights):
                if old not in blocks:
                    raise PassError(f"%{new.name}: is in no block, and reads other weights now")
        for stack in find_stacks(after):
            self._check_stack(before, after, stacks[stack.name], stack)

    def _check_stack(self, before: Program, after: Program, old: Stack, new: Stack) -> None:
        count = len(old.blocks)
        was = [weight_names(old.nodes(index)) for index in range(count)]
        now = [weight_names(new.nodes(index)) for index in range(count)]
        if self._is_tied(old):
            if was != now:
                raise PassError(f"{new.name}: was tied before, and reads other weights now")
            return
        for index, names in enumerate(now):
            kind, key = index % self.unique, new.blocks[index].key
            if names != now[kind]:
                raise PassError(f"{key}: reads other weights than block {kind}")
            if self.init != "average" and names != was[self._source(kind, count)]:
                raise PassError(f"{key}: reads the weights of the wrong block")
            if self.init == "average" and index == kind:
                for name, *members in zip(names, *was[kind :: self.unique], strict=True):
                    _check_mean(before, after, name, members)


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {shared: own for own, shared in names.items()}


def _quantized(stack: Stack, members: range) -> fx.Node | None:
    """Return a call of one of the blocks that reads codes, or None."""
    calls = (node for index in members for node in stack.nodes(index))
    return next((n for n in calls if QuantizedLinear.match(n) or QuantizedEmbedding.match(n)), None)


def _average(program: Program, names: list[str]) -> str:
    """Add the mean of some weights, and return its name; the name itself where all are one."""
    first = program.weight(names[0])
    if len(set(names)) == 1 or not first.dtype.is_floating_point:
        return names[0]
    inputs = [program.weight(name) for name in names]
    mean = ComputedWeight("mean", inputs, first.shape, first.dtype, _mean)
    return program.add_weight(f"{names[0]}.mean", mean)


def _mean(*tensors: Tensor) -> Tensor:
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return total / len(tensors)


def _check_mean(before: Program, after: Program, name: str, members: list[str]) -> None:
    """Check that a weight lies within one rounding of the mean of ``members``."""
    value = after.weight(name).load()
    if not value.is_floating_point():
        return
    mean = torch.stack([before.weight(member).load().double() for member in members]).mean(0)
    near = mean.to(value.dtype)
    below, above = (torch.nextafter(near, near.new_tensor(end)) for end in (-torch.inf, torch.inf))
    if not bool(((value >= below) & (value <= above)).all()):
        raise PassError(f"@{name}: is not the mean of {', '.join('@' + m for m in members)}")


def _differs_in_weights(old: fx.Node, new: fx.Node, same: Same) -> bool:
    def alike(x: fx.Node, y: fx.Node) -> bool:
        return (x.op == "get_attr" and y.op == "get_attr") or same(x, y)

    return old.target == new.target and same_arguments(old, new, alike)
