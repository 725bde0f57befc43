"""How close a program is to another: exact claims on probes, lossy ones on text.

Exact claims are judged in float64, whatever the program's dtype: computed weights then round
nowhere, so a right rewrite moves outputs by about 1e-13 and a wrong one by much more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from ..ir import MAIN, SCRATCH, DataError, FidelityError, Program, TensorWeight, Weight
from .context import PassContext
from .metrics import CosineTally, TokenTally
from .outputs import batches, predictions, rows_of, runner, token_batch
from .probes import Inputs, probe, probes

EXACT = 1e-9  # largest relative error in float64 of a rewrite that is equal in exact arithmetic
_ROUNDED = 16  # units in the last place, where a pass stored weights that it rounded itself
WARN_KL = 0.5  # nats per token


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured after a pass; None where it does not apply.

    Attributes:
        error: largest difference of an output from the pass's own input, relative to the largest
            value of that output.
        tokens: how many tokens the next figures are means of.
        kl: KL(captured || now) in nats per token.
        top1_agreement: share of tokens, 0 to 1, where both rank the same token first.
        perplexity: exp(mean nats) now.
        reference_perplexity: exp(mean nats) of the captured program.
        cosine: mean cosine similarity to the captured program's embedding or output.
        cosine_min: the smallest one.
    """

    error: float | None = None
    tokens: int | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    cosine: float | None = None
    cosine_min: float | None = None

    def known(self) -> dict[str, Any]:
        """Return the figures that there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits against the captured program; None judges nothing.

    Attributes:
        max_kl: nats per token.
        max_perplexity_increase: share of the captured program's perplexity; 0.1 is 10 %.
        min_agreement: share of tokens with the same first choice; for models without logits, the
            mean cosine similarity.
    """

    max_kl: float | None = None
    max_perplexity_increase: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_kl", "max_perplexity_increase"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is at least 0, got {value}")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise ValueError(f"min_agreement is a share from 0 to 1, got {self.min_agreement}")

    def judge(self, measured: Measured, where: str) -> None:
        """Raise ``FidelityError`` when a limit is broken.

        Raises:
            DataError: a limit is set on what this kind of model has no figure for.
        """
        if self.max_kl is not None:
            kl = _figure(measured.kl, "max-kl")
            _limit(kl <= self.max_kl, where, f"KL {kl:.4g} nats, at most {self.max_kl:g} allowed")
        if self.max_perplexity_increase is not None:
            now = _figure(measured.perplexity, "max-perplexity-increase")
            rise = now / _figure(measured.reference_perplexity, "max-perplexity-increase") - 1
            limit = self.max_perplexity_increase
            text = f"perplexity rose by {rise:.2%}, at most {limit:.2%} allowed"
            _limit(rise <= limit, where, text)
        if self.min_agreement is not None:
            agreement = measured.top1_agreement
            share = _figure(measured.cosine if agreement is None else agreement, "min-agreement")
            text = f"agreement {share:.4f}, at least {self.min_agreement:g} asked for"
            _limit(share >= self.min_agreement, where, text)


def _figure(value: float | None, name: str) -> float:
    if value is None:
        raise DataError(
            f"{name}: this kind of model has no such figure",
            remedy="use --min-agreement, which is judged on the cosine similarity there",
        )
    return value


def _limit(holds: bool, where: str, text: str) -> None:
    if not holds:
        raise FidelityError(
            f"{where}: {text}",
            remedy="raise the limit, give the pass milder options, or leave it out",
        )


def judge_bitwise(before: Program, after: Program, where: str) -> Measured:
    """Return error 0, or raise.

    Raises:
        FidelityError: an output has another bit; the message names it and the first node.
    """
    for graph, inputs in probes(before):
        expected, found = before.run(inputs, graph), after.run(inputs, graph)
        for name, value in expected.items():
            if name not in found or not same_bits(value, found[name]):
                _raise(before, after, graph, inputs, name, where, "not the same bits", None, 0.0)
    return Measured(error=0.0)


Kept = Callable[[Inputs, dict[str, Tensor]], Mapping[str, Tensor]]


def judge_rounding(
    before: Program, after: Program, where: str, kept: Kept | None = None
) -> Measured:
    """Return the largest relative error in float64, or raise.

    Args:
        before: the pass's input.
        after: its result.
        where: who is judged.
        kept: what is compared of the inputs and outputs of a run (``Pass.kept``); None compares all
            outputs.

    Raises:
        FidelityError: it is more than rounding explains.
    """
    limit = tolerance(before, after)
    worst = 0.0
    for graph, inputs in probes(before):
        expected = before.run(inputs, graph, dtype=torch.float64)
        found = after.run(inputs, graph, dtype=torch.float64)
        if kept is not None:
            expected, found = dict(kept(inputs, expected)), dict(kept(inputs, found))
        for name, value in expected.items():
            error = relative_error(value, found[name]) if name in found else float("inf")
            if not error <= limit:
                text = f"off by {error:.2g} of its largest value, {limit:.1g} is rounding"
                _raise(before, after, graph, inputs, name, where, text, torch.float64, limit)
            worst = max(worst, error)
    return Measured(error=worst)


