"""The coverage table: every architecture from capture to ONNX Runtime, one row each.

    python benchmarks/coverage.py [NAME ...] [--markdown]

For each tiny random model of ``architectures.py``: the captured program equals transformers bitwise
(on a longer batch, with and without a cache), a saved and loaded program too, with an equal
fingerprint; then ``fold-norms,prune-blocks{blocks=1},quantize-weights{bits=8 group-size=-1}`` and
the ONNX lowering, whose check at accuracy level 1 must agree with eager.  Where blocks cannot be
pruned the refusal is shown and the row goes on without that pass.  Exits with 1 when a row is not
good.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from architectures import Architecture
from tables import print_table

from modelathe.backends import Onnx
from modelathe.ir import (
    ModelatheError,
    PassError,
    Program,
    capture,
    fingerprint,
    load_program,
    save_program,
)
from modelathe.ir.wrappers import wrap
from modelathe.passes import Pipeline
from modelathe.passes.probes import probe

FULL = "fold-norms,prune-blocks{blocks=1},quantize-weights{bits=8 group-size=-1}"
WITHOUT_PRUNING = "fold-norms,quantize-weights{bits=8 group-size=-1}"


@dataclass
class Row:
    """What came out for one architecture."""

    name: str
    kind: str = ""
    bitwise: str = ""
    stored: str = ""
    fold_error: float | None = None
    pruning: str = ""
    lowering_error: float | None = None
    seconds: float = 0.0
    failure: str = ""
    refusals: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every check of the row held."""
        return not self.failure

    def cells(self) -> list[str]:
        """Return the row as texts."""
        fold = "" if self.fold_error is None else f"{self.fold_error:.0e}"
        error = "" if self.lowering_error is None else f"{self.lowering_error:.0e}"
        verdict = "good" if self.good else f"FAILED: {self.failure}"
        return [
            self.name,
            self.kind,
            self.bitwise,
            self.stored,
            fold,
            self.pruning,
            error,
            f"{self.seconds:.0f}",
            verdict,
        ]


HEAD = ["model", "kind", "bitwise", "stored", "fold", "pruned", "ONNX error", "s", "row"]


def inputs_of(program: Program) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield inputs of each graph at several (batch, sequence, past)."""
    for graph, signature in program.signatures.items():
        cached = any("past" in str(dim) for dims in signature.dims.values() for dim in dims)
        shapes = [(3, 4, 7), (1, 1, 4), (2, 6, 0), (1, 1, 0), (1, 7, 0), (1, 21, 0)]
        for number, (batch, sequence, past) in enumerate(shapes):
            if past and not cached:
                continue
            sizes = {"batch": batch, "sequence": sequence, "past": past, "source": 6}
            yield graph, probe(program, graph, number, **sizes)


def compare_with_transformers(program: Program, model: Any) -> str:
    """Return how many of the compared shapes are the same bits as transformers' own module."""
    wrapped = wrap(model)
    same = total = 0
    for graph, inputs in inputs_of(program):
        with torch.no_grad():
            expected = wrapped[graph].module(list(inputs.values()))
        found = program.run(inputs, graph).values()
        same += all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        total += 1
    return f"{same}/{total}"


def compare_with_stored(program: Program) -> str:
    """Return whether a saved and loaded program is the same: fingerprint and computed bits."""
    with tempfile.TemporaryDirectory() as folder:
        save_program(program, Path(folder))
        loaded = load_program(Path(folder))
        if fingerprint(loaded) != fingerprint(program):
            return "fingerprint differs"
        for graph, inputs in inputs_of(program):
            mine, other = program.run(inputs, graph), loaded.run(inputs, graph)
            if not all(torch.equal(a, other[name]) for name, a in mine.items()):
                return f"{graph} differs"
    return "same"


def lower(program: Program, row: Row) -> None:
    """Run the pipeline and the lowering with its check."""
    try:
        result = Pipeline.parse(FULL)(program)
        row.pruning = "block 1"
    except PassError as error:
        if "prune-blocks" not in " ".join(getattr(error, "__notes__", [])):
            raise
        row.pruning = f"refused: {error}"
        result = Pipeline.parse(WITHOUT_PRUNING)(program)
    fold = next(step for step in result.steps if step.pass_.name == "fold-norms")
    row.fold_error = fold.measured.error
    with tempfile.TemporaryDirectory() as folder:
        manifest = Onnx().lower(result.program).save(Path(folder) / "out")
    row.lowering_error = manifest["lowering"]["error"]


def measure(architecture: Architecture) -> Row:
    """Return the row of one architecture."""
    row = Row(architecture.name, architecture.kind)
    started = time.perf_counter()
    try:
        model = architecture.model()
        program = capture(model)
        row.bitwise = compare_with_transformers(program, model)
        row.stored = compare_with_stored(program)
        done, total = row.bitwise.split("/")
        if done != total or row.stored != "same":
            row.failure = "not the same bits"
        lower(program, row)
    except ModelatheError as error:
        row.failure = f"{type(error).__name__}: {error}"
    row.seconds = time.perf_counter() - started
    return row


def main() -> int:
    """Print the table; return 1 when a row is not good."""
    rows = print_table(__doc__, HEAD, measure)
    good = sum(row.good for row in rows)
    print(f"\n{good} of {len(rows)} rows good")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
