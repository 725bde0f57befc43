"""Model folders as artifacts: what ``from_pretrained`` loads, and every command takes as MODEL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...ir import ComputedWeight, LoweringError, Program, Weight, Weights, capture
from ...passes import Canonicalize, PassContext
from ...passes.fidelity import EXACT, relative_error
from ...passes.probes import probes
from ...passes.progress import Progress
from ..base import Backend
from ..companions import write_companions
from ..session import Session
from .assign import SOLVED

ROUNDED = 16  # units in the last place, where a parameter was solved for and rounded


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Backend):
    """Write a Hugging Face model folder: what ``from_pretrained`` loads, and ``run`` as MODEL.

    The configuration, as passes left it, says which model is written: its graph is captured and
    walked beside the program's, call by call.  Each parameter gets the value of the weight in its
    place: a gain or bias that was folded away becomes ones or zeros, a transposed one is turned
    back.  Where linears got biases, the configuration's own keys (such as ``attention_bias``) are
    tried; a head with weights of its own sets ``tie_word_embeddings`` to false.

    What was written is captured again and compared with the program in float64.  Conversions
    between floating-point dtypes are the architecture's own, wherever the program makes them.

    Refuses, as an error with the first call or weight that is in the way: whatever the architecture
    does not compute, such as a norm that was removed or replaced, or one that was kept in a wider
    dtype (``convert-dtype{keep=...}``), as a softmax may be; a bias that no key adds; blocks
    that share weights, where the architecture has a copy in each; quantised weights; weights of
    several dtypes; a program without a transformers configuration.
    """

    name: ClassVar[str] = "checkpoint"

    def prepare(self, program: Program) -> Program:
        """Return the program as the architecture has it: what ``from_pretrained`` will make.

        Raises:
            LoweringError: the architecture cannot express it.
        """
        from .lower import as_architecture

        return as_architecture(program)

    def write(self, program: Program, folder: Path, context: PassContext) -> dict[str, Any]:
        from .architecture import empty_model
        from .files import file_entries, write_weights

        write_companions(program, folder)
        model = empty_model(program.config)
        names = model.state_dict(keep_vars=True)
        held = {name: program.weights[name] for name in program.weights if name in names}
        entries = file_entries(model, held)
        with context.progress.task("writing weights", total=len(entries)) as advance:
            write_weights(entries, folder, lambda name, value: advance(1))
        return {"notes": list(program.origin.notes)}

    def file_names(self, program: Program) -> list[str]:
        from .files import SINGLE

        return [SINGLE, *super().file_names(program)]

    @classmethod
    def open(
        cls, folder: Path, manifest: Mapping[str, Any], *, threads: int, progress: Progress
    ) -> Session:
        from ..program_session import ProgramSession

        return ProgramSession.open(folder, manifest, threads=threads, progress=progress)

    def check(
        self, source: Program, program: Program, folder: Path, context: PassContext
    ) -> dict[str, Any]:
        from ..checks import check_lowering
        from ..program_session import ProgramSession

        captured = capture(folder)
        # Constants of a formula that canonicalize raises have ten digits only.
        forms = [Canonicalize()(one).program for one in (source, captured)]
        error = _check_rounding(forms[0], program, forms[1])
        session = ProgramSession.of(captured, None)
        found = check_lowering(source, session, self.computes_in(program), context.progress)
        return {**found, "float64_error": error}


def _check_rounding(source: Program, written: Program, captured: Program) -> float:
    """Compare what was captured from the folder with the program, in float64.

    The program's weights are rounded as they were written, so nothing else may differ.

    Returns:
        the largest relative error.

    Raises:
        LoweringError: it is more than rounding explains.
    """
    rounded, limit = _as_written(source, written)
    worst = 0.0
    for graph, inputs in probes(source):
        expected = rounded.run(inputs, graph, dtype=torch.float64)
        found = captured.run(inputs, graph, dtype=torch.float64)
        for name, value in expected.items():
            error = relative_error(value, found[name])
            if not error <= limit:
                raise LoweringError(
                    f"{graph}: output {name} of the checkpoint is off by {error:.2g} of its "
                    f"largest value in float64; {limit:.1g} is rounding",
                    remedy="this is a defect of the lowering: report it with the model's type",
                )
            worst = max(worst, error)
    return worst


def _as_written(source: Program, written: Program) -> tuple[Program, float]:
    """Return the program with the weights that were written rounded, and what may differ then."""
    names = {id(source.weights[name]): name for name in source.weights}
    table = {name: source.weights[name] for name in source.weights}
    limit, waiting = EXACT, [written.weights[name] for name in written.weights]
    while waiting:
        weight = waiting.pop()
        if id(weight) in names:
            table[names[id(weight)]] = _rounded(weight)
        elif isinstance(weight, ComputedWeight):
            waiting += weight.inputs
            if weight.rule.startswith(SOLVED):
                limit = max(limit, ROUNDED * torch.finfo(weight.dtype).eps)
    return replace(source, weights=Weights(table, source.weights.aliases)), limit


def _rounded(weight: Weight) -> Weight:
    """Return a weight that has its stored value in every dtype."""
    return ComputedWeight(
        "as stored", (weight,), weight.shape, weight.dtype, lambda t: t, keep=False, rounded=True
    )
