"""Linears that read a LayerNorm, without what a mean of their input would add."""

from __future__ import annotations

from torch import Tensor, fx

from ...ir import ComputedWeight, Linear, Norm, Program, last_made
from ..base import Remark
from .readers import CENTERINGS, elsewhere, in_order, is_quantized, nothing, readers, tied, untied

_CENTERED = "centered_in"


def center_readers(program: Program, *, untie: bool) -> list[Remark]:
    """Centre what can be centred; see ``FoldNorms``.  One remark per norm that linears read."""
    sites, remarks = _sites(program)
    alike = {linear.node for linears in sites.values() for linear in linears}
    centered: list[Linear] = []
    for norm, linears in sites.items():
        done: list[Linear] = []
        for linear in linears:
            others = elsewhere(program, linear.weight, alike)
            if others and not untie:
                why = f"center-readers: {tied(linear.node, others[0])}"
                remarks.append(Remark("missed", linear.node.name, why))
                continue
            remarks += [untied(program, linear.node, linear.weight, other) for other in others]
            done.append(linear)
        if done:
            names = ", ".join(f"%{linear.node.name}" for linear in done)
            remarks.append(Remark("applied", norm.name, f"rows of {names} centred"))
        centered += done
    _center(program, centered)
    if not remarks:
        reason = "no linear reads a LayerNorm, or all that do are centred"
        remarks.append(nothing(program, "center-readers", reason))
    return in_order(program, remarks)


def _sites(program: Program) -> tuple[dict[fx.Node, list[Linear]], list[Remark]]:
    """Return the linears that read each bare LayerNorm, and remarks on the other norms."""
    sites: dict[fx.Node, list[Linear]] = {}
    remarks: list[Remark] = []
    for graph in program.graphs.values():
        with_mean = []
        for node in graph.nodes:
            norm = Norm.match(node)
            if norm is None or len(norm.sizes) != 1:
                continue
            linears, others = readers(node)
            linears = [
                x for x in linears if not last_made(str(x.weight.target), _CENTERED, *CENTERINGS)
            ]
            quantized = [other for other in others if is_quantized(other)]
            if norm.kind == "rms":
                with_mean += [norm] if linears else []
            elif linears and not (norm.gain is None and norm.bias is None):
                why = "center-readers: its gain or bias, which is still there, gives it a mean"
                remarks.append(Remark("missed", node.name, why))
            elif linears:
                sites[node] = linears
            if quantized:
                why = f"center-readers: %{quantized[0].name} is quantised already"
                remarks.append(Remark("missed", node.name, why))
        if with_mean:
            why = f"center-readers: {len(with_mean)} RMSNorms that linears read have a mean"
            remarks.append(Remark("missed", with_mean[0].node.name, why))
    return sites, remarks


def _center(program: Program, linears: list[Linear]) -> None:
    """Let linears read centred weights; those that share one share its copy."""
    made: dict[str, str] = {}
    for linear in linears:
        name = str(linear.weight.target)
        if name not in made:
            old = program.weight(linear.weight)
            new = ComputedWeight("center-rows", (old,), old.shape, old.dtype, _centered)
            made[name] = program.add_weight(f"{name}.{_CENTERED}", new)
        weight = program.weight_node(linear.node.graph, made[name], before=linear.node)
        linear.set_weights(weight, linear.bias)


def _centered(weight: Tensor) -> Tensor:
    wide = weight.double()
    return wide - wide.mean(1, keepdim=True)
