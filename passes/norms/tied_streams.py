"""A residual stream without a mean, where the token embedding is tied to the head."""

from __future__ import annotations

from functools import partial

from torch import Tensor, fx

from ...ir import ComputedWeight, Embedding, Norm, Program, insert_call, marks_of
from ..canonical.match import aten
from ..training.switches import SWITCH
from .readers import elsewhere, named
from .residual import Stream, center_writers, other_reader, writers


def tied_stream(program: Program, norm: Norm) -> Stream:
    """Return the stream that a LayerNorm reads; ``reason`` says why it keeps its mean, if it does.

    Tables that something else reads too, as a tied head does, are in ``left``.
    """
    first = writers(norm)
    alike = {writer.node for writer in first.writers}
    shared = {
        str(writer.weight.target)
        for writer in first.writers
        if elsewhere(program, writer.weight, alike)
    }
    stream = writers(norm, shared)
    for writer in stream.left:
        if not Embedding.match(writer.node):
            stream.reason = stream.reason or f"the weight of {named(writer.node)} is read elsewhere"
    if not stream.reason and (other := other_reader(stream) or _waiting(stream)) is not None:
        stream.reason = f"{named(other)} sees its mean"
    return stream


def _waiting(stream: Stream) -> fx.Node | None:
    """Return a norm that another pass has trained something in place of, which sees the mean."""
    users = (user for value in stream.values for user in value.users)
    return next((user for user in users if SWITCH in marks_of(user)), None)


def center_stream(program: Program, stream: Stream) -> None:
    """Take the mean out of all that writes a stream.

    A table E: [rows, width] in ``left`` stays as it is; its means m: [rows, 1] are a table of their
    own, and ``E[ids] - m[ids]`` takes the place of ``E[ids]`` in the stream.
    """
    center_writers(program, stream.writers)
    for writer in stream.left:
        table = Embedding.match(writer.node)
        assert table is not None
        weight = program.weight(table.weight)
        means = ComputedWeight("row-means", (weight,), (weight.shape[0], 1), weight.dtype, _means)
        name = program.add_weight(f"{table.weight.target}.means", means)
        graph, after = writer.node.graph, writer.node.next
        source = program.weight_node(graph, name, before=after)
        call = partial(insert_call, graph, before=after, like=writer.node)
        mean = call(aten.embedding.default, (source, table.ids))
        users = list(writer.node.users)
        centred = call(aten.sub.Tensor, (writer.node, mean))
        for user in users:
            user.replace_input_with(writer.node, centred)


def _means(table: Tensor) -> Tensor:
    return table.double().mean(-1, keepdim=True)
