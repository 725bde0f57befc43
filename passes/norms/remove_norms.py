"""Replace norms by constants, and fold the constants into the weights around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

from torch import fx

from ...ir import Norm, PassError, Program, call_key, mark, marks_of
from ...ir.config import end_tokens
from ..analysis.norm_deviations import Deviation, norm_deviations
from ..base import Fidelity, PassContext, PassResult, Remark
from ..blame import not_finite
from ..context import reads_tokens
from ..data import TokenWindows
from ..fidelity import Reference
from ..spec import to_spec
from ..training.switches import SWITCH, Switch, SwitchingPass
from .first_tokens import first_factors, knows_first
from .freezing import NO_MEAN, Constant, Freezer
from .gains import EQUALIZED, KEPT, fold_gains
from .norm_switch import NormSwitch, turn
from .paths import ORDER, Path, path_of_norm, rejoin, separate, split_fused
from .residual import Stream
from .tied_streams import center_stream, tied_stream

# What a marked norm carries for its switch.
_PATH, _USUAL, _FIRST = "path", "deviation", "first"
_CHECK_WINDOWS = 16
_UNLIKE = 2  # standard deviations by which first tokens differ where they get their own constant


@dataclass(frozen=True, kw_only=True)
class RemoveNorms(SwitchingPass):
    """Replace the deviation that each norm divides by with a constant, and fold what is left.

    With P = I - 1/d for a LayerNorm (P = I for an RMSNorm), gain g, bias b, and s the mean over
    the calibration text's tokens of ``sqrt(mean((P x)**2) + eps)``::

        n(x) = g * P x / sqrt(mean((P x)**2) + eps) + b   becomes   g * P x / s + b

    which is affine, so it goes into the weights of the linears that read it: no norm is left.
    First tokens of a text, which attention loads with several times the deviation, may have a
    constant of their own, where theirs is further from s than two standard deviations of the other
    tokens': one product stays for it.  This only freezes; ``heal`` trains.

    With ``schedule="progressive"`` outputs stay as they are: every norm gets a mark, one for each
    path (MLP, query and key, value, final), and a following ``heal`` freezes them one by one while
    it trains, with the deviation of the moment; then it folds.  With ``target_kl`` freezing ends
    where the KL divergence passes it: on the calibration text, norm by norm in the same order, or
    while healing, where a norm waits until the last step was below it.  What is frozen by then
    stays frozen.

    Freezing all norms at once can let values grow from block to block until they overflow, as in
    models whose MLPs multiply two values; that is an error.  There ``heal`` goes too fast, too,
    unless ``target_kl`` lets norms wait.  A norm that passes in between keep from being frozen,
    such as a LayerNorm behind weights that were quantised, stays live (``missed``).

    Refuses (``missed``) a LayerNorm that something else than a linear of its own reads, such as
    the residual stream of a post-norm block, because the mean of its input stays; an RMSNorm there
    leaves one product.  A norm that a tied head reads leaves one product and one sum, unless
    ``untie``.  Refuses, as an error, a program with norms that wait for ``heal`` already.

    Attributes:
        target_kl: nats per token at which to stop; none: freeze all.
        first_position: give first tokens a constant of their own where they are unlike others.
        end_of_text: give end-of-text tokens that constant too, where there is one, on the way to
            values.
        schedule: all: freeze now; progressive: let ``heal`` freeze, norm by norm.
        untie: give a tied head a folded copy of its own.

    Source: arXiv 2507.02559.  The paper drops the constants of special tokens while it trains;
    keeping the first token's, and stopping at a divergence, are ours.
    """

    name: ClassVar[str] = "remove-norms"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    target_kl: float | None = None
    first_position: bool = True
    end_of_text: bool = False
    schedule: Literal["all", "progressive"] = "all"
    untie: bool = False

    def __post_init__(self) -> None:
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(f"target_kl is above 0, got {self.target_kl}")
        if self.end_of_text and not self.first_position:
            raise ValueError("end_of_text uses the first position's constant: first_position=true")

    def requires(self, program: Program) -> None:
        if not reads_tokens(program):
            raise PassError(
                f"remove-norms: {program.origin.model} ({program.kind}) reads no text, so its "
                "norms cannot be measured",
                remedy="fold what can be folded, with fold-norms",
            )
        for key, norm in norms_by_key(program).items():
            if text := marks_of(norm.node).get(SWITCH):
                raise PassError(
                    f"remove-norms: {key} waits for heal, which {text} has left it to",
                    remedy="put heal between the two, or leave one out",
                )
        if self.target_kl is not None and program.kind not in ("decoder", "encoder-decoder"):
            raise PassError(
                f"remove-norms: {program.origin.model} ({program.kind}) makes no logits, so "
                "there is no divergence for target-kl",
                remedy="leave target-kl out",
            )
        if self.end_of_text and not end_tokens(program.config):
            raise PassError(
                f"remove-norms: the configuration of {program.origin.model} names no end-of-text "
                "token",
                remedy="leave end-of-text out",
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        whole = program
        if self.schedule == "progressive" or self.end_of_text:
            program = program.editable()
            _separate_paths(program)
        missed = refusals(program, self.untie)
        sites = {name: path for name, path in _sites(program).items() if name not in missed}
        remarks = [Remark("missed", name, why) for name, why in missed.items()]
        if not sites:
            return PassResult(whole, tuple(remarks))
        if self.end_of_text and "value" not in sites.values():
            why = "no norm that can be frozen is read by values alone, so they get no constant"
            remarks.append(Remark("missed", "end-of-text tokens", why))
        measured = self._measured(program, context, remarks)
        if self.schedule == "progressive":
            for key, norm in norms_by_key(program).items():
                if key in sites:
                    mark(norm.node, SWITCH, to_spec(self))
                    mark(norm.node, _PATH, sites[key])
                    mark(norm.node, _USUAL, repr(measured[key].usual))
                    mark(norm.node, _FIRST, repr(measured[key].first))
            text = f"{len(sites)} norms marked: heal freezes them, nothing is removed before"
            remarks.append(Remark("applied", "norms", text))
            return PassResult(program, tuple(remarks))
        plan = {name: self._constant(measured[name], path) for name, path in sites.items()}
        result = self._within_target(program, plan, context)
        if result.modified:
            _check_finite(result.program, context)
            whole = result.program
        return PassResult(whole, (*remarks, *result.remarks))

    def _measured(
        self, program: Program, context: PassContext, remarks: list[Remark]
    ) -> dict[str, Deviation]:
        """Return what norms divide by; with ``first`` only where it is to be used."""
        measured = norm_deviations(program, context).norms
        if not self.first_position:
            return {key: replace(found, first=None) for key, found in measured.items()}
        for name, graph in program.graphs.items():
            if knows_first(graph):
                continue
            why = "it has a cache and reads no positions: first tokens get no constant of their own"
            remarks.append(Remark("missed", name, why))
            for node in graph.nodes:
                if (key := call_key(name, node)) in measured:
                    measured[key] = replace(measured[key], first=None)
        special = {key for key, found in measured.items() if _is_special(found)}
        if not special:
            why = f"they are within {_UNLIKE} standard deviations of the others at every norm"
            remarks.append(Remark("missed", "first tokens", why))
        return {
            key: found if key in special else replace(found, first=None)
            for key, found in measured.items()
        }

    def _constant(self, found: Deviation, path: Path) -> Constant:
        ends = self.end_of_text and path == "value" and found.first is not None
        return Constant(found.usual, found.first, ends)

    def _within_target(
        self, program: Program, plan: Mapping[str, Constant], context: PassContext
    ) -> PassResult:
        """Freeze as many norms, in their order, as the target allows."""
        if self.target_kl is None:
            return frozen(program, plan, self.untie)
        names = list(plan)
        windows = _some_windows(program, context)
        reference = Reference(program, replace(context.fresh(), check_text=windows))
        low, high = 0, len(names)
        while low < high:  # the divergence grows with what is frozen, near enough
            middle = (low + high + 1) // 2
            tried = frozen(program.editable(), _first(plan, middle), self.untie)
            kl = reference.measure(tried.program).kl
            assert kl is not None
            low, high = (middle, high) if kl <= self.target_kl else (low, middle - 1)
        result = frozen(program, _first(plan, low), self.untie)
        why = f"freezing it passes target-kl {self.target_kl:g}"
        kept = tuple(Remark("missed", name, why) for name in names[low:])
        return PassResult(result.program, (*result.remarks, *kept))

    def make_switches(
        self, program: Program, calls: Sequence[fx.Node], context: PassContext
    ) -> Mapping[fx.Node, Switch]:
        refused = self._refused(program)
        keys = {norm.node: key for key, norm in norms_by_key(program).items()}
        if stay := [keys[node] for node in calls if keys[node] in refused]:
            more = f" and {len(stay) - 1} more" if len(stay) > 1 else ""
            context.progress.note(f"{stay[0]}{more} cannot be frozen now: {refused[stay[0]]}")
        return {node: self._switch(program, node) for node in calls if keys[node] not in refused}

    def _refused(self, program: Program) -> dict[str, str]:
        """Return why marked norms cannot be frozen as the program is now, by key of their call."""
        trial = program.editable()
        self._unmark(trial)
        return refusals(trial, self.untie)

    def _unmark(self, program: Program) -> list[str]:
        """Take this pass's marks away; return the keys of the norms that had them."""
        text, found = to_spec(self), []
        for key, norm in norms_by_key(program).items():
            if marks_of(norm.node).get(SWITCH) == text:
                found.append(key)
                for name in (SWITCH, _PATH, _USUAL, _FIRST):
                    mark(norm.node, name, None)
        return found

    def _switch(self, program: Program, node: fx.Node) -> Switch:
        norm, marks = Norm.match(node), marks_of(node)
        assert norm is not None
        first = None if marks[_FIRST] == "None" else float(marks[_FIRST])
        path = cast(Path, marks[_PATH])
        return NormSwitch(
            norm,
            path,
            Deviation(float(marks[_USUAL]), first),
            self.end_of_text and path == "value",
            end_tokens(program.config),
        )

    def turn(self, switches: Mapping[fx.Node, Switch], step: int, steps: int, loss: float) -> None:
        found = {node: s for node, s in switches.items() if isinstance(s, NormSwitch)}
        turn(found, step, steps, self.target_kl, loss)

    def settle(self, program: Program, switches: Mapping[str, Switch]) -> PassResult:
        plan = {}
        kept = []
        for name, switch in switches.items():
            assert isinstance(switch, NormSwitch)
            if switch.frozen:
                plan[name] = switch.constant
            else:
                why = "still live when healing ended: " + (
                    "the run was too short"
                    if self.target_kl is None
                    else f"freezing it passes target-kl {self.target_kl:g}"
                )
                kept.append(Remark("missed", name, why))
        left = [key for key in self._unmark(program) if key not in switches]
        why_left = refusals(program, self.untie) if left else {}
        kept += [Remark("missed", key, f"stays live: {why_left[key]}") for key in left]
        result = frozen(program, plan, self.untie)
        return PassResult(result.program, (*result.remarks, *kept))


