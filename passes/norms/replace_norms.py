"""Replace LayerNorm and RMSNorm by norms that do not look at the token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx

from ...ir import Norm, PassError, Program, call_key, is_weight, mark, marks_of, path_of
from ..analysis.channel_moments import norm_moments
from ..base import Fidelity, PassContext, PassResult, Remark
from ..compare import check_same_values
from ..select import check_globs, check_matches, chosen
from ..spec import to_spec
from ..training.switches import SWITCH, Switch, SwitchingPass
from .rep_batch_norm import RepBatchNorm, RepParameters, insert_rep_batch_norm
from .rep_switch import RepSwitch, rep_switches, share_at


@dataclass(frozen=True, kw_only=True)
class ReplaceNorms(SwitchingPass):
    """Replace each LayerNorm and RMSNorm by a RepBN with statistics of the calibration text.

    With ``x: [..., channels]``, one number ``alpha`` and the rest ``[channels]``::

        RepBN(x) = (x - mean) / sqrt(variance + eps) * gain + bias + alpha x

    ``mean`` and ``variance`` are those of what it reads on the calibration text, and ``gain``,
    ``bias`` and ``alpha`` make the map of each channel the line with the least squared error to
    what the norm gave there in the untouched program.  Norms are replaced one after the other, from
    the first to the last, so that each makes up for what the ones before it got wrong.  A RepBN
    does not look at the token: fold-rep-batch-norms can fold it away, and post-norm models work
    too.

    The function changes: without training afterwards (see ``heal``) this ruins most models.  A norm
    that is called several times gets a RepBN with statistics of its own for each call.  For each
    norm the program and the untouched one run once over ``tokens`` tokens, as far as the norm.

    With ``schedule="progressive"`` norms are only marked and outputs stay as they are.  A following
    ``heal`` fits all of them to the program that it begins with, in one run over ``tokens`` tokens,
    and in step t of T trains::

        share norm(x) + (1 - share) RepBN(x),    share = max(0, 1 - t / (0.4 T))

    The norm's own gain and bias are trained as everywhere; so are those of the RepBN and alpha,
    whatever ``heal`` was told to train.  While share is above 0, training normalises with the
    statistics of the batch, through which gradients flow: what a norm reads moves with every norm
    that gives way before it.  Judgements take the running statistics.  From share 0 on training
    does too, and they stay as they are, so that the program that is trained is the one that is
    judged and kept.  A norm whose share is above 0 when healing ends stays (``missed``).

    Refuses (``missed``) norms over several dimensions, those of values with one dimension, those of
    a weight, and those that a pass has marked for ``heal``.  Refuses, as an error, a model that
    reads no tokens.

    Source: SLAB (arXiv 2405.11582).  The paper trains from scratch, from alpha 1, with a share that
    falls over the whole run, and judges RepBN alone.  Ours are the fit by least squares, the last
    three fifths at share 0 with fixed statistics, and the scale on which alpha is trained.

    Attributes:
        kind: what takes the place of the norms.
        schedule: all: replace them now; progressive: let ``heal`` do it, a little in every step.
        tokens: how many tokens of the calibration text to measure on, at most; whole windows.
        only: globs over module paths of norms, such as h.*; none: all of them.
        ignore: globs over module paths of norms that are left alone.
    """

    name: ClassVar[str] = "replace-norms"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    kind: Literal["rep-batch-norm"] = "rep-batch-norm"
    schedule: Literal["all", "progressive"] = "all"
    tokens: int = 8192
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind != "rep-batch-norm":
            raise ValueError(f"kind is rep-batch-norm, got {self.kind!r}")
        if self.schedule not in ("all", "progressive"):
            raise ValueError(f"schedule is all or progressive, got {self.schedule!r}")
        if self.tokens < 1:
            raise ValueError(f"tokens is at least 1, got {self.tokens}")
        check_globs("only", self.only)
        check_globs("ignore", self.ignore)

    def requires(self, program: Program) -> None:
        """Check that text can calibrate the program, and that the globs match norms of it.

        Raises:
            PassError: it cannot, or one does not.
        """
        paths = [path_of(norm.node) for norm in _norms(program)]
        for option in ("only", "ignore"):
            check_matches(paths, getattr(self, option), option)
        names = [name for signature in program.signatures.values() for name in signature.inputs]
        if not any(name.endswith("input_ids") for name in names):
            raise PassError(
                f"{self.name}: {program.origin.model} reads no tokens, so its norms cannot be "
                "measured on text",
                remedy="leave the pass out",
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        wanted: list[tuple[str, fx.Node]] = []
        remarks: list[Remark] = []
        names = {graph: name for name, graph in program.graphs.items()}
        for norm in filter(self._is_meant, _norms(program)):
            if reason := _refused(norm):
                remarks.append(Remark("missed", norm.node.name, reason))
            else:
                wanted.append((names[norm.node.graph], norm.node))
        if not wanted:
            return PassResult(program, tuple(remarks))
        if self.schedule == "progressive":
            for _, node in wanted:
                mark(node, SWITCH, to_spec(self))
            text = f"{len(wanted)} norms marked: heal replaces them, nothing changes before"
            return PassResult(program, (*remarks, Remark("applied", "norms", text)))
        windows = self._windows(program, context)
        untouched = program.editable()
        with context.progress.task("replacing norms", total=len(wanted)) as advance:
            for graph, node in wanted:
                moments = norm_moments(program, untouched, graph, node, windows, context.device)
                made = insert_rep_batch_norm(program, node, RepParameters.fitted(moments))
                node.replace_all_uses_with(made)
                text = f"RepBN of {len(moments.mean)} channels from {moments.count} vectors"
                remarks.append(Remark("applied", node.name, text))
                advance(1)
        return PassResult(program, tuple(remarks))

    def make_switches(
        self, program: Program, calls: Sequence[fx.Node], context: PassContext
    ) -> Mapping[fx.Node, Switch]:
        return rep_switches(program, calls, self._windows(program, context), context)

    def turn(self, switches: Mapping[fx.Node, Switch], step: int, steps: int, loss: float) -> None:
        for switch in switches.values():
            assert isinstance(switch, RepSwitch)
            switch.share.fill_(share_at(step, steps))

    def settle(self, program: Program, switches: Mapping[str, Switch]) -> PassResult:
        places = {
            call_key(name, node): node
            for name, graph in program.graphs.items()
            for node in graph.nodes
        }
        remarks = []
        for key, switch in switches.items():
            assert isinstance(switch, RepSwitch)
            mark(places[key], SWITCH, None)
            remarks.append(_settled(program, places[key], key, switch))
        program.clean()
        return PassResult(program, tuple(remarks))

    def ensures(self, before: Program, after: Program) -> None:
        """Check that there is one RepBN more for each norm less, and that no weight was edited.

        Raises:
            PassError: there is not, or one was.
        """
        gone = len(_norms(before)) - len(_norms(after))
        made = _rep_count(after) - _rep_count(before)
        if gone != made:
            raise PassError(f"{self.name}: {gone} norms went and {made} RepBN came")
        check_same_values(before, after)

    def _windows(self, program: Program, context: PassContext) -> Tensor:
        windows = context.calibration_tokens(program).tokens
        return windows[: max(1, self.tokens // windows.shape[1])]

    def _is_meant(self, norm: Norm) -> bool:
        return chosen([path_of(norm.node)], self.only, self.ignore)


def _settled(program: Program, node: fx.Node, key: str, switch: RepSwitch) -> Remark:
    """Give a norm's readers what its switch became."""
    live = "still live when healing ended"
    if switch.share > 0:
        return Remark("missed", key, f"{live}: the run was too short")
    try:
        made = insert_rep_batch_norm(program, node, switch.rep)
    except PassError as error:  # the rest of what was trained is worth keeping
        return Remark("missed", key, f"{live}: {error}")
    node.replace_all_uses_with(made)
    return Remark("applied", key, f"RepBN of {len(switch.mean)} channels, trained")


def _norms(program: Program) -> list[Norm]:
    nodes = [node for graph in program.graphs.values() for node in graph.nodes]
    return [norm for norm in map(Norm.match, nodes) if norm is not None]


def _rep_count(program: Program) -> int:
    nodes: list[fx.Node] = [node for graph in program.graphs.values() for node in graph.nodes]
    return sum(RepBatchNorm.match(node) is not None for node in nodes)


def _refused(norm: Norm) -> str:
    if len(norm.sizes) != 1:
        return f"normalises over {len(norm.sizes)} dimensions, and a RepBN has one of channels"
    if SWITCH in marks_of(norm.node):
        return f"already marked for heal, by {marks_of(norm.node)[SWITCH]}"
    if is_weight(norm.input):
        return "normalises a weight, which is the same for every token"
    if norm.input.meta["val"].dim() < 2:
        return "its input has one dimension, and a RepBN needs one more than the channels"
    return ""
