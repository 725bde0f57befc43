"""Fold batch norms into the linears and convolutions around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ...ir import BatchNorm, Program, is_weight
from ..base import Fidelity, Pass, PassContext, PassResult, Remark
from ..canonical.match import aten, is_call
from .affine import ChannelMap
from .fold_maps import Site, fold_maps, in_graph_order, node_names
from .rep_batch_norm import RepBatchNorm

_BATCH_NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit.no_stats)


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorms(Pass):
    """Fold each batch norm by fixed statistics into the linears and convolutions around it.

    With mean ``m``, variance ``v``, gain ``g`` and bias ``s``, each ``[channels]``, it computes
    ``a x + c`` with ``a = g / sqrt(v + eps)`` and ``c = s - a m``.  With ``W: [out, in]`` (the taps
    of a kernel one by one, the groups of a convolution each for itself) and ``b: [out]``::

        before it:  a (W x + b) + c  =  (diag(a) W) x + (a b + c)
        behind it:  W (a x + c) + b  =  (W diag(a)) x + (b + W c)

    ``W c`` sums over the taps.  The linear or convolution, transposed or not, that makes a norm's
    input takes it in where nothing else reads that; otherwise all that read its result do.  Calls
    that treat channels alike may stand between: views, transpositions, slices, means over other
    axes.  Each folded weight is computed in float64 and rounded once, to its own dtype.

    Refuses (a ``missed`` remark) a norm whose input others read too and whose result something else
    reads, such as an activation; to fold into a convolution behind the norm that pads with zeros,
    for they are not shifted, or that is transposed, for it would add the shift unevenly; a weight
    that is read elsewhere too, unless ``untie`` says that a copy may be made; a norm that computes
    its statistics from the batch; and one that is half of a RepBN, which fold-rep-batch-norms
    takes.

    Attributes:
        untie: give a product whose weight is read elsewhere a folded copy of its own.

    Source: arXiv 1502.03167 (batch normalization), section 3.1, for inference by fixed statistics.
    """

    name: ClassVar[str] = "fold-batch-norms"
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    untie: bool = False

    def run(self, program: Program, context: PassContext) -> PassResult:
        order = node_names(program)
        remarks, left = fold_maps(program, _sites, self.untie)
        remarks += [Remark("missed", site.node.name, why) for site, why in left]
        remarks += _out_of_reach(program)
        return PassResult(program, tuple(in_graph_order(program, remarks, order)))


def _sites(program: Program) -> list[Site]:
    """Return the batch norms that are affine maps of their own."""
    return [
        Site(
            graph,
            norm.node,
            norm.input,
            norm.outputs,
            1,
            ChannelMap.of(program, norm),
            frozenset([norm.node, *norm.outputs]),
        )
        for graph in program.graphs.values()
        for norm, reason in _batch_norms(graph)
        if not reason
    ]


def _batch_norms(graph: fx.Graph) -> list[tuple[BatchNorm, str]]:
    """Return the batch norms by fixed statistics, and why each is no map of its own, if it is."""
    halves = {rep.norm.node for rep in map(RepBatchNorm.match, graph.nodes) if rep is not None}
    found = []
    for norm in filter(None, map(BatchNorm.match, graph.nodes)):
        parts = (norm.mean, norm.variance, norm.gain, norm.bias)
        reason = ""
        if not all(is_weight(part) for part in parts if part is not None):
            reason = "its statistics, gain or bias are computed from activations"
        elif norm.node in halves:
            reason = "a RepBN adds a multiple of its input to it: see fold-rep-batch-norms"
        found.append((norm, reason))
    return found


def _out_of_reach(program: Program) -> list[Remark]:
    """Return why batch norms are no maps of their own."""
    remarks = []
    for graph in program.graphs.values():
        found = _batch_norms(graph)
        known = {norm.node for norm, _ in found}
        remarks += [Remark("missed", norm.node.name, reason) for norm, reason in found if reason]
        remarks += [
            Remark("missed", node.name, "computes its statistics from the batch")
            for node in graph.nodes
            if is_call(node, _BATCH_NORMS) and node not in known
        ]
    return remarks