def _is_special(found: Deviation) -> bool:
    """Tell whether first tokens are unlike the others, as far as these are alike."""
    return found.first is not None and abs(found.first - found.usual) > _UNLIKE * found.spread


def _some_windows(program: Program, context: PassContext) -> TokenWindows:
    windows = context.calibration_tokens(program)
    return TokenWindows.of(windows.tokens[:_CHECK_WINDOWS], windows.source)


def _check_finite(program: Program, context: PassContext) -> None:
    """Check that with frozen norms the calibration text gives numbers.

    Raises:
        PassError: it does not.
    """
    tokens = _some_windows(program, context).tokens
    if place := not_finite(program, tokens, context.device):
        raise PassError(
            f"remove-norms: with all norms frozen at once values overflow, first at {place}",
            remedy="let heal freeze one by one what it can, with "
            "remove-norms{schedule=progressive target-kl=0.3},heal",
        )


def _first(plan: Mapping[str, Constant], count: int) -> dict[str, Constant]:
    return dict(list(plan.items())[:count])


def _separate_paths(program: Program) -> None:
    for graph in program.graphs.values():
        split_fused(program, graph)
        for node in list(graph.nodes):
            if (norm := Norm.match(node)) is not None:
                separate(graph, norm)


def _sites(program: Program) -> dict[str, Path]:
    """Return the path of each norm, by key, in the order they are frozen."""
    found = {
        key: path_of_norm(norm.node.graph, norm)
        for key, norm in norms_by_key(program).items()
        if norm.node.users
    }
    return dict(sorted(found.items(), key=lambda site: ORDER.index(site[1])))