def tolerance(before: Program, after: Program) -> float:
    """Return the largest relative error that rounding explains, in float64.

    A pass that adds tensors it rounded itself, instead of computed weights, is allowed a few units
    in the last place of their dtype.
    """
    known = {before.weights[name].fingerprint for name in before.weights}
    stored = [
        weight.dtype
        for name in after.weights
        if isinstance(weight := after.weights[name], TensorWeight)
        and weight.dtype.is_floating_point
        and weight.fingerprint not in known
    ]
    return max([EXACT, *(_ROUNDED * torch.finfo(dtype).eps for dtype in stored)])


def same_bits(expected: Tensor, found: Tensor) -> bool:
    """Tell whether two tensors have one shape and dtype and equal values; nan equals nan."""
    alike = expected.shape == found.shape and expected.dtype == found.dtype
    return (
        alike
        and torch.equal(expected.nan_to_num(7.0), found.nan_to_num(7.0))
        and torch.equal(expected.isnan(), found.isnan())
    )


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Return max |expected - found| / max |expected|; infinite where shapes or nans differ."""
    if expected.shape != found.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, found) else float("inf")
    if expected.numel() == 0:
        return 0.0
    wide, other = expected.double(), found.double()
    same = (wide == other) | (wide.isnan() & other.isnan())
    gap = torch.where(same, 0.0, (wide - other).abs())
    largest = float(torch.where(wide.isfinite(), wide.abs(), 0.0).max())
    error = float(gap.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
    return error / largest if largest else error


def _raise(
    before: Program,
    after: Program,
    graph: str,
    inputs: Inputs,
    output: str,
    where: str,
    text: str,
    dtype: torch.dtype | None,
    limit: float,
) -> None:
    from .blame import first_wrong_node

    node = first_wrong_node(before, after, graph, inputs, dtype, limit, output)
    place = f", first wrong at {node}" if node else "; every call is right: outputs are mixed up"
    raise FidelityError(
        f"{where}: output {output} is {text}{place}",
        remedy="this is a defect of the pass: leave it out, and report it",
    )


class Reference:
    """The captured program's outputs on the check data, computed once."""

    def __init__(self, captured: Program, context: PassContext) -> None:
        self.captured, self.context = captured, context
        self._kept: dict[int, Weight] = {}

    def measure(self, program: Program) -> Measured:
        """Return how far ``program`` is from the captured one."""
        return self.measure_with(lambda batch: forward(program, batch, self.context.device))

    def measure_with(self, run: Callable[[Inputs], Tensor]) -> Measured:
        """Return how far from the captured program is what ``run`` makes of the check data.

        Args:
            run: gives what ``forward`` gives, computed some other way.
        """
        if self.captured.kind in ("decoder", "encoder-decoder"):
            return self._tokens(run)
        return self._cosine(run)

    def _outputs(self, run: Callable[[Inputs], Tensor]) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
        batches = list(_batches(self.captured, self.context))
        with self.context.progress.task("measuring fidelity", total=len(batches)) as advance:
            for number, batch in enumerate(batches):
                yield batch, self._reference(number, batch), run(batch)
                advance(1)

    def _reference(self, number: int, batch: Inputs) -> Tensor:
        if number not in self._kept:
            value = forward(self.captured, batch, self.context.device)
            # a name of its own: what else is kept is named after the weights that it is made of
            self._kept[number] = SCRATCH.keep(f"reference:{uuid4()}", value.contiguous())
        return self._kept[number].load()

    def _tokens(self, run: Callable[[Inputs], Tensor]) -> Measured:
        tally = TokenTally()
        for batch, reference, logits in self._outputs(run):
            targets = batch.get("decoder_input_ids", batch.get("input_ids"))
            assert targets is not None
            tally.add(_predicting(logits), targets[:, 1:].flatten(), _predicting(reference))
        found = tally.metrics()
        return Measured(
            tokens=found.tokens,
            kl=found.kl,
            top1_agreement=found.top1_agreement,
            perplexity=found.perplexity,
            reference_perplexity=found.reference_perplexity,
        )

    def _cosine(self, run: Callable[[Inputs], Tensor]) -> Measured:
        tally = CosineTally()
        for _, reference, rows in self._outputs(run):
            tally.add(rows, reference)
        found = tally.metrics()
        return Measured(cosine=found.cosine, cosine_min=found.cosine_min)


def _predicting(logits: Tensor) -> Tensor:
    return logits[:, :-1].flatten(0, 1)


def _batches(program: Program, context: PassContext) -> Iterator[Inputs]:
    """Yield inputs of the check data, a few windows at a time."""
    windows = context.check_tokens_of(program)
    if windows is None:
        for seed in range(4):
            yield probe(program, MAIN, seed, batch=2, sequence=16, past=0)
        return
    for rows in batches(windows.tokens):
        yield token_batch(program, rows)


def forward(program: Program, batch: Inputs, device: str = "cpu") -> Tensor:
    """Return what is compared: logits ``[b, s, vocab]``, or one row ``[b, width]`` per item."""
    first = predictions(program, batch, runner(program, device))
    if program.kind in ("decoder", "encoder-decoder"):
        return first
    return rows_of(program.kind, first)
