"""Store weights in a few bits: rounded to nearest, or so that what they compute changes least."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from ...ir import PassError, Program, Weight, call_name, mark, marks_of, path_of
from ...ir.quant import QuantType
from ..base import Fidelity, Pass, PassResult, Remark
from ..compare import check_same_values, rewritten_calls
from ..context import PassContext, reads_tokens
from ..select import check_globs, check_matches, chosen
from .methods import Method, Recipe, recipe_for, share_lost, solve_together
from .outliers import (
    KINDS,
    Kind,
    Outliers,
    Solved,
    check_outliers,
    without_outliers,
)
from .readers import Shared, find_shared, made_weights, quantized_paths, seen_paths, width_choice
from .rewrite import is_quantized, put_beside, put_stored, quantized_call, weight_of
from .sequential import Moments, in_sequence
from .store import (
    Dequantized,
    Stored,
    check_chosen,
    check_groups,
    check_rounded,
    quality,
    store,
    store_rounded,
)

Bits = Literal[2, 3, 4, 8]
METHOD = "method"
"""The mark of a call whose codes text has chosen; its text names the method."""

_BITS = 4  # where neither an option nor an earlier pass says how many
_USELESS = {
    "rtn": ("act_order", "iterations", "relax", "damping", "refit", "outliers", "outlier_kind"),
    "gptq": ("iterations", "relax"),
}


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Round the weights of linears and embeddings to a coarse grid.

    With W: [out, in] in groups of ``group_size`` neighbours along ``in``, one scale s and one zero
    point z each:  code = clamp(round(W / s) + z, 0, 2**bits - 1),  W' = s * (code - z).

    - Asymmetric: lo = min(group, 0), hi = max(group, 0), s = (hi - lo) / (2**bits - 1),
      z = round(-lo / s).  Symmetric: z = 2**(bits-1), and s carries the sign that gives the longer
      side to the larger extreme.  ``clip="weight"`` shrinks s by the factor (1, 0.99, ..., 0.21)
      that has the least squared error over the group; ``clip="activation"`` weighs each error by
      the mean square of what it is multiplied with.
    - ``method="rtn"`` takes the nearest numbers, without data.  Scales are stored in W's dtype,
      rounded up; so without clipping no number moves by more than half a step.
    - The other methods minimise ``tr((W - W') S (W - W')^T)``, S: [in, in] the second moments, on
      calibration text, of what W reads once all weights before it are quantised.  gptq visits the
      columns once, and each corrects those behind it.  quantease is cyclic coordinate descent,
      ``W'_j = round(W'_j + ((W - W') S)_j / S_jj)``; gptq-quantease begins it at the result of
      gptq.  Without further options they are the published methods: the grid above (for gptq in
      groups, that of the corrected columns), 1 % damping for gptq, relaxed sweeps for quantease.
    - ``method="auto"`` is rtn without calibration text.  With it: gptq-quantease on a grid clipped
      by activations, columns by falling power, scales refitted to the codes between the sweeps.
    - ``outliers=0.01`` keeps that share of a linear's weight as it is, beside the codes:
      ``W' = V + H``, H sparse.  Structured: the columns that are the largest, or whose rounding
      costs the most; they are ``index_select`` and a thin linear [out, count].
      Unstructured: the largest entries, one ``sparse_linear``, which programs run and ONNX Runtime
      does not.  Where H is, V is zero, the grid does not cover W, and the sweeps do not round: the
      error is minimised over V and H.
      A weight that an embedding reads has none: its rows would lack them.
    - A weight is rounded once, from the value that the program has for it.  One that is read in
      several places stays one tensor, and its moments are summed.  One that an embedding shares
      with a linear is ruled by ``head_bits``, and so is a linear outside the blocks that makes the
      logits.  Rows of an embedding meet nothing, so they are rounded to nearest by every method.

    Refuses (``missed``) weights that something else reads too, such as stacked experts or
    convolutions, those that the graph computes, those that are quantised already, and embeddings
    inside blocks (relative positions).  An input width that ``group_size`` does not divide is an
    error, and so are a glob that matches nothing and text on which a value is not finite.

    Source: GPTQ, arXiv 2210.17323; QuantEase, arXiv 2309.01885, with the min/max grid and the range
    search of its method/quant.py (the squared error in place of the power 2.4); its outlier-aware
    variant is a reconstruction that solves for H exactly, where it takes gradient steps.

    Attributes:
        bits: width of a code; none: what an earlier pass chose for the linear, else 4.
        method: auto, rtn, gptq, quantease or gptq-quantease.
        group_size: neighbours along the input axis that share a scale; -1: all of them.
        symmetric: store no zero points.
        clip: whether to search for a narrower range; auto: as the method says.
        act_order: visit columns by falling power of what they read; none: as the method says.
        iterations: sweeps of coordinate descent; none: as the method says, 30 for quantease.
        relax: leave every third sweep unrounded; none: as the method says.
        damping: share of the mean power that is added to every column's; none: as the method says.
        refit: choose the scales again when the codes are known, with quantease three times and
            with sweeps in between; none: as the method says.
        outliers: share of the entries, or columns, that are kept as they are; none: none.
        outlier_kind: structured (whole columns, runs everywhere) or unstructured (single entries,
            a smaller error); none: structured.
        head_bits: width for the head and for a weight that an embedding shares with a linear;
            ``bits``: as the others; none: not quantised.
        embedding_bits: width for embeddings of their own; none: not quantised.
        only: globs of module paths; other modules are left alone.
        ignore: globs of module paths to leave alone.
    """

    name: ClassVar[str] = "quantize-weights"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    bits: Bits | None = None
    method: Literal["auto", Method] = "auto"
    group_size: int = 32
    symmetric: bool = False
    clip: Literal["auto", "none", "weight", "activation"] = "auto"
    act_order: bool | None = None
    iterations: int | None = None
    relax: bool | None = None
    damping: float | None = None
    refit: bool | None = None
    outliers: float | None = None
    outlier_kind: Kind | None = None
    head_bits: Literal["bits", 2, 3, 4, 8] | None = "bits"
    embedding_bits: Bits | None = None
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        head = None if self.head_bits == "bits" else self.head_bits
        for bits in (self.bits, head, self.embedding_bits):
            QuantType(_BITS if bits is None else bits, self.group_size, self.symmetric)
        if self.clip not in ("auto", "none", "weight", "activation"):
            raise ValueError(f"clip is auto, none, weight or activation, got {self.clip!r}")
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"iterations is at least 1, got {self.iterations}")
        if self.damping is not None and not 0 <= self.damping < math.inf:
            raise ValueError(f"damping is at least 0, got {self.damping}")
        for option in _USELESS.get(self.method, ()):
            if getattr(self, option) is not None:
                raise ValueError(f"{option} does nothing with method={self.method}")
        if self.method == "rtn" and self.clip == "activation":
            raise ValueError("clip=activation needs text, which method=rtn does not read")
        self._check_outliers()
        check_globs("only", self.only)
        check_globs("ignore", self.ignore)

    def _check_outliers(self) -> None:
        if self.outliers is not None and not 0 < self.outliers < 1:
            raise ValueError(f"outliers is more than 0 and less than 1, got {self.outliers}")
        if self.outlier_kind not in (None, *KINDS):
            raise ValueError(f"outlier_kind is {' or '.join(KINDS)}, got {self.outlier_kind!r}")
        if self.outlier_kind is not None and self.outliers is None:
            raise ValueError("outlier_kind does nothing without outliers")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the method that were chosen and not left to it."""
        names = (
            *("act_order", "iterations", "relax", "damping", "refit"),
            *("outliers", "outlier_kind"),
        )
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given if self.clip == "auto" else {**given, "clip": self.clip}

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Replace the weights that the options choose; one remark per weight."""
        found = find_shared(program)
        self._check_globs(program, found)
        remarks: list[Remark] = []
        plan: dict[str, QuantType] = {}
        wanted: list[Shared] = []
        for shared in found:
            if not chosen(shared.paths, self.only, self.ignore):
                continue
            bits = self.width_of(shared)
            if bits is None:
                continue
            if shared.obstacle:
                remarks.append(Remark("missed", f"@{shared.name}", shared.obstacle))
                continue
            plan[shared.name] = self._type_of(program, shared, bits)
            wanted.append(shared)
        remarks += self._missed_calls(program) + self._unused(wanted)
        remarks += self._overridden(wanted)
        recipe, why = self._recipe(program, context)
        if wanted:
            remarks.append(Remark("applied", self.name, f"{recipe}: {why}"))
        nearest = [shared for shared in wanted if not shared.linear or not recipe.reads_text]
        total = sum(program.weight(shared.name).bytes for shared in nearest)
        with context.progress.task("rounding weights", total=total) as advance:
            for shared in nearest:
                size = program.weight(shared.name).bytes
                remarks.append(self._round(program, shared, plan[shared.name], recipe))
                advance(size)
        rest = [shared for shared in wanted if shared.linear and recipe.reads_text]
        if rest:
            remarks += self._calibrate(program, rest, plan, recipe, context)
        return PassResult(program, tuple(remarks))

    def _recipe(self, program: Program, context: PassContext) -> tuple[Recipe, str]:
        """Return the method with all its settings, and why it is this one.

        Raises:
            PassError: it reads text, and the program does not.
        """
        recipe, why = recipe_for(self.method, self.settings, context.has_text(program))
        if recipe.reads_text and not reads_tokens(program):
            raise PassError(
                f"{self.name}: {program.origin.model} ({program.kind}) reads no tokens, so text "
                "cannot choose its codes",
                remedy="method=rtn needs none, without clip=activation and outliers",
            )
        return recipe, why

    def _check_globs(self, program: Program, found: list[Shared]) -> None:
        paths = seen_paths(program, found)
        check_matches(paths, self.only, "only")
        check_matches(paths, self.ignore, "ignore")

    def _missed_calls(self, program: Program) -> list[Remark]:
        """Return remarks on chosen calls that have no weight to round."""
        missed: list[Remark] = []
        for name, paths, bits in quantized_paths(program):
            if chosen(paths, self.only, self.ignore):
                missed.append(Remark("missed", f"@{name}", f"quantised to {bits} bits already"))
        for node, maker in made_weights(program):
            if chosen((path_of(node),), self.only, self.ignore):
                reason = f"its weight is made by {call_name(maker)}"
                missed.append(Remark("missed", f"%{node.name}", reason))
        return missed

    def _unused(self, wanted: list[Shared]) -> list[Remark]:
        """Return remarks on widths that no weight takes."""
        missed: list[Remark] = []
        headed = [s for s in wanted if s.head or (s.embedding and s.linear)]
        if isinstance(self.head_bits, int) and not headed:
            reason = "no weight to round is a head's, or an embedding's and a linear's"
            missed.append(Remark("missed", f"head-bits={self.head_bits}", reason))
        own = [s for s in wanted if s.embedding and s not in headed]
        if self.embedding_bits is not None and not own:
            reason = "no weight to round is an embedding's alone"
            if tied := next((s for s in headed if s.embedding), None):
                reason = f"@{tied.name} is a linear's too, which head-bits rules"
            missed.append(Remark("missed", f"embedding-bits={self.embedding_bits}", reason))
        return missed

    def _overridden(self, wanted: list[Shared]) -> list[Remark]:
        """Return a remark on the weights that get other widths than were chosen for them."""
        choices = (width_choice(shared) for shared in wanted)
        others = [choice for choice in choices if choice not in (None, self.bits)]
        if self.bits is None or not others:
            return []
        count = f"{len(others)} weights" if len(others) > 1 else "1 weight"
        text = f"bits={self.bits} overrides the widths that were chosen for {count}"
        return [Remark("applied", self.name, text)]

    def width_of(self, shared: Shared) -> int | None:
        """Return the width that the options and earlier passes ask for; None: left alone."""
        usual = self.bits or width_choice(shared) or _BITS
        if shared.head or (shared.embedding and shared.linear):
            return usual if self.head_bits == "bits" else self.head_bits
        return self.embedding_bits if shared.embedding else usual

    def _type_of(self, program: Program, shared: Shared, bits: int) -> QuantType:
        """Return the number type of a weight.

        Raises:
            PassError: its rows do not fall into whole groups.
        """
        qtype = QuantType(bits, self.group_size, self.symmetric)
        check_groups(shared.name, program.weight(shared.name), qtype, shared.paths[0])
        return qtype

    def _round(self, program: Program, shared: Shared, qtype: QuantType, recipe: Recipe) -> Remark:
        """Round a weight to nearest, when it is read."""
        weight = program.weight(shared.name)
        clip = "none" if recipe.clip == "activation" else recipe.clip
        stored = store_rounded(shared.name, weight, qtype, clip)
        put_stored(program, shared, stored)
        return _remark(shared, weight, Solved(stored.load()))

    def _calibrate(
        self,
        program: Program,
        wanted: list[Shared],
        plan: dict[str, QuantType],
        recipe: Recipe,
        context: PassContext,
    ) -> list[Remark]:
        """Quantise weights one after the other, on what the text makes them read."""
        remarks: list[Remark] = []
        done: list[tuple[Shared, Stored, Outliers | None]] = []

        def quantize(together: list[Shared], moments: Moments) -> list[Weight]:
            weights = {shared.name: program.weight(shared.name) for shared in together}
            solved = _solve(together, weights, moments, plan, recipe)
            instead: list[Weight] = []
            for shared in together:
                weight, tensor = weights[shared.name], solved[shared.name]
                stored = store(weight, tensor)
                done.append((shared, stored, tensor.outliers))
                # reads what is stored, which may be in a file by then
                read = partial(_read, stored, tensor.outliers)
                instead.append(Dequantized(weight, stored.qtype, read))
                share = share_lost(weight.load(), tensor, moments)
                text = f", {100 * share:.2g} % of its results' mean square lost"
                remarks.append(_remark(shared, weight, tensor, text))
                if share >= 1:
                    gone = "nothing is left of what it computes: give more bits or smaller groups"
                    remarks.append(Remark("missed", f"@{shared.name}", gone))
                if moments.count < weight.shape[1]:
                    few = f"{moments.count} tokens say little about {weight.shape[1]} inputs"
                    remarks.append(Remark("missed", f"@{shared.name}", f"{few}: give more text"))
            return instead

        in_sequence(program, wanted, context, quantize)
        for shared, stored, outliers in done:
            calls = put_stored(program, shared, stored)
            for call in calls:
                mark(call, METHOD, recipe.method)
            if outliers is not None:
                put_beside(program, shared, outliers, calls)
            elif recipe.outliers is not None:
                remarks.append(Remark("missed", f"@{shared.name}", _no_outliers(shared, recipe)))
        return remarks

    def ensures(self, before: Program, after: Program) -> None:
        """Check that only weights changed, and that each is its rounded self, stored right.

        Raises:
            PassError: naming the call or the weight that is not.
        """
        check_same_values(before, after)
        stored_as: dict[str, Any] = {}
        for name, graph in before.graphs.items():
            plain, sums = without_outliers(after.graphs[name], before.weights)
            for old, new in rewritten_calls(graph, plain, is_quantized):
                source, call = weight_of(old), quantized_call(new)
                beside = sums.get(new)
                nodes = (call.codes, call.scales, call.zeros, beside and beside.values)
                parts = tuple(node and node.target for node in nodes)
                if source not in stored_as:
                    stored_as[source] = parts
                    stored, weight = Stored.of(after, call), before.weight(source)
                    outliers = None if beside is None else Outliers.read(after, beside)
                    if outliers is not None:
                        check_outliers(source, stored.load(), outliers)
                    if METHOD in marks_of(new):
                        check_chosen(source, weight, stored, outliers)
                    else:
                        covering = self.clip in ("auto", "none")
                        check_rounded(source, weight.load(), stored.load(), covering)
                elif stored_as[source] != parts:
                    raise PassError(f"%{new.name}: @{source} was shared, and is stored twice now")


