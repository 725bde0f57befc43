"""What every pass keeps, also one that changes the function: a cache and padding change nothing.

Both are claims of a program about itself, so they judge a lossy pass too: a mask that is ignored, a
position that is off, or a cache entry that goes to the wrong block breaks them.  And numbers stay
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..ir import MAIN, FidelityError, Program, is_finite
from .blame import NotFinite, place_of
from .context import maximum_length
from .fidelity import EXACT, Measured, relative_error
from .probes import Inputs, empty_cache, feeds, next_cache, probe, probes

_TOKENS = 12
_PADS = 3


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two ways of reading the same tokens.

    Attributes:
        claim: what they have to give.
        defect: what is wrong when they do not.
        longer: inputs of the one with more positions.
        shorter: inputs of the other.
        end: which positions of the longer one are those of the shorter one.
    """

    claim: str
    defect: str
    longer: Inputs
    shorter: Inputs
    end: Literal["first", "last"]


def judge_consistency(before: Program, after: Program, where: str) -> None:
    """Check that a cache and padding change no output.

    What the program did not do before the pass is not asked of it (models that see padding, or
    whose positions depend on the total length).

    Raises:
        FidelityError: it did before the pass, and does not now.
    """
    for number, pair in enumerate(_pairs(after)):
        error = _error(after, pair)
        if error <= EXACT:
            continue
        earlier = list(_pairs(before))[number]
        if _error(before, earlier) > EXACT:
            continue
        node = _first_wrong(before, earlier, after, pair)
        raise FidelityError(
            f"{where}: {pair.claim}: off by {error:.2g} of the largest value"
            f"{f', first at {node}' if node else ''}",
            remedy=f"this is a defect of the pass: {pair.defect}",
        )


def judge_finite(measured: Measured, before: Program, after: Program, where: str) -> None:
    """Check that what was measured on the check data are numbers.

    Raises:
        FidelityError: they are not, and they are for the program before the pass; the message names
            the first call that gives nan or inf on small random inputs, if one does.
    """
    figures = [f for f in (measured.kl, measured.cosine) if f is not None]
    if all(map(math.isfinite, figures)) or _not_finite(before) is not None:
        return
    node = _not_finite(after)
    raise FidelityError(
        f"{where}: outputs hold nan or inf{f', first at {node}' if node else ''}",
        remedy="this is a defect of the pass, or its dtype is too narrow: leave it out",
    )


def _not_finite(program: Program) -> str | None:
    """Return the first call that makes nan or inf, if outputs hold any on unpadded inputs."""
    for graph, inputs in probes(program):
        watch = NotFinite()
        if any(bool((v == 0).any()) for name, v in inputs.items() if "mask" in name):
            continue  # attention to nothing at all
        outputs = program.run(inputs, graph, observe=watch.observe)
        if not all(map(is_finite, outputs.values())):
            return watch.place or graph
    return None


def _pairs(program: Program) -> Iterator[_Pair]:
    """Yield the pairs that are asked of this kind of program."""
    if program.kind not in ("decoder", "encoder"):
        return
    inputs = program.signature.inputs
    length = min(_TOKENS, maximum_length(program) or _TOKENS)
    tokens = probe(program, MAIN, 3, batch=2, sequence=length, past=0)["input_ids"]
    cache = empty_cache(program, 2)
    if cache and length > 1:
        yield _cached(program, tokens, cache)
    if "attention_mask" in inputs and length > _PADS:
        yield _padded(program, tokens, cache)


def _cached(program: Program, tokens: Tensor, cache: Inputs) -> _Pair:
    """Read all tokens at once, or all but one and then the last."""
    first = program.run(feeds(program, tokens[:, :-1], cache, 0), dtype=torch.float64)
    past = next_cache(first)
    return _Pair(
        "the last token read after a cache gives other outputs than all tokens read at once",
        "a cache entry, a mask or a position is wrong",
        feeds(program, tokens, cache, 0),
        feeds(program, tokens[:, -1:], past, tokens.shape[1] - 1),
        "last",
    )


def _padded(program: Program, tokens: Tensor, cache: Inputs) -> _Pair:
    """Read tokens with padding, in front for a decoder and behind for an encoder, or without."""
    decoder = program.kind == "decoder"
    kept = slice(_PADS, None) if decoder else slice(None, -_PADS)
    longer = feeds(program, tokens, cache, 0)
    mask = torch.zeros_like(longer["attention_mask"])
    mask[:, kept] = 1
    longer["attention_mask"] = mask
    if "position_ids" in longer:
        longer["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return _Pair(
        "padding changes the outputs of the tokens beside it",
        "a mask or a position is wrong",
        longer,
        feeds(program, tokens[:, kept].contiguous(), cache, 0),
        "last" if decoder else "first",
    )


def _error(program: Program, pair: _Pair) -> float:
    """Return the largest relative difference of the outputs that are made of the same tokens."""
    longer = program.run(pair.longer, dtype=torch.float64)
    shorter = program.run(pair.shorter, dtype=torch.float64)
    name = program.signature.outputs[0]
    return _gap(longer[name], shorter[name], pair.end)


def _gap(longer: Any, shorter: Any, end: str) -> float:
    """Return the relative difference of two values; the longer one is cut to the other's sizes."""
    if not (isinstance(longer, Tensor) and isinstance(shorter, Tensor)):
        return 0.0
    if longer.dim() != shorter.dim():
        return 0.0
    for axis, (more, fewer) in enumerate(zip(longer.shape, shorter.shape, strict=True)):
        if more > fewer:
            longer = longer.narrow(axis, more - fewer if end == "last" else 0, fewer)
    return relative_error(shorter, longer)


def _first_wrong(before: Program, earlier: _Pair, after: Program, pair: _Pair) -> str:
    """Return the first call whose value depends on how tokens are read, and did not before."""
    known = {node.name for node in _inconsistent(before, earlier)}
    for node in _inconsistent(after, pair):
        if node.name not in known:
            return place_of(node)
    return ""


def _inconsistent(program: Program, pair: _Pair) -> list[fx.Node]:
    longer: dict[fx.Node, Any] = {}
    wrong: list[fx.Node] = []

    def compare(node: fx.Node, value: Any) -> None:
        if node.op == "call_function" and _gap(longer[node], value, pair.end) > EXACT:
            wrong.append(node)

    program.run(pair.longer, observe=longer.__setitem__, dtype=torch.float64)
    program.run(pair.shorter, observe=compare, dtype=torch.float64)
    return wrong
