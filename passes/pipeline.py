"""Passes in a row, each one checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ..ir import Program, parameter_count, stored_bytes, verify
from .base import Fidelity, Pass, Remark
from .canonicalize import Canonicalize
from .consistency import judge_consistency, judge_finite
from .context import PassContext
from .fidelity import (
    WARN_KL,
    Budget,
    Measured,
    Reference,
    judge_bitwise,
    judge_rounding,
)
from .spec import parse, to_spec


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass did.

    Attributes:
        pass_: the pass.
        before: its input.
        after: its result.
        remarks: what it says it did and refused to do.
        seconds: wall time of the pass, its checks left out.
        measured: how far outputs moved.
        warnings: what the user should look at.
        details: the pass's own figures, as it gave them.
    """

    pass_: Pass
    before: Program
    after: Program
    remarks: tuple[Remark, ...]
    seconds: float
    measured: Measured
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return the step as a manifest has it."""
        return {
            "pass": to_spec(self.pass_),
            "fidelity": self.pass_.fidelity.value,
            "seconds": round(self.seconds, 3),
            "measured": self.measured.known(),
            "remarks": [str(remark) for remark in self.remarks],
            "warnings": list(self.warnings),
            **({"details": dict(self.details)} if self.details else {}),
        }


Observer = Callable[[Step], None]


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """What a pipeline made, and how.

    Attributes:
        program: the result.
        steps: one for each pass, ``canonicalize`` first.
        measured: of the result against the captured program; empty when nothing was lossy or
            checks are off.
        data: source and hash of the texts that were used, by purpose.
    """

    program: Program
    steps: tuple[Step, ...]
    measured: Measured
    data: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order they run; ``canonicalize`` runs first, whether it is named or not.

    Attributes:
        passes: in order.
        context: calibration text, seed, progress.
        budget: limits against the captured program.
        check: judge and measure every pass; without it only the structure is verified.
    """

    passes: tuple[Pass, ...] | list[Pass] = ()
    context: PassContext = field(default_factory=PassContext)
    budget: Budget = field(default_factory=Budget)
    check: bool = True

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        context: PassContext | None = None,
        budget: Budget | None = None,
        check: bool = True,
        registry: Mapping[str, type[Pass]] | None = None,
    ) -> Self:
        """Build a pipeline from its text form; see ``spec`` for the grammar.

        Raises:
            SpecSyntaxError: the text names no pass of ours, or an option that a pass does not take.
        """
        from . import all_passes

        found = all_passes() if registry is None else registry
        passes = parse(text, found, base=Pass)
        return cls(passes, context or PassContext(), budget or Budget(), check)

    def __str__(self) -> str:
        return ",".join(map(to_spec, self.passes))

    def __call__(self, program: Program, observers: tuple[Observer, ...] = ()) -> PipelineResult:
        """Run every pass; verify, judge and measure after each.

        Args:
            program: the captured program, or the result of earlier passes.
            observers: called with each finished step.

        Raises:
            PassError: a pass refuses the program.
            FidelityError: a pass moved outputs further than it promises, or than the budget allows.
        """
        verify(program)
        context = self.context.fresh()
        # Capturing the source again takes its time, so only where something is compared with it.
        again = self.check and bool(program.origin.passes)
        captured = context.reference(program) if again else program
        if self.check:
            context.read_texts(captured)
        reference = Reference(captured, context)
        if not captured.origin.passes:
            context.remember(captured)
        passes = list(self.passes)
        if not passes or not isinstance(passes[0], Canonicalize):
            passes.insert(0, Canonicalize())
        steps: list[Step] = []
        for number, pass_ in enumerate(passes):
            try:
                healed = any(later.heals for later in passes[number + 1 :])
                step = self._step(pass_, program, context, reference, healed)
            except Exception as error:
                error.add_note(f"in pass {number} of {len(passes) - 1}: {to_spec(pass_)}")
                raise
            steps.append(step)
            for observe in observers:
                observe(step)
            program = step.after
        measured = self._final(steps, program, reference)
        program = self._recorded(program, captured, reference)
        return PipelineResult(program, tuple(steps), measured, context.used())

    def _recorded(self, program: Program, captured: Program, reference: Reference) -> Program:
        """Return the program with how it was made, for the manifest of whatever it becomes."""
        before = program.origin.record
        sizes = {"bytes": stored_bytes(captured), "parameters": parameter_count(captured)}
        record = {
            "seed": self.context.seed,
            "data": {**before.get("data", {}), **reference.context.used()},
            "steps": before["steps"],
            "captured": before.get("captured", sizes),
        }
        origin = replace(program.origin, record=record, checks=reference if self.check else None)
        return replace(program, origin=origin)

    def _step(
        self,
        pass_: Pass,
        program: Program,
        context: PassContext,
        reference: Reference,
        healed: bool,
    ) -> Step:
        started = time.perf_counter()
        result = pass_(program, context)
        seconds = time.perf_counter() - started
        after = result.program
        measured = Measured()
        warnings: list[str] = []
        if result.modified and self.check:
            measured = _judge(pass_, program, after, reference)
            if pass_.fidelity is Fidelity.LOSSY and not healed:
                self.budget.judge(measured, pass_.name)
            if measured.kl is not None and measured.kl > WARN_KL and not healed:
                warnings.append(
                    f"{pass_.name}: KL {measured.kl:.2f} nats per token to the captured model, "
                    f"more than {WARN_KL}: the result may be of little use"
                )
        text = to_spec(pass_)
        implicit = isinstance(pass_, Canonicalize) and not result.modified
        after = after if implicit else after.after(text)
        told = tuple(warnings)
        step = Step(pass_, program, after, result.remarks, seconds, measured, told, result.details)
        # At once, for later passes ask what earlier ones did, which graphs do not always tell.
        record = after.origin.record
        record = {**record, "steps": [*record.get("steps", ()), step.summary()]}
        return replace(step, after=replace(after, origin=replace(after.origin, record=record)))

    def _final(self, steps: list[Step], program: Program, reference: Reference) -> Measured:
        """Measure the result against the captured program; the last lossy step may have done it."""
        limited = self.budget != Budget()
        lossy = [s for s in steps if s.pass_.fidelity is Fidelity.LOSSY and s.measured.known()]
        if not self.check or not (lossy or limited):
            return Measured()
        measured = lossy[-1].measured if lossy and lossy[-1] is steps[-1] else None
        measured = measured or reference.measure(program)
        self.budget.judge(measured, "the whole pipeline")
        return measured


def _judge(pass_: Pass, before: Program, after: Program, reference: Reference) -> Measured:
    """Check the pass's promise and its consistency, and measure what is lossy."""
    match pass_.fidelity:
        case Fidelity.BITWISE:
            measured = judge_bitwise(before, after, pass_.name)
        case Fidelity.ROUNDING:
            measured = judge_rounding(before, after, pass_.name, pass_.kept)
        case Fidelity.LOSSY:
            measured = reference.measure(after)
            judge_finite(measured, before, after, pass_.name)
    judge_consistency(before, after, pass_.name)
    return measured
