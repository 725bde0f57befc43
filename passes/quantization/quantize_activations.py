"""Round what quantised linears read, so that they multiply integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from ...ir import (
    PassError,
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
    insert_call,
    path_of,
)
from ...ir.activations import (
    RoundedActivations,
    dynamic_step,
    largest_code,
    rounded_activations,
)
from ...ir.sparse import is_beside
from ..base import Fidelity, Pass, PassResult, Remark
from ..compare import check_same_values
from ..context import PassContext
from ..probes import probes
from ..select import check_globs, check_matches, chosen
from .ranges import fixed_codes, measure_ranges

_LINEAR_BITS = 8
_REMEDY = "put quantize-weights{bits=8 group-size=-1} before it"


@dataclass(frozen=True, kw_only=True)
class QuantizeActivations(Pass):
    """Round the input of linears with 8-bit weights to codes of ``bits``.

    y = x' W'^T + b with W': [out, in] = s_w[out] (codes - z_w), and x': [..., in] of whole steps,

    - dynamic: every token has its own step, max |x| / (2**(bits-1) - 1), found when the model
      runs.  What stands beside a token changes nothing: neither padding nor a cache.
    - static: one step s and one zero point z for all tokens, from the least and the greatest number
      lo <= 0 <= hi on calibration text: s = (hi - lo) / (2**bits - 1), z = round(-lo / s).  What
      lies outside is clipped.

    x' W'^T is then a sum of products of integers and one multiplication.  Linears that read the
    same value share its codes.  Products with outliers beside codes read x as it is.

    It stands behind ``quantize-weights{bits=8 group-size=-1}``: one scale for each row of a weight
    comes out of the sum, one for each group does not.  Refuses (``missed``) linears whose weight is
    not quantised, has groups or other than 8 bits, or is an embedding's too, which would be stored
    twice; convolutions are not looked at.  A program without quantised linears is an error.

    Where it pays: ONNX Runtime on whole sentences or prompts.  Static is a little faster than
    dynamic and loses more wherever a few tokens have far larger numbers than the rest.  bits=7 is
    for processors whose 8-bit products overflow (x86 without VNNI, where ONNX Runtime is not told
    ``session.x64quantprecision``): two products of 7-bit by 8-bit codes fit 16 bits.

    Source: per-token activations and per-channel weights as in LLM.int8() (arXiv 2208.07339) and
    ZeroQuant (arXiv 2206.01861); the static form is the affine min/max one of Jacob et al. (arXiv
    1712.05877).

    Attributes:
        bits: width of a code, 7 or 8.
        mode: dynamic or static.
        only: globs of module paths; other modules are left alone.
        ignore: globs of module paths to leave alone.
    """

    name: ClassVar[str] = "quantize-activations"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    bits: Literal[7, 8] = 8
    mode: Literal["dynamic", "static"] = "dynamic"
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (7, 8):
            raise ValueError(f"bits is 7 or 8, got {self.bits}")
        if self.mode not in ("dynamic", "static"):
            raise ValueError(f"mode is dynamic or static, got {self.mode!r}")
        check_globs("only", self.only)
        check_globs("ignore", self.ignore)

    def requires(self, program: Program) -> None:
        """Check that there are quantised linears.

        Raises:
            PassError: there are none.
        """
        if not any(_quantized(graph) for graph in program.graphs.values()):
            raise PassError(f"{self.name}: no linear has quantised weights", remedy=_REMEDY)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Round each input once; one remark per input and per refusal."""
        paths = {path_of(node) for graph in program.graphs.values() for node in _linears(graph)}
        check_matches(paths, self.only, "only")
        check_matches(paths, self.ignore, "ignore")
        remarks: list[Remark] = []
        inputs = {
            name: self._inputs(program, graph, remarks) for name, graph in program.graphs.items()
        }
        ranges = {}
        if self.mode == "static" and any(inputs.values()):
            ranges = measure_ranges(program, dict(inputs), context)
        for name, found in inputs.items():
            for value, linears in found.items():
                codes = fixed_codes(*ranges[value], self.bits) if ranges else None
                self._round(program, program.graphs[name], value, linears, codes)
                remarks.append(_remark(value, linears, self.bits, codes))
        return PassResult(program, tuple(remarks))

    def _inputs(
        self, program: Program, graph: fx.Graph, remarks: list[Remark]
    ) -> dict[fx.Node, list[QuantizedLinear]]:
        """Return the values to round and their readers; a remark for each linear that is not."""
        found: dict[fx.Node, list[QuantizedLinear]] = {}
        looked_up = _looked_up(program)
        for node in _linears(graph):
            if not chosen((path_of(node),), self.only, self.ignore):
                continue
            linear = QuantizedLinear.match(node)
            why = "its weight is not quantised" if linear is None else _obstacle(linear, looked_up)
            if linear is None or why:
                remarks.append(Remark("missed", f"%{node.name}", why))
            else:
                found.setdefault(linear.input, []).append(linear)
        return found

    def _round(
        self,
        program: Program,
        graph: fx.Graph,
        value: fx.Node,
        linears: list[QuantizedLinear],
        codes: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Put the rounded value in the place of ``value`` in ``linears``."""
        first = linears[0].node
        parts: list[fx.Node | None] = [None, None]
        if codes is not None:
            names = [
                program.add_weight(f"{path_of(first) or first.name}.input_{part}", tensor)
                for part, tensor in zip(("scale", "zero"), codes, strict=True)
            ]
            program.weights.buffers |= set(names)
            parts = [program.weight_node(graph, name, before=first) for name in names]
        target: Any = torch.ops.modelathe.round_activations.default
        rounded = insert_call(graph, target, (value, *parts, self.bits), before=first, like=first)
        for linear in linears:
            linear.node.replace_input_with(value, rounded)

    def ensures(self, before: Program, after: Program) -> None:
        """Check that nothing but the rounding is new, and what it does on small inputs.

        With all roundings left out the outputs are those of ``before``, bit for bit.  A rounded
        number is within half a step of what it was, or at the end of a fixed range.

        Raises:
            PassError: naming the output or the call where that is not so.
        """
        check_same_values(before, after)
        old = {n.name for graph in before.graphs.values() for n in graph.nodes}
        for graph, inputs in probes(before):
            views = rounded_activations(after.graphs[graph])
            fresh = {view.node: view for view in views if view.node.name not in old}
            bypass = {node: view.input for node, view in fresh.items()}
            expected, found = before.run(inputs, graph), after.run(inputs, graph, bypass=bypass)
            for name, value in expected.items():
                if not torch.equal(value.nan_to_num(7.0), found[name].nan_to_num(7.0)):
                    raise PassError(f"output {name} differs where nothing is rounded")
            _check_rounded(after, graph, fresh, inputs)


def _check_rounded(
    program: Program,
    graph: str,
    views: dict[fx.Node, RoundedActivations],
    inputs: dict[str, Tensor],
) -> None:
    values: dict[fx.Node, Any] = {}
    read = {part for v in views.values() for part in (v.input, v.scale, v.zero)}

    def observe(node: fx.Node, value: Any) -> None:
        if node in read:
            values[node] = value
        if (view := views.get(node)) is not None:
            given, moved = values[view.input], value
            if view.scale is None or view.zero is None:
                step, nearest = dynamic_step(given, view.bits), given
            else:
                step, zero = values[view.scale], values[view.zero].to(given.dtype)
                low, high = -zero * step, (largest_code(view.bits) - zero) * step
                nearest = given.clamp(low, high)
            gap = (moved - nearest).abs() / step
            if not bool((gap[given.isfinite()] <= 0.5 + 1e-9).all()):
                raise PassError(f"%{node.name}: a number moved by more than half a step")

    program.run(inputs, graph, observe, torch.float64)


def _linears(graph: fx.Graph) -> list[fx.Node]:
    """Return the linears, quantised or not, in order; none that outliers are multiplied by."""
    kinds = (torch.ops.aten.linear.default, torch.ops.modelathe.quantized_linear.default)
    return [node for node in graph.nodes if node.target in kinds and not is_beside(node)]


def _quantized(graph: fx.Graph) -> bool:
    return any(QuantizedLinear.match(node) for node in graph.nodes)


def _looked_up(program: Program) -> set[str]:
    """Return the codes that embeddings read."""
    nodes = (node for graph in program.graphs.values() for node in graph.nodes)
    views = (QuantizedEmbedding.match(node) for node in nodes)
    return {str(view.codes.target) for view in views if view is not None}


def _obstacle(linear: QuantizedLinear, looked_up: set[str]) -> str:
    """Return why the input of a quantised linear is not rounded; empty: it can be."""
    if RoundedActivations.match(linear.input):
        return "its input is rounded already"
    if linear.bits != _LINEAR_BITS:
        return f"its weight has {linear.bits} bits, and integers are multiplied 8 bits by 8"
    if linear.group_size not in (-1, linear.in_features):
        groups = f"its weight has groups of {linear.group_size}"
        return f"{groups}: only a scale per row comes out of a sum of integers (group-size=-1)"
    if str(linear.codes.target) in looked_up:
        return "its weight is an embedding's too, and would be stored a second time"
    return ""


def _remark(
    value: fx.Node, linears: list[QuantizedLinear], bits: int, codes: tuple[Tensor, Tensor] | None
) -> Remark:
    readers = f"{len(linears)} linears" if len(linears) > 1 else "1 linear"
    step = "a step per token"
    if codes is not None:
        step = f"step {float(codes[0]):.3g}, zero at {int(codes[1])}"
    return Remark("applied", f"%{value.name}", f"{bits} bits, {step}, for {readers}")
