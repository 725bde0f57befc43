"""Replace LayerNorm and RMSNorm by norms that do not look at the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from ...ir import Norm, PassError, Program, is_weight, path_of
from ..analysis.channel_moments import norm_moments
from ..base import Fidelity, Pass, PassContext, PassResult, Remark
from ..compare import check_same_values
from ..select import check_globs, check_matches, chosen
from .rep_batch_norm import RepBatchNorm, RepParameters, insert_rep_batch_norm


@dataclass(frozen=True, kw_only=True)
class ReplaceNorms(Pass):
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

    Refuses (``missed``) norms over several dimensions, those of values with one dimension, and
    those of a weight.  Refuses, as an error, a model that reads no tokens.

    Source: SLAB (arXiv 2405.11582), section 3.2, for RepBN.  The paper trains it from scratch; the
    initialisation by least squares is ours.

    Attributes:
        kind: what takes the place of the norms.
        tokens: how many tokens of the calibration text to measure on, at most; whole windows.
        only: globs over module paths of norms, such as h.*; none: all of them.
        ignore: globs over module paths of norms that are left alone.
    """

    name: ClassVar[str] = "replace-norms"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    kind: Literal["rep-batch-norm"] = "rep-batch-norm"
    tokens: int = 8192
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind != "rep-batch-norm":
            raise ValueError(f"kind is rep-batch-norm, got {self.kind!r}")
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
        windows = context.calibration_tokens(program).tokens
        windows = windows[: max(1, self.tokens // windows.shape[1])]
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

    def _is_meant(self, norm: Norm) -> bool:
        return chosen([path_of(norm.node)], self.only, self.ignore)


def _norms(program: Program) -> list[Norm]:
    nodes = [node for graph in program.graphs.values() for node in graph.nodes]
    return [norm for norm in map(Norm.match, nodes) if norm is not None]


def _rep_count(program: Program) -> int:
    nodes: list[fx.Node] = [node for graph in program.graphs.values() for node in graph.nodes]
    return sum(RepBatchNorm.match(node) is not None for node in nodes)


def _refused(norm: Norm) -> str:
    if len(norm.sizes) != 1:
        return f"normalises over {len(norm.sizes)} dimensions, and a RepBN has one of channels"
    if is_weight(norm.input):
        return "normalises a weight, which is the same for every token"
    if norm.input.meta["val"].dim() < 2:
        return "its input has one dimension, and a RepBN needs one more than the channels"
    return ""