def refusals(program: Program, untie: bool) -> dict[str, str]:
    """Return why norms cannot be frozen, by key of their call."""
    trial = program.editable()
    _fold_gains(trial, untie)
    freezer = Freezer(trial)
    return {
        key: why
        for key, norm in norms_by_key(trial).items()
        if (why := freezer.can(norm)) and not (_keeps_mean(why) and _stream(trial, norm))
    }


def _fold_gains(program: Program, untie: bool) -> list[Remark]:
    """Fold the gains of norms, but of those that another pass has trained something in place of."""
    waiting = {
        norm.node for norm in norms_by_key(program).values() if SWITCH in marks_of(norm.node)
    }
    return fold_gains(program, untie=untie, leave=waiting)


def _keeps_mean(why: str) -> bool:
    return NO_MEAN in why


def _stream(program: Program, norm: Norm) -> Stream | None:
    """Return the stream that a norm reads where its mean can be taken out."""
    stream = tied_stream(program, norm)
    return None if stream.reason else stream


def norms_by_key(program: Program) -> dict[str, Norm]:
    """Return every norm by the key of its call."""
    return {
        call_key(name, node): norm
        for name, graph in program.graphs.items()
        for node in graph.nodes
        if (norm := Norm.match(node)) is not None
    }


def frozen(program: Program, plan: Mapping[str, Constant], untie: bool) -> PassResult:
    """Return a program with the norms of ``plan`` replaced by their constants.

    Args:
        program: an editable copy.
        plan: what each norm divides by, by key of its call.
        untie: fold into a copy of a weight that is read elsewhere.
    """
    if not plan:
        for graph in program.graphs.values():
            rejoin(program, graph)
        return PassResult(program)
    remarks = [remark for remark in _fold_gains(program, untie) if "untied" in remark.message]
    freezer = Freezer(program)
    sites = {key: norm for key, norm in norms_by_key(program).items() if key in plan}
    centred = set()
    for key, norm in list(sites.items()):
        if not (why := freezer.can(norm)):
            continue
        stream = _stream(program, norm) if _keeps_mean(why) else None
        if stream is None:
            remarks.append(Remark("missed", key, f"stays live: {why}"))
            del sites[key]
            continue
        center_stream(program, stream)
        centred.add(key)
    factors = first_factors(program, {key: plan[key] for key in sites})
    for key, norm in sites.items():
        constant = plan[key]
        now = Norm.match(norm.node)  # its input may be a centred value now
        assert now is not None
        left = freezer.freeze(now, constant, key in centred, factors.get(key))
        text = f"divides by {constant.usual:.4g}"
        if constant.first is not None:
            text += f", first tokens by {constant.first:.4g}"
        remarks.append(Remark("applied", key, text))
        if left:
            why = f": {KEPT}" if EQUALIZED in marks_of(norm.node) else ""
            remarks.append(Remark("missed", key, f"leaves {left}{why}"))
    for graph in program.graphs.values():
        rejoin(program, graph)
    program.clean()
    return PassResult(program, tuple(remarks))
