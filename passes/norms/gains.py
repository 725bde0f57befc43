"""Gains and biases of norms, folded into the linears that read them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ...ir import ComputedWeight, Linear, Norm, Program, QuantizedLinear, is_weight, mark, marks_of
from ..analysis.norm_placement import is_query_key_norm
from ..base import Remark
from .readers import elsewhere, in_order, named, nothing, readers, tied, untied

EQUALIZED = "equalized"
"""The mark of a norm whose gain divides channels by scales that its readers multiply them with."""
KEPT = "its gain equalises channels, which folding would undo: fold before equalising"


def hand_on(norm: fx.Node, call: fx.Node) -> None:
    """Let a call that takes the place of an equalised norm be known as one that equalises."""
    if EQUALIZED in marks_of(norm):
        mark(call, EQUALIZED, "true")


@dataclass(frozen=True, slots=True, eq=False)
class _Site:
    """A norm and all the linears that read it."""

    graph: fx.Graph
    norm: Norm
    linears: tuple[Linear, ...]

    @property
    def key(self) -> tuple[str | None, str | None]:
        """Names of gain and bias."""
        gain, bias = self.norm.gain, self.norm.bias
        return str(gain.target) if gain else None, str(bias.target) if bias else None

    def summary(self) -> str:
        """Say what is folded where."""
        parts = {"gain": self.norm.gain, "bias": self.norm.bias}
        what = " and ".join(name for name, part in parts.items() if part is not None)
        return f"{what} folded into {', '.join(f'%{x.node.name}' for x in self.linears)}"


def fold_gains(program: Program, *, untie: bool, leave: Collection[fx.Node] = ()) -> list[Remark]:
    """Fold what can be folded; see ``FoldNorms``.  One remark per norm that has parameters.

    Args:
        program: an editable copy.
        untie: give a linear whose weight is read elsewhere a folded copy of its own.
        leave: norms that keep their gain and bias, and are not spoken of.
    """
    sites, remarks = _sites(program, leave)
    folder = _Folder(program)
    # A refusal of one norm may cost another norm that shares its readers' weights.
    while refused := [(s, why) for s in sites if (why := _shared(program, s, sites, untie))]:
        remarks += [Remark("missed", s.norm.node.name, why) for s, why in refused]
        sites = [s for s in sites if all(s is not r for r, _ in refused)]
    for site in sites:
        copies = _elsewhere(program, site, sites)
        folder.fold(site)
        remarks.append(Remark("applied", site.norm.node.name, site.summary()))
        remarks += [untied(program, linear.node, linear.weight, other) for linear, other in copies]
    if not remarks:
        remarks.append(nothing(program, "gains", "no norm has a gain or a bias"))
    return in_order(program, remarks)


def _shared(program: Program, site: _Site, sites: list[_Site], untie: bool) -> str | None:
    """Return why a norm is refused because of a weight that is read elsewhere, if it is."""
    if untie:
        return None
    for linear, other in _elsewhere(program, site, sites):
        if Linear.match(other):
            return (
                f"the weight of %{linear.node.name} is also read by %{other.name}, which reads "
                "another norm; untie=true to force"
            )
        return tied(linear.node, other)
    return None


def _sites(program: Program, leave: Collection[fx.Node]) -> tuple[list[_Site], list[Remark]]:
    """Return the norms that only linears read, and remarks on the others that have parameters."""
    sites: list[_Site] = []
    remarks: list[Remark] = []
    for graph in program.graphs.values():
        for node in graph.nodes:
            norm = Norm.match(node)
            if norm is None or node in leave or (norm.gain is None and norm.bias is None):
                continue
            linears, others = readers(node)
            if reason := _unusual(norm):
                remarks.append(Remark("missed", node.name, reason))
            elif others:
                also = "also read by" if linears else "read by"
                why = ", ".join(_why_not(user, also) for user in dict.fromkeys(others))
                remarks.append(Remark("missed", node.name, why))
            elif linears:
                sites.append(_Site(graph, norm, tuple(linears)))
    return sites, remarks


def _unusual(norm: Norm) -> str:
    """Return why a norm's own form or place keeps its parameters; empty for a plain one."""
    if len(norm.sizes) != 1:
        return f"normalises over {len(norm.sizes)} dimensions, and a linear reads one"
    if not all(is_weight(part) for part in (norm.gain, norm.bias) if part is not None):
        return "its gain or bias is computed from activations"
    if EQUALIZED in marks_of(norm.node):
        return KEPT
    if is_query_key_norm(norm.node):
        return "normalises queries or keys: attention reads it, and no linear"
    return ""


def _why_not(user: fx.Node, also: str) -> str:
    if user.op == "output":
        return "an output of the graph"
    if QuantizedLinear.match(user):
        return f"read by %{user.name}, which is quantised already: fold before quantising"
    return f"{also} {named(user)}"


def _elsewhere(program: Program, site: _Site, sites: list[_Site]) -> list[tuple[Linear, fx.Node]]:
    """Return readers of the site's weights that are not folded with the same gain and bias."""
    alike = {linear.node for other in sites if other.key == site.key for linear in other.linears}
    return [
        (linear, user)
        for linear in site.linears
        for user in elsewhere(program, linear.weight, alike)
    ]


@dataclass(slots=True)
class _Folder:
    """Makes folded weights, one for each combination of weight, gain and bias."""

    program: Program
    made: dict[tuple[str | None, ...], str] = field(default_factory=dict)

    def fold(self, site: _Site) -> None:
        """Fold one norm into its readers."""
        for linear in site.linears:
            weight = self._weight(linear, site.norm)
            bias = self._bias(linear, site.norm)
            before = linear.node
            linear.set_weights(
                self.program.weight_node(site.graph, weight, before=before),
                self.program.weight_node(site.graph, bias, before=before) if bias else None,
            )
        site.norm.set_affine(None, None)

    def _weight(self, linear: Linear, norm: Norm) -> str:
        name = str(linear.weight.target)
        if norm.gain is None:
            return name
        key = (name, str(norm.gain.target))
        if key not in self.made:
            source, gain = self.program.weight(linear.weight), self.program.weight(norm.gain)
            folded = ComputedWeight(
                "fold-gain", (source, gain), source.shape, source.dtype, _scale_columns
            )
            self.made[key] = self.program.add_weight(f"{name}.folded", folded)
        return self.made[key]

    def _bias(self, linear: Linear, norm: Norm) -> str | None:
        old = linear.bias
        if norm.bias is None:
            return str(old.target) if old is not None else None
        key = (str(linear.weight.target), str(norm.bias.target), str(old.target) if old else None)
        if key not in self.made:
            source = self.program.weight(linear.weight)
            inputs = [source, self.program.weight(norm.bias)]
            inputs += [self.program.weight(old)] if old is not None else []
            folded = ComputedWeight("fold-bias", inputs, (source.shape[0],), source.dtype, _shift)
            name = str(old.target) if old is not None else bias_name(str(linear.weight.target))
            self.made[key] = self.program.add_weight(f"{name}.folded" if old else name, folded)
        return self.made[key]


def bias_name(weight: str) -> str:
    """Return what a bias is called that a linear without one gets."""
    head, _, last = weight.rpartition(".")
    return f"{head}.bias" if last == "weight" else f"{weight}.bias"


def _scale_columns(weight: Tensor, gain: Tensor) -> Tensor:
    return weight.double() * gain.double()


def _shift(weight: Tensor, shift: Tensor, bias: Tensor | None = None) -> Tensor:
    moved = torch.mv(weight.double(), shift.double())
    return moved if bias is None else moved + bias.double()
