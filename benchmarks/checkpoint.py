"""The checkpoint table: every architecture through passes and back into a model folder.

    python benchmarks/checkpoint.py [NAME ...] [--markdown]

For each tiny random model of ``architectures.py``, written by ``save_pretrained`` and captured from
there: ``fold-norms,prune-blocks{blocks=1}`` (without the pruning where it is refused), then
``--to checkpoint``.  ``from_pretrained`` must load the folder with no key missing and none left
over, a capture of the folder must give its bits, and in float64 the program's outputs.  The names
in the files must be those that transformers itself writes for that model.  A refusal is shown with
its reason.  Exits with 1 when a row is neither good nor refused.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from architectures import Architecture
from coverage import compare_with_transformers
from tables import print_table

from modelathe.backends import Checkpoint
from modelathe.ir import LoweringError, ModelatheError, PassError, Program, capture
from modelathe.ir.checkpoint import stored_tensors
from modelathe.passes import PassContext, Pipeline


@dataclass
class Row:
    """What came out for one architecture."""

    name: str
    pruning: str = ""
    error: float | None = None
    bitwise: str = ""
    seconds: float = 0.0
    verdict: str = ""

    def cells(self) -> list[str]:
        """Return the row as texts."""
        error = "" if self.error is None else f"{self.error:.0e}"
        return [
            self.name,
            self.pruning,
            error,
            self.bitwise,
            f"{self.seconds:.0f}",
            self.verdict,
        ]


HEAD = ["model", "pruned", "float64 error", "bitwise", "s", "row"]


def transform(program: Program, row: Row) -> Program:
    """Run the pipeline, without its pruning where that is refused."""
    try:
        found = Pipeline.parse("fold-norms,prune-blocks{blocks=1}", check=False)(program)
        row.pruning = "block 1"
    except PassError:
        found = Pipeline.parse("fold-norms", check=False)(program)
        row.pruning = "refused"
    return found.program


def round_trip(model: Any, program: Program, row: Row, work: Path) -> str:
    """Write the program, load it with transformers, and return what is wrong."""
    program = transform(program, row)
    backend, out = Checkpoint(), work / "out"
    artifact = backend.lower(program, check=False)
    artifact.save(out)
    figures = backend.check(program, artifact.program, out, PassContext())
    row.error = figures["float64_error"]
    loaded, told = type(model).from_pretrained(out, output_loading_info=True)
    if wrong := {key: value for key, value in told.items() if value}:
        return f"from_pretrained: {wrong}"
    if getattr(loaded, "_can_set_experts_implementation", lambda: False)():
        loaded.set_experts_implementation("batched_mm")  # as capture does: the other is no graph
    row.bitwise = compare_with_transformers(capture(out), loaded.eval())
    done, total = row.bitwise.split("/")
    if done != total:
        return "not the same bits"
    loaded.save_pretrained(work / "again")
    names = set(stored_tensors(out)) ^ set(stored_tensors(work / "again"))
    return f"names of its own: {', '.join(sorted(names)[:3])}" if names else ""


def measure(architecture: Architecture) -> Row:
    """Return the row of one architecture."""
    row = Row(architecture.name)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = architecture.model()
            model.save_pretrained(f"{folder}/model")
            program = capture(f"{folder}/model")
            wrong = round_trip(model, program, row, Path(folder))
            row.verdict = f"FAILED: {wrong}" if wrong else "good"
        except LoweringError as error:
            row.verdict = f"refused: {error}"
        except ModelatheError as error:
            row.verdict = f"FAILED: {type(error).__name__}: {error}"
    row.seconds = time.perf_counter() - started
    return row


def main() -> int:
    """Print the table; return 1 when a row is neither good nor refused."""
    rows = print_table(__doc__, HEAD, measure)
    good = sum(row.verdict == "good" for row in rows)
    refused = sum(row.verdict.startswith("refused") for row in rows)
    print(f"\n{good} of {len(rows)} rows good, {refused} refused")
    return 0 if good + refused == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