def _solve(
    together: list[Shared],
    weights: dict[str, Weight],
    moments: Moments,
    plan: dict[str, QuantType],
    recipe: Recipe,
) -> dict[str, Solved]:
    """Return what is stored for weights that read the same; outliers only beside linears."""
    found: dict[str, Solved] = {}
    for looked_up in (False, True):
        own = {s.name: weights[s.name] for s in together if s.embedding is looked_up}
        how = replace(recipe, outliers=None) if looked_up else recipe
        found |= solve_together(own, moments, plan, how)
    return found


def _read(stored: Stored, outliers: Outliers | None) -> Solved:
    return Solved(stored.load(), outliers)


def _no_outliers(shared: Shared, recipe: Recipe) -> str:
    if shared.embedding:
        return "without outliers: an embedding reads its rows"
    return f"without outliers: {100 * (recipe.outliers or 0):g} % of it, used, is none"


def _remark(shared: Shared, weight: Weight, stored: Solved, more: str = "") -> Remark:
    noise = quality(weight.load(), stored.codes, stored.outliers)
    size = f"{weight.bytes} -> {stored.nbytes} bytes"
    if stored.outliers is not None:
        beside = f"{stored.outliers.nbytes} for {stored.outliers.count}"
        size = f"{size} with {beside}"
    text = f"{stored.codes.qtype}, {noise:.1f} dB signal to error{more}, {size}"
    return Remark("applied", f"@{shared.name}", text)
