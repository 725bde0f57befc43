"""Turn a norm whose deviation is a constant into weights, so that no norm is left."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, fx

from ...ir import ComputedWeight, Linear, Norm, Program, Weight, insert_call, is_weight, marks_of
from ...ir.calls import aten
from .gains import EQUALIZED, KEPT
from .readers import readers

NO_MEAN = "its mean over the width cannot be taken out of what writes its input"


@dataclass(frozen=True, slots=True)
class Constant:
    """What a frozen norm divides by.

    Attributes:
        usual: every token's deviation.
        first: that of a text's first token; None: as the others.
        ends: whether end-of-text tokens have that of the first one too.
    """

    usual: float
    first: float | None = None
    ends: bool = False


@dataclass(slots=True)
class Freezer:
    """Freezes norms of one program; weights that several linears share are made once.

    A norm without gain and bias that only linears read, ``y = P x / s`` with P = I - 1/d for a
    LayerNorm and P = I for an RMSNorm, goes into their weights::

        W (P x / s) + b  =  (W P / s) x + b

    A constant of its own for special tokens stays as one product with ``usual / first`` at those
    tokens.  What keeps its gain, because something else than a linear of its own reads it, stays
    as one product with ``g / s`` and one sum with ``b``, where its input has no mean to take out.
    """

    program: Program
    made: dict[tuple[str, str], str] = field(default_factory=dict)

    def freeze(
        self, norm: Norm, constant: Constant, centred: bool, factor: fx.Node | None
    ) -> str | None:
        """Replace a norm; return what is left of it, or None where nothing is.

        Args:
            norm: over one dimension, its gain and bias weights or none.
            constant: what it divides by.
            centred: whether its input is known to have mean zero.
            factor: what brings special tokens to the usual deviation.
        """
        graph = norm.node.graph
        value = norm.input if factor is None else self._product(graph, norm, factor)
        linears, others = readers(norm.node)
        plain = norm.gain is None and norm.bias is None
        if plain and linears and not others and self._own(linears):
            for linear in linears:
                weight = self._folded(linear, norm, constant.usual, centred)
                node = self.program.weight_node(graph, weight, before=linear.node)
                linear.set_weights(node, linear.bias)
            norm.node.replace_all_uses_with(value)
            return None
        scaled = self._affine(graph, norm, value, constant.usual)
        norm.node.replace_all_uses_with(scaled)
        return "one product and one sum" if norm.bias is not None else "one product"

    def can(self, norm: Norm) -> str | None:
        """Return why a norm cannot be frozen, or None where it can."""
        if len(norm.sizes) != 1:
            return f"normalises over {len(norm.sizes)} dimensions"
        if not all(is_weight(part) for part in (norm.gain, norm.bias) if part is not None):
            return "its gain or bias is computed from activations"
        linears, others = readers(norm.node)
        plain = norm.gain is None and norm.bias is None
        folds = plain and linears and not others and self._own(linears)
        if norm.kind == "layer" and not folds:
            why = f"%{others[0].name} reads it" if others else "its reader's weight is shared"
            why = KEPT if EQUALIZED in marks_of(norm.node) else why
            return f"{why}, and {NO_MEAN}"
        return None

    def _own(self, linears: list[Linear]) -> bool:
        """Tell whether the weights of these linears are read by nothing else."""
        nodes = {linear.node for linear in linears}
        names = {str(linear.weight.target) for linear in linears}
        return all(
            user in nodes
            for graph in self.program.graphs.values()
            for node in graph.find_nodes(op="get_attr")
            if str(node.target) in names
            for user in node.users
        )

    def _folded(self, linear: Linear, norm: Norm, usual: float, centred: bool) -> str:
        centre = norm.kind == "layer" and not centred
        name = str(linear.weight.target)
        rule = f"freeze-norm {usual!r} {centre}"
        if (name, rule) not in self.made:
            source = self.program.weight(linear.weight)
            folded = ComputedWeight(
                rule, (source,), source.shape, source.dtype, partial(_divide, usual, centre)
            )
            self.made[name, rule] = self.program.add_weight(f"{name}.frozen", folded)
        return self.made[name, rule]

    def _product(self, graph: fx.Graph, norm: Norm, factor: fx.Node) -> fx.Node:
        args = (norm.input, factor)
        return insert_call(graph, aten.mul.Tensor, args, before=norm.node, like=norm.node)

    def _affine(self, graph: fx.Graph, norm: Norm, value: fx.Node, usual: float) -> fx.Node:
        call = partial(insert_call, graph, before=norm.node, like=norm.node)
        if norm.gain is None:
            made = call(aten.mul.Tensor, (value, 1.0 / usual))
        else:
            gain = self.program.weight(norm.gain)
            name = self._vector(str(norm.gain.target), gain, usual)
            factor = self.program.weight_node(graph, name, before=norm.node)
            made = call(aten.mul.Tensor, (value, factor))
        return made if norm.bias is None else call(aten.add.Tensor, (made, norm.bias))

    def _vector(self, name: str, gain: Weight, usual: float) -> str:
        rule = f"freeze-gain {usual!r}"
        if (name, rule) not in self.made:
            scaled = ComputedWeight(
                rule, (gain,), gain.shape, gain.dtype, partial(_divide, usual, False)
            )
            self.made[name, rule] = self.program.add_weight(f"{name}.frozen", scaled)
        return self.made[name, rule]


def _divide(usual: float, centre: bool, weight: Tensor) -> Tensor:
    wide = weight.double()
    return (wide - wide.mean(-1, keepdim=True) if centre else wide) / usual
