"""The residual stream: what writes it, what reads it, and writers without a mean.

A stream is what a norm reads: a sum of what linears, convolutions and embeddings give, moved and
multiplied by factors that are the same for all entries of a position.  All of these commute with
subtracting the mean over a position's entries, so the stream has no mean when none of its writers
gives one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor, fx

from ...ir import (
    ComputedWeight,
    Convolution,
    Embedding,
    Linear,
    Norm,
    Program,
    call_name,
    is_weight,
)
from ...ir.calls import argument
from ..canonical.match import ADD, MUL, aten, is_call
from .channels import origin
from .readers import has_weights, is_quantized, named

CENTERED = "centered_out"


@dataclass(frozen=True, slots=True)
class Writer:
    """A call that adds to a residual stream.

    Attributes:
        node: a linear, a convolution or an embedding; or what reads a table that is a summand.
        weight: the weight it reads.
        bias: the bias it reads.
        axis: the axis of ``weight`` that is the stream's width.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    axis: int


@dataclass(slots=True, eq=False)
class Stream:
    """A residual stream, as far as some norms see it.

    Attributes:
        values: every value of it, each with the axis that is its width.
        writers: what is summed up in it; no two read one weight at one call.
        left: those that read one of the weights that were to be left alone.
        norms: the norms that it was found from.
        reason: why its mean cannot be removed by its writers; empty if it can.
    """

    values: dict[fx.Node, int] = field(default_factory=dict)
    writers: list[Writer] = field(default_factory=list)
    left: list[Writer] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    reason: str = ""

    def join(self, other: Stream) -> None:
        """Take another part of the same stream in."""
        self.values |= other.values
        self.writers += [writer for writer in other.writers if writer not in self.writers]
        self.left += [writer for writer in other.left if writer not in self.left]
        self.norms += other.norms
        self.reason = self.reason or other.reason


def writers(norm: Norm, leave: Collection[str] = ()) -> Stream:
    """Find what writes the residual stream that a norm reads, back to the embeddings.

    A LayerNorm without gain and bias on the way (an embedding norm) ends it: what it gives has no
    mean.

    Args:
        norm: over the last dimension.
        leave: names of weights whose writers are put into ``Stream.left`` instead of
            ``Stream.writers``, such as a token embedding that is tied to the head.
    """
    walk = _Walk(leave)
    walk.run(norm)
    return walk.stream


class _Walk:
    """Goes back from a value through sums, moves and factors."""

    def __init__(self, leave: Collection[str]) -> None:
        self.leave, self.stream = leave, Stream()
        self.todo: list[tuple[fx.Node, int, fx.Node]] = []  # value, axis, what reads it

    def run(self, norm: Norm) -> None:
        """Go back from what a norm reads."""
        self.stream.norms.append(norm)
        self._visit(norm.input, norm.input.meta["val"].dim() - 1, norm.node)
        while self.todo and not self.stream.reason:
            self._step(*self.todo.pop())

    def _visit(self, value: fx.Node, axis: int, reader: fx.Node) -> None:
        if is_weight(value):
            self._write(Writer(reader, value, None, axis))
        elif self.stream.values.setdefault(value, axis) != axis:
            self.stream.reason = f"{named(value)} is read along two axes"
        else:
            self.todo.append((value, axis, reader))

    def _write(self, writer: Writer) -> None:
        found = self.stream.left if writer.weight.target in self.leave else self.stream.writers
        if writer not in found:
            found.append(writer)

    def _step(self, value: fx.Node, axis: int, reader: fx.Node) -> None:
        writer = _writer(value, axis)
        if isinstance(writer, Writer):
            self._write(writer)
        elif (norm := Norm.match(value)) is not None:
            self.stream.reason = _norm_reason(norm, axis)
        elif (sources := _sources(value, axis)) is not None:
            for source, place in sources:
                self._visit(source, place, value)
        else:
            quantized = ", which is quantised already" if is_quantized(value) else ""
            self.stream.reason = f"%{value.name} ({_called(value)}) writes it{quantized}"


def _called(node: fx.Node) -> str:
    return f"input {node.target}" if node.op == "placeholder" else call_name(node)


def _writer(value: fx.Node, axis: int) -> Writer | None:
    """Return the view of a call whose outputs along ``axis`` are the outputs of its weight."""
    last = value.meta["val"].dim() - 1
    linear = Linear.match(value)
    if linear is not None and axis == last and has_weights(linear):
        return Writer(value, linear.weight, linear.bias, 0)
    table = Embedding.match(value)
    if table is not None and axis == last and is_weight(table.weight):
        return Writer(value, table.weight, None, 1)
    conv = Convolution.match(value)
    # a channel of a grouped convolution sees its group, and the mean is over all
    if conv is None or conv.transposed or conv.groups > 1 or not is_weight(conv.weight):
        return None
    channels = last - (conv.weight.meta["val"].dim() - 2)
    constant = conv.bias is None or is_weight(conv.bias)
    return Writer(value, conv.weight, conv.bias, 0) if axis == channels and constant else None


