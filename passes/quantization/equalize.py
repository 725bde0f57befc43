"""Channels scaled so that what reads them loses less when it is rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ...ir import Linear, Norm, PassError, Program, QuantizedLinear, path_of
from ...ir.quant import QuantType
from ...ir.stages import Stages
from ..base import Fidelity, Pass, PassResult, Remark
from ..cache.entries import PAST, PRESENT
from ..compare import Same, check_same_values, rewritten_calls
from ..context import PassContext, reads_tokens
from ..outputs import batches, graph_inputs, runner
from ..select import check_globs, check_matches, chosen
from .scale_edits import put_scales
from .scale_search import Found, Kind, Observed, Reading, Search
from .scaled_channels import Pair, ScaledChannels
from .store import check_groups

_BITS = {"awq": 4, "smooth": 8}
_GROUPS = {"awq": 32, "smooth": -1}
_REFINE = {"awq": 100, "smooth": 0}


@dataclass(frozen=True, kw_only=True)
class Equalize(Pass):
    """Scale channels where they are made, and back where linears read them.

    With s: [in] > 0, what a linear W: [out, in] reads divided by s, and its columns times s::

        W x  =  (W diag(s)) (x / s)

    The division goes into what makes x, so that no call is added: the gain and bias of a norm (it
    gets a gain if it has none), the rows and bias of a linear behind which are only moves of
    entries, relu, a product with a gate, or attention, whose values are averaged channel by
    channel.  Query heads that share a value head share its scales, and so do all depths that read
    one weight.  A norm and its readers, values and output projection, up and down are such pairs.

    ``kind="awq"``: s = (mean |x|)^alpha, over sqrt(max s * min s), against rounded weights: alpha
    from 0 to 1 at which ``tr((Q(W s) / s - W) M (...)^T)``, M: [in, in] the second moments of x, is
    least, summed over the readers.  From there on ``refine`` steps of gradient descent move every
    scale alone, an error of rounding being a fixed share of its group's range; this is ours, after
    the learned scales of OmniQuant (arXiv 2308.13137).

    ``kind="smooth"``: s = max |x|^alpha / max |W|^(1 - alpha), against activations in 8 bits, one
    step for each token: alpha at which the rounded product is nearest to W x, on up to 1024 tokens.

    Q rounds to nearest on the min/max grid of ``quantize-weights``.  Scales are searched for on
    calibration text, before any is put in; without text on text of the model's own.  Products are
    made in float64 and rounded once.  Cached values are divided by s, too: caches of the program
    before do not fit the one after it, so they are no part of what is kept.

    Refuses (``missed``) what something else than linears reads too, such as a norm in front of the
    residual sum; what another call than those above lies behind (gelu); weights that an embedding
    shares; linears that are quantised already, since scaling would change the grid; values that an
    encoder-decoder caches; pairs that no scale helps.  A group size that does not divide is an
    error, and so is a glob that matches nothing.  A norm that was scaled, and what takes its place,
    keeps its gain: ``fold-norms`` and the other folds leave it alone, because they would undo this.

    Attributes:
        kind: against rounded weights, or against rounded weights and activations.
        bits: width of the weights that scales are searched for; none: 4 for awq, 8 for smooth.
        group_size: neighbours along the input axis that share a step; -1: all of them; none: 32 for
            awq, -1 for smooth.
        symmetric: search for weights without zero points.
        grid: strengths 0, 1/grid, ... 1 are tried.
        refine: steps of descent behind the best strength, for awq; none: 100; 0: as published.
        only: globs of module paths of linears; others are left alone.
        ignore: globs of module paths of linears to leave alone.

    Source: AWQ (arXiv 2306.00978), SmoothQuant (arXiv 2211.10438).
    """

    name: ClassVar[str] = "equalize"
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    kind: Kind = "awq"
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = False
    grid: int = 20
    refine: int | None = None
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _BITS:
            raise ValueError(f"kind is awq or smooth, got {self.kind!r}")
        if self.grid < 1:
            raise ValueError(f"grid is at least 1, got {self.grid}")
        if self.refine is not None and self.refine < 0:
            raise ValueError(f"refine is at least 0, got {self.refine}")
        if self.kind == "smooth" and self.refine is not None:
            raise ValueError("refine does nothing with kind=smooth")
        _ = self.search
        check_globs("only", self.only)
        check_globs("ignore", self.ignore)

    @property
    def search(self) -> Search:
        """What is tried."""
        bits = _BITS[self.kind] if self.bits is None else self.bits
        group = _GROUPS[self.kind] if self.group_size is None else self.group_size
        refine = _REFINE[self.kind] if self.refine is None else self.refine
        return Search(self.kind, QuantType(bits, group, self.symmetric), self.grid, refine)

    def requires(self, program: Program) -> None:
        """Check that text can be read.

        Raises:
            PassError: it cannot.
        """
        if not reads_tokens(program):
            raise PassError(
                f"equalize: {program.origin.model} ({program.kind}) reads no tokens, so text "
                "cannot choose its scales",
                remedy="leave the pass out",
            )

    def kept(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return all outputs but cached values; nothing for a run that reads other cached ones."""
        if any(v.numel() for name, v in inputs.items() if name.startswith(f"{PAST}.")):
            return {}
        return {name: value for name, value in outputs.items() if not _is_cached_value(name)}

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Scale the pairs that the options choose; one remark for each."""
        channels = ScaledChannels.of(program)
        nodes = [one.node for one in channels.linears] + [one.node for one in _quantized(program)]
        paths = list(map(path_of, nodes))
        check_matches(paths, self.only, "only")
        check_matches(paths, self.ignore, "ignore")
        known = channels.pairs()
        pairs = [pair for pair in known if self._means(*(one.node for one in pair.readers))]
        self._check_groups(program, pairs)
        remarks = self._refused(program, channels, known)
        found = _search(program, channels, pairs, self.search, context) if pairs else []
        scales = torch.ones(channels.count, dtype=torch.float64)
        for pair, best in zip(pairs, found, strict=True):
            scales[pair.labels] = best.scales
            remarks.append(_remark(pair, best))
        put_scales(program, channels, torch.where(channels.free, scales[channels.labels], 1.0))
        return PassResult(program, tuple(remarks))

    def ensures(self, before: Program, after: Program) -> None:
        """Check that nothing but weights of norms and linears changed.

        Raises:
            PassError: naming the call that does.
        """
        check_same_values(before, after)
        for name, graph in before.graphs.items():
            rewritten_calls(graph, after.graphs[name], _is_scaled)

    def _means(self, *nodes: fx.Node) -> bool:
        return chosen(map(path_of, nodes), self.only, self.ignore)

    def _check_groups(self, program: Program, pairs: Sequence[Pair]) -> None:
        """Check that rows fall into whole groups.

        Raises:
            PassError: naming a weight whose rows do not.
        """
        qtype = self.search.qtype
        for linear in (linear for pair in pairs for linear in pair.readers):
            weight = program.weight(linear.weight)
            check_groups(str(linear.weight.target), weight, qtype, path_of(linear.node))

    def _refused(
        self, program: Program, channels: ScaledChannels, pairs: Sequence[Pair]
    ) -> list[Remark]:
        """Return a remark for each value that no linear reads scaled, and each quantised linear."""
        reasons: dict[tuple[str, str], list[str]] = {}
        paired = {linear.node for pair in pairs for linear in pair.readers}
        for linear in channels.linears:
            if linear.node not in paired and self._means(linear.node):
                key = (linear.input.name, channels.obstacle(linear))
                reasons.setdefault(key, []).append(f"%{linear.node.name}")
        remarks = [
            Remark("missed", value, f"for {', '.join(readers)}: {why}")
            for (value, why), readers in reasons.items()
        ]
        why = "quantised already: equalise before quantising"
        calls = [call for call in _quantized(program) if self._means(call.node)]
        return remarks + [Remark("missed", call.node.name, why) for call in calls]


def _search(
    program: Program,
    channels: ScaledChannels,
    pairs: Sequence[Pair],
    search: Search,
    context: PassContext,
) -> list[Found]:
    """Search for the scales of each pair; what its linears read is held until all of it is seen."""
    waiting: dict[fx.Node, list[int]] = {}
    for number, pair in enumerate(pairs):
        for stop in dict.fromkeys(linear.input for linear in pair.readers):
            waiting.setdefault(stop, []).append(number)
    left = Counter(number for numbers in waiting.values() for number in numbers)
    seen: dict[fx.Node, Observed] = {}
    found: dict[int, Found] = {}
    run = runner(program, context.device)
    parts = batches(context.calibration_tokens(program).tokens)
    with context.progress.task("equalizing", total=len(waiting)) as advance:
        for name, graph in program.graphs.items():
            stops = [node for node in graph.nodes if node in waiting]
            inputs = [graph_inputs(program, name, batch, run) for batch in parts if stops]
            stages = Stages(program, inputs, name, device=context.device)
            for stop in stops:
                values = stages.advance(stop)
                seen[stop] = Observed.of(search.kind, values, len(parts), stop.name)
                left.subtract(waiting[stop])
                for number in [n for n in waiting[stop] if not left[n]]:
                    readings = _readings(program, channels, pairs[number], seen)
                    found[number] = search.best(readings, len(pairs[number].labels))
                seen = {s: o for s, o in seen.items() if any(left[n] for n in waiting[s])}
                advance(1)
    return [found[number] for number in range(len(pairs))]


def _readings(
    program: Program, channels: ScaledChannels, pair: Pair, seen: Mapping[fx.Node, Observed]
) -> list[Reading]:
    found = []
    for linear in pair.readers:
        data = seen[linear.input]
        numbers = channels.read(linear)
        places = torch.searchsorted(pair.labels, channels.labels[numbers])
        places = torch.where(channels.free[numbers], places, -1).to(data.size.device)
        weight = program.weight(linear.weight).load(torch.float32).to(data.size.device)
        found.append(Reading(weight, places, data))
    return found


def _remark(pair: Pair, found: Found) -> Remark:
    makers, readers = (
        ", ".join(f"%{one.node.name}" for one in some) for some in (pair.makers, pair.readers)
    )
    where = pair.makers[0].node.name
    if found.strength is None and found.share == 1:
        return Remark("missed", where, f"no scale lowers the error of {readers}")
    text = (
        f"{len(pair.labels)} scales of {float(found.scales.min()):.2g} to "
        f"{float(found.scales.max()):.2g} between {makers} and {readers}: "
        f"strength {found.strength:.2g}, {100 * found.share:.0f} % of the error left"
    )
    return Remark("applied", where, text)


def _quantized(program: Program) -> list[QuantizedLinear]:
    nodes = [node for graph in program.graphs.values() for node in graph.nodes]
    return [call for call in map(QuantizedLinear.match, nodes) if call is not None]


def _is_scaled(old: fx.Node, new: fx.Node, same: Same) -> bool:
    """Tell whether ``new`` is ``old`` with other weights."""
    if (linear := Linear.match(old)) and (scaled := Linear.match(new)):
        return same(linear.input, scaled.input)
    if (norm := Norm.match(old)) and (other := Norm.match(new)):
        alike = (norm.kind, norm.sizes, norm.eps) == (other.kind, other.sizes, other.eps)
        return alike and same(norm.input, other.input)
    return False


def _is_cached_value(output: str) -> bool:
    return output.startswith(f"{PRESENT}.") and output.endswith(".value")
