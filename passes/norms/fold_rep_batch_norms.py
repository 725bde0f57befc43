"""Fold RepBN into the linears and convolutions around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from ...ir import Program, insert_call, is_weight, path_of
from ..base import Fidelity, Pass, PassContext, PassResult, Remark
from ..canonical.match import aten
from .affine import ChannelMap
from .channels import unpermuted
from .fold_maps import Site, fold_maps, in_graph_order, node_names
from .rep_batch_norm import RepBatchNorm, merge_permutations


@dataclass(frozen=True, kw_only=True)
class FoldRepBatchNorms(Pass):
    """Fold each ``RepBN(x) = BN(x) + alpha x`` into the linears and convolutions around it.

    With mean ``m``, variance ``v``, gain ``g`` and bias ``s``, each ``[channels]``, and one number
    ``alpha``, it computes ``a x + c``::

        a = g / sqrt(v + eps) + alpha,    c = s - g m / sqrt(v + eps)

    and with ``W: [out, in]`` and ``b: [out]``::

        before it:  a (W x + b) + c  =  (diag(a) W) x + (a b + c)
        behind it:  W (a x + c) + b  =  (W diag(a)) x + (b + W c)

    The released code of the paper computes the bias of a linear before it as
    ``g (b - m) / sqrt(v + eps) + s``, which lacks ``alpha b``; this pass has it.  What may stand
    between, what is refused, and rounding are as in fold-batch-norms.  A RepBN that stays becomes
    one product and one sum, ``a x + c``, with ``a`` and ``c`` rounded once; a ``missed`` remark
    says why it stays.

    Attributes:
        untie: give a product whose weight is read elsewhere a folded copy of its own.

    Source: SLAB (arXiv 2405.11582), section 3.2.
    """

    name: ClassVar[str] = "fold-rep-batch-norms"
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    untie: bool = False

    def run(self, program: Program, context: PassContext) -> PassResult:
        order = node_names(program)
        remarks, left = fold_maps(program, _sites, self.untie)
        for site, why in left:
            _shorten(program, site)
            name = site.node.name
            remarks.append(Remark("missed", name, why))
            remarks.append(Remark("applied", name, "computed as one product and one sum"))
        if remarks:
            for graph in program.graphs.values():
                merge_permutations(graph)
        return PassResult(program, tuple(in_graph_order(program, remarks, order)))


def _sites(program: Program) -> list[Site]:
    sites = []
    for graph in program.graphs.values():
        for rep in filter(None, map(RepBatchNorm.match, graph.nodes)):
            parts = (rep.norm.mean, rep.norm.variance, rep.norm.gain, rep.norm.bias)
            if not all(is_weight(part) for part in parts if part is not None):
                continue
            alpha = rep.alpha if isinstance(rep.alpha, float) else program.weight(rep.alpha)
            channels = ChannelMap.of(program, rep.norm, alpha)
            sites.append(
                Site(graph, rep.node, rep.input, (rep.node,), rep.axis, channels, rep.inner)
            )
    return sites


def _shorten(program: Program, site: Site) -> None:
    """Compute the map as one product and one sum, where the axes are not permuted yet."""
    root, order = unpermuted(site.input)
    value: Tensor = root.meta["val"]
    axis = order[site.axis]
    shape = (int(value.shape[axis]), *[1] * (value.dim() - 1 - axis))
    base = path_of(site.node) or site.node.name
    scale, shift = (
        program.weight_node(
            site.graph, program.add_weight(f"{base}.{name}", weight), before=site.node
        )
        for name, weight in zip(
            ("scale", "shift"), site.channels.weights(value.dtype, shape), strict=True
        )
    )

    def call(target: object, *args: object) -> fx.Node:
        return insert_call(site.graph, target, args, before=site.node, like=site.node)

    result = call(aten.add.Tensor, call(aten.mul.Tensor, root, scale), shift)
    if order != tuple(range(len(order))):
        result = call(aten.permute.default, result, list(order))
    site.node.replace_all_uses_with(result)