def _norm_reason(norm: Norm, axis: int) -> str:
    last = norm.node.meta["val"].dim() - 1
    if norm.kind == "rms":
        return f"{named(norm.node)} writes it, and sees the mean of what it reads"
    if len(norm.sizes) != 1 or axis != last:
        return f"{named(norm.node)} writes it, and normalises over something else"
    if norm.gain is not None or norm.bias is not None:
        return f"{named(norm.node)} writes it, whose gain or bias gives it a mean"
    return ""


def _sources(value: fx.Node, axis: int) -> list[tuple[fx.Node, int]] | None:
    """Return the summands of a sum, or what is moved or multiplied; None for another call."""
    if value.op != "call_function":
        return None
    if is_call(value, aten.cat.default):
        rank = value.meta["val"].dim()
        parts = argument(value, 0, "tensors")
        return None if argument(value, 1, "dim", 0) % rank == axis else [(p, axis) for p in parts]
    if is_call(value, ADD):
        return _summands(value, axis)
    if is_call(value, MUL):
        return _multiplied(value, axis, (0, 1))
    if is_call(value, aten.div.Tensor):
        return _multiplied(value, axis, (0,))
    found = origin(value, axis)
    return None if found is None else [found]


def _summands(value: fx.Node, axis: int) -> list[tuple[fx.Node, int]] | None:
    if len(value.args) != 2 or value.kwargs.get("alpha", 1) != 1:
        return None
    found = [_aligned(part, value, axis) for part in value.args]
    parts = [part for part in found if part is not None]
    return parts if len(parts) == 2 else None


def _multiplied(
    value: fx.Node, axis: int, places: tuple[int, ...]
) -> list[tuple[fx.Node, int]] | None:
    """Return the operand that has the stream's width, if the other one has not."""
    wide = [_aligned(part, value, axis) for part in value.args]
    found = [(place, part) for place, part in enumerate(wide) if part is not None]
    if len(value.args) != 2 or len(found) != 1 or found[0][0] not in places:
        return None
    return [found[0][1]]


def _aligned(part: object, value: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """Return an operand and its axis that ``axis`` of the result is made of, unless broadcast."""
    if not isinstance(part, fx.Node) or not isinstance(part.meta["val"], Tensor):
        return None
    before, after = part.meta["val"], value.meta["val"]
    place = axis - (after.dim() - before.dim())
    if place < 0 or str(before.shape[place]) != str(after.shape[axis]):
        return None
    return part, place


def find_streams(program: Program, leave: Collection[str] = ()) -> list[Stream]:
    """Return the residual streams that LayerNorms over the last dimension read, in graph order.

    Norms that see parts of one stream are together.

    Args:
        program: in canonical form.
        leave: see ``writers``.
    """
    found: list[Stream] = []
    order: dict[fx.Node, int] = {}
    for graph in program.graphs.values():
        for node in graph.nodes:
            order[node] = len(order)
            norm = Norm.match(node)
            if norm is None or norm.kind != "layer" or len(norm.sizes) != 1:
                continue
            stream = writers(norm, leave)
            parts = [each for each in found if each.values.keys() & stream.values.keys()]
            for part in parts:
                stream.join(part)
            found = [each for each in found if each not in parts] + [stream]
    for stream in found:
        stream.writers.sort(key=lambda writer: order[writer.node])
        stream.norms.sort(key=lambda norm: order[norm.node])
    return sorted(found, key=lambda stream: order[stream.norms[0].node])


def other_reader(stream: Stream) -> fx.Node | None:
    """Return a call that reads a value of the stream and sees its mean, or None.

    Reading means: more than its sizes, and not as a further part of the stream.  A LayerNorm over
    the stream's width does not see the mean.
    """
    for value, axis in stream.values.items():
        for user in value.users:
            norm = Norm.match(user)
            blind = (
                norm is not None
                and norm.kind == "layer"
                and norm.input is value
                and len(norm.sizes) == 1
                and axis == value.meta["val"].dim() - 1
            )
            size = user.op != "output" and not isinstance(user.meta["val"], Tensor | tuple | list)
            further = user in stream.values and _writer(user, stream.values[user]) is None
            if not (blind or size or further):
                return user
    return None


def center_writers(program: Program, found: Collection[Writer]) -> None:
    """Let writers read weights and biases without a mean over the stream's width.

    With ``P = 1 - (1/width) 1 1^T``: a linear's or a convolution's ``W: [width, ...]`` becomes
    ``P W`` and its bias ``P b``; the rows of a table ``E: [rows, width]`` become ``E P``.  Means
    are taken in float64, and rounded once.  Writers that share a weight share its centred copy.
    """
    made: dict[tuple[str, int], str] = {}

    def centered(node: fx.Node, axis: int, reader: fx.Node) -> fx.Node:
        key = (str(node.target), axis)
        if key not in made:
            old = program.weight(node)

            def without_mean(value: Tensor) -> Tensor:
                wide = value.double()
                return wide - wide.mean(axis, keepdim=True)

            rule = f"center axis={axis}"
            new = ComputedWeight(rule, (old,), old.shape, old.dtype, without_mean)
            made[key] = program.add_weight(f"{key[0]}.{CENTERED}", new)
        return program.weight_node(reader.graph, made[key], before=reader)

    for writer in found:
        node = writer.node
        node.replace_input_with(writer.weight, centered(writer.weight, writer.axis, node))
        if writer.bias is not None:
            node.replace_input_with(writer.bias, centered(writer.bias, 0, node))
