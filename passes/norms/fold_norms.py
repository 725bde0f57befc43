"""Fold the gain and the bias of norms into the linears that read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from ...ir import (
    ComputedWeight,
    Embedding,
    Linear,
    Norm,
    Program,
    QuantizedLinear,
    call_name,
    path_of,
)
from ...ir.calls import argument, is_weight
from ..base import Fidelity, Pass, PassContext, PassResult, Remark
from ..canonical.match import aten, is_call

# What may stand between a norm and a linear: it moves rows and leaves the last dimension alone.
_ROW_MOVES = (
    aten.slice.Tensor,
    aten.select.int,
    aten.view.default,
    aten.reshape.default,
    aten.clone.default,
    aten.index.Tensor,
)


@dataclass(frozen=True, kw_only=True)
class FoldNorms(Pass):
    """Fold the gain and bias of each LayerNorm and RMSNorm into every linear that reads it.

    With gain ``g: [in]``, bias ``s: [in]``, ``W: [out, in]`` and ``b: [out]``::

        W (g * n(x) + s) + b  =  (W * g) n(x) + (W s + b)

    so the norm keeps no parameters, and a linear without a bias gets one only where ``s`` is not
    absent.  Products are taken in float64 and rounded once.  A weight that several linears share
    stays shared when all of them read the same gain and bias.

    Refuses (a ``missed`` remark) a norm that anything but a linear reads, such as the residual
    stream of a post-norm block; a norm whose reader is quantised already, since folding would
    change the grid; and a norm whose reader's weight is read elsewhere too, such as a tied head,
    unless ``untie`` says that a copy may be made.

    Attributes:
        untie: give a linear whose weight is read elsewhere a folded copy of its own.

    Source: arXiv 2401.15024 (SliceGPT), section 3, for the fold into readers.
    """

    name: ClassVar[str] = "fold-norms"
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    untie: bool = False

    def run(self, program: Program, context: PassContext) -> PassResult:
        sites, remarks = _sites(program)
        folder = _Folder(program)
        # A refusal of one norm may cost another norm that shares its readers' weights.
        while refused := [(s, why) for s in sites if (why := self._shared(program, s, sites))]:
            remarks += [Remark("missed", s.norm.node.name, why) for s, why in refused]
            sites = [s for s in sites if all(s is not r for r, _ in refused)]
        for site in sites:
            untied = _elsewhere(program, site, sites)
            folder.fold(site)
            remarks.append(Remark("applied", site.norm.node.name, site.summary()))
            remarks += [_untied(program, linear, other) for linear, other in untied]
        order = {node.name: i for g in program.graphs.values() for i, node in enumerate(g.nodes)}
        remarks.sort(key=lambda remark: order.get(remark.where, -1))
        return PassResult(program, tuple(remarks))

    def _shared(self, program: Program, site: _Site, sites: list[_Site]) -> str | None:
        """Return why a norm is refused because of a weight that is read elsewhere, if it is."""
        if self.untie:
            return None
        for linear, other in _elsewhere(program, site, sites):
            if Embedding.match(other):
                return "head is tied; untie=true to force"
            return (
                f"the weight of %{linear.node.name} is also read by %{other.name}, which reads "
                "another norm; untie=true to force"
            )
        return None


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
        what = "gain and bias" if self.norm.bias is not None else "gain"
        return f"{what} folded into {', '.join(f'%{x.node.name}' for x in self.linears)}"


def _sites(program: Program) -> tuple[list[_Site], list[Remark]]:
    """Return the norms that only linears read, and remarks on the others that have parameters."""
    sites: list[_Site] = []
    remarks: list[Remark] = []
    for graph in program.graphs.values():
        for node in graph.nodes:
            norm = Norm.match(node)
            if norm is None or (norm.gain is None and norm.bias is None):
                continue
            linears, others = _readers(node)
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
    """Return why a norm's own form keeps its parameters; empty for a plain one."""
    if len(norm.sizes) != 1:
        return f"normalises over {len(norm.sizes)} dimensions, and a linear reads one"
    if not all(is_weight(part) for part in (norm.gain, norm.bias) if part is not None):
        return "its gain or bias is computed from activations"
    return ""


def _readers(node: fx.Node) -> tuple[list[Linear], list[fx.Node]]:
    """Return the linears that read a value, and whatever else does."""
    linears: list[Linear] = []
    others: list[fx.Node] = []
    for user in node.users:
        linear = Linear.match(user)
        if linear is not None and linear.input is node and _has_weights(linear):
            linears.append(linear)
        elif _moves_rows(user, node):
            further = _readers(user)
            linears += further[0]
            others += further[1]
        else:
            others.append(user)
    return linears, others


def _has_weights(linear: Linear) -> bool:
    """Tell whether weight and bias of a linear are weights of the program, not activations."""
    return is_weight(linear.weight) and (linear.bias is None or is_weight(linear.bias))


def _moves_rows(user: fx.Node, source: fx.Node) -> bool:
    """Tell whether a call leaves the last dimension of ``source`` as it is."""
    if not is_call(user, _ROW_MOVES) or argument(user, 0, "self") is not source:
        return False
    before: Tensor = source.meta["val"]
    after: Tensor = user.meta["val"]
    if str(before.shape[-1]) != str(after.shape[-1]):
        return False
    if is_call(user, (aten.slice.Tensor, aten.select.int)):
        return int(argument(user, 1, "dim", 0)) % before.dim() != before.dim() - 1
    if is_call(user, aten.index.Tensor):
        return len(list(argument(user, 1, "indices"))) < before.dim()
    return True


def _why_not(user: fx.Node, also: str) -> str:
    if user.op == "output":
        return "an output of the graph"
    if QuantizedLinear.match(user):
        return f"read by %{user.name}, which is quantised already: fold before quantising"
    return f"{also} %{user.name} ({call_name(user)})"


def _elsewhere(program: Program, site: _Site, sites: list[_Site]) -> list[tuple[Linear, fx.Node]]:
    """Return readers of the site's weights that are not folded with the same gain and bias."""
    alike = {linear.node for other in sites if other.key == site.key for linear in other.linears}
    found = []
    for linear in site.linears:
        for graph in program.graphs.values():
            for node in graph.find_nodes(op="get_attr"):
                if node.target == linear.weight.target:
                    found += [(linear, user) for user in node.users if user not in alike]
    return found


def _untied(program: Program, linear: Linear, other: fx.Node) -> Remark:
    size = program.weight(linear.weight).bytes
    where = path_of(linear.node) or linear.node.name
    return Remark("applied", linear.node.name, f"untied {where} from %{other.name}: {size} bytes")


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
            name = str(old.target) if old is not None else _bias_name(str(linear.weight.target))
            self.made[key] = self.program.add_weight(f"{name}.folded" if old else name, folded)
        return self.made[key]


def _bias_name(weight: str) -> str:
    head, _, last = weight.rpartition(".")
    return f"{head}.bias" if last == "weight" else f"{weight}.bias"


def _scale_columns(weight: Tensor, gain: Tensor) -> Tensor:
    return weight.double() * gain.double()


def _shift(weight: Tensor, shift: Tensor, bias: Tensor | None = None) -> Tensor:
    moved = torch.mv(weight.double(), shift.double())
    return moved if bias is None else moved + bias.double()
