"""Make RMSNorms of LayerNorms by keeping the residual stream without a mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ...ir import Linear, Norm, Program, insert_call, mark, marks_of
from ..base import Fidelity, Pass, PassContext, PassResult, Remark
from ..canonical.match import aten
from .channels import origin
from .readers import elsewhere, in_order, named, tied, untied
from .residual import Stream, Writer, center_writers, find_streams, other_reader


@dataclass(frozen=True, kw_only=True)
class CenterResidual(Pass):
    """Make every LayerNorm that reads the residual stream an RMSNorm, by centring what writes it.

    With ``P = 1 - (1/d) 1 1^T``, which subtracts the mean of d entries::

        LayerNorm(x) = g * P x / sqrt(mean((P x)^2) + eps) + b
        RMSNorm(x)   = g * x / sqrt(mean(x^2) + eps)

    so the two agree, with one eps and without b, where ``P x = x``.  The stream x is a sum, and P
    commutes with sums, moves and factors; so x has no mean once no writer gives one: the rows of
    token, position and type embeddings ``E: [rows, d]`` become ``E P``, and each linear that writes
    it ``W: [d, in]``, ``b: [d]`` becomes ``P W``, ``P b``.  Convolutions that make patches are
    linears, too.  Means are taken in float64, and rounded once.

    A norm that still has a bias stays a LayerNorm (a ``missed`` remark): run ``fold-norms`` first.
    A gain stays where it is.

    Refuses a stream, as a ``missed`` remark: where something else writes it (a norm with a gain or
    a bias, as in post-norm models; a call that is no linear and no embedding; quantised weights,
    which have a grid); where something sees its mean (an RMSNorm, a linear, an output of the
    graph); and where a writer's weight is read elsewhere, such as a tied head, unless ``untie``.  A
    tied head that reads a LayerNorm without gain and bias does not see the mean of its rows, and is
    no obstacle.  Models with RMSNorms only: nothing is to be done, and centring would change them.

    Attributes:
        untie: give a writer whose weight is read elsewhere a centred copy of its own.

    Source: arXiv 2401.15024 (SliceGPT), section 3.2; its release centres RMSNorm models, too, which
        is not exact.
    """

    name: ClassVar[str] = "center-residual"
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    untie: bool = False

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Decide for every stream, then centre and replace."""
        remarks: list[Remark] = []
        streams: list[Stream] = []
        for stream in find_streams(program):
            if reason := _reason(stream):
                remarks.append(_missed(stream, reason))
            else:
                streams.append(stream)
        # A refusal of one stream may cost another one that shares its writers' weights.
        while refused := [(s, why) for s in streams if (why := self._shared(program, s, streams))]:
            remarks += [_missed(stream, why) for stream, why in refused]
            streams = [s for s in streams if all(s is not other for other, _ in refused)]
        copies = [pair for stream in streams for pair in _elsewhere(program, stream, streams)]
        remarks += [untied(program, w.node, w.weight, other) for w, other in copies]
        found = [writer for stream in streams for writer in stream.writers]
        center_writers(program, [*found, *_indifferent(program, found)])
        for stream in streams:
            remarks += _replace(stream)
        return PassResult(program, tuple(in_order(program, remarks) or [_no_layer_norm(program)]))

    def _shared(self, program: Program, stream: Stream, streams: list[Stream]) -> str:
        """Return why a stream is refused because of a weight that is read elsewhere, if it is."""
        found = [] if self.untie else _elsewhere(program, stream, streams)
        return tied(found[0][0].node, found[0][1]) if found else ""


def _reason(stream: Stream) -> str:
    """Return why a stream is refused, for all that it is itself; empty where it is not."""
    if stream.reason:
        return stream.reason
    if other := other_reader(stream):
        what = "an output of the graph" if other.op == "output" else named(other)
        return f"{what} sees its mean"
    if all(norm.bias is not None for norm in stream.norms):
        return "the norm keeps a bias: run fold-norms first"
    return ""


def _missed(stream: Stream, reason: str) -> Remark:
    first, count = stream.norms[0].node.name, len(stream.norms)
    what = "1 LayerNorm stays" if count == 1 else f"{count} LayerNorms of this stream stay"
    return Remark("missed", first, f"{what}: {reason}")


def _no_layer_norm(program: Program) -> Remark:
    nodes = [node for graph in program.graphs.values() for node in graph.nodes]
    norms = [norm for node in nodes if (norm := Norm.match(node))]
    reason = f"all {len(norms)} norms are RMSNorms, which see the mean" if norms else "has no norm"
    return Remark("missed", next(iter(program.graphs)), reason)


def _elsewhere(
    program: Program, stream: Stream, streams: list[Stream]
) -> list[tuple[Writer, fx.Node]]:
    """Return readers of the stream's weights that would see that they are centred."""
    alike = {writer.node for other in streams for writer in other.writers}
    return [
        (writer, user)
        for writer in stream.writers
        for user in elsewhere(program, writer.weight, alike)
        if not (writer.axis == 1 and _reads_no_mean(user))
    ]


def _indifferent(program: Program, found: list[Writer]) -> list[Writer]:
    """Return the readers of tables that stay tied to them: heads that do not see their mean."""
    alike = {writer.node for writer in found}
    tables = [writer for writer in found if writer.axis == 1]
    users = {user for table in tables for user in elsewhere(program, table.weight, alike)}
    heads = [Linear.match(user) for user in users if _reads_no_mean(user)]
    return [Writer(head.node, head.weight, None, 1) for head in heads if head is not None]


def _reads_no_mean(reader: fx.Node) -> bool:
    """Tell whether a call is a linear whose input is a LayerNorm's without gain and bias."""
    linear = Linear.match(reader)
    if linear is None:
        return False
    node, last = linear.input, linear.input.meta["val"].dim() - 1
    while (norm := Norm.match(node)) is None:
        found = origin(node, last)
        if found is None:
            return False
        node, last = found
    bare = norm.kind == "layer" and norm.gain is None and norm.bias is None
    return bare and len(norm.sizes) == 1 and last == node.meta["val"].dim() - 1


def _replace(stream: Stream) -> list[Remark]:
    """Make RMSNorms of the norms that have no bias."""
    remarks = []
    for norm in stream.norms:
        # a table that the norm reads itself was replaced by its centred copy
        node, found = norm.node, Norm.match(norm.node)
        assert found is not None
        if found.bias is not None:
            why = "1 LayerNorm stays: the norm keeps a bias: run fold-norms first"
            remarks.append(Remark("missed", node.name, why))
            continue
        args = (found.input, list(found.sizes), found.gain, found.eps)
        call = insert_call(node.graph, aten.rms_norm.default, args, before=node, like=node)
        for name, text in marks_of(node).items():  # of equalising, and of waiting for heal
            mark(call, name, text)
        node.replace_all_uses_with(call)
        node.graph.erase_node(node)
        remarks.append(Remark("applied", call.name, f"RMSNorm in the place of %{node.name}"))
    if count := len(stream.writers):
        what = f"{count} writers of the stream centred" if count > 1 else "1 writer centred"
        remarks.insert(0, Remark("applied", stream.writers[0].node.name, what))
    return remarks
