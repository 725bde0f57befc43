"""Which block gets how many bits: what an order of the blocks is worth, and what a search is.

    python benchmarks/bit_allocation.py [MODEL ...] [--tokens 4096] [--rounding OPTIONS]
                                        [--means 3,4,5] [--no-orders] [--out FOLDER]

MODEL is ``demo`` or a decoder's folder.  Scores are taken on the demo's calibration text; rise of
the cross-entropy in nats and mean KL per token are measured on its held-out text.  Weights are
rounded to nearest in groups of 32 unless ``--rounding`` has other options of ``quantize-weights``;
embedding and head stay as they are.

The first tables: a growing share of the blocks goes from 8 to 4, and from 4 to 2 bits, in the order
of LIM, of ZD, of both reversed, and at random (mean, least and most of 5 seeds); ``--out`` draws
them as ``bit_allocation_<model>.svg``.  The last tables: tables of widths at one mean width:
uniform, LIM's order for every two widths around the mean, and ``search-bits`` by blocks and by
linears, which may have no more bytes than the uniform width, or LIM's best table, has.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantization import stored_bytes

from modelathe.demo import CALIBRATION_TEXT, HELDOUT_TEXT
from modelathe.ir import Program, capture, find_blocks, marks_of, path_of
from modelathe.passes import PassContext, Pipeline
from modelathe.passes.fidelity import Reference
from modelathe.passes.quantization.readers import WIDTH

ORDERS = ("lim", "zd", "reverse", "reverse-zd")
SEEDS = range(5)
WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Point:
    """What a table of widths costs: nats, nats, bytes of the linears, mean width."""

    rise: float
    kl: float
    size: int
    bits: float


class Study:
    """One model, with what was measured of it."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        self.context = PassContext(
            calibration=CALIBRATION_TEXT,
            calibration_samples=16,
            check_text=HELDOUT_TEXT,
            check_tokens=options.tokens,
        )
        self.rounding = options.rounding
        self.program = self.run("canonicalize,fold-norms", capture(model)).program
        self.blocks = len(find_blocks(self.program.graph))
        self.reference = Reference(self.program, self.context.fresh())
        self.known: dict[tuple[tuple[str, str], ...], Point] = {}

    def run(self, text: str, program: Program, seed: int = 0) -> Any:
        """Run a pipeline without its checks."""
        context = replace(self.context, seed=seed)
        return Pipeline.parse(text, context=context, check=False)(program)

    def point(self, text: str, seed: int = 0) -> Point:
        """Measure the widths that a pass chooses; the same widths once."""
        result = self.run(text, self.program, seed)
        key = tuple((path_of(n), marks_of(n).get(WIDTH, "")) for n in result.program.graph.nodes)
        if key not in self.known:
            rounding = f"quantize-weights{{head-bits=none {self.rounding}}}"
            rounded = self.run(rounding, result.program).program
            found = self.reference.measure(rounded)
            rise = math.log(found.perplexity / found.reference_perplexity)
            bits = result.steps[-1].details["bits"]
            self.known[key] = Point(rise, found.kl, stored_bytes(rounded), bits)
        return self.known[key]


def orders(study: Study, low: int, high: int) -> dict[str, list[list[Point]]]:
    """Return points by order, by count of blocks, by seed; and print them."""
    steps = sorted({round(study.blocks * part / 6) for part in range(7)})
    found: dict[str, list[list[Point]]] = {}
    for order in (*ORDERS, "random"):
        seeds = SEEDS if order == "random" else (0,)
        spec = f"assign-bits{{score={order} low={low} high={high} fraction="
        found[order] = [
            [study.point(f"{spec}{count / study.blocks!r}}}", seed) for seed in seeds]
            for count in steps
        ]
    print(f"\n### {high} to {low} bits: KL, and rise of the cross-entropy, in nats\n")
    print("| order |", " | ".join(f"{count} of {study.blocks}" for count in steps), "|")
    print("|---" * (len(steps) + 1) + "|")
    for order, points in found.items():
        print(f"| {order} |", " | ".join(map(cell, points)), "|", flush=True)
    return found


def cell(points: Sequence[Point]) -> str:
    """Return KL and rise, with the range of KL over seeds."""
    kls = [point.kl for point in points]
    text = f"{statistics.mean(kls):.4f}"
    if len(points) > 1 and max(kls) > min(kls):
        text += f" ({min(kls):.4f} to {max(kls):.4f})"
    return f"{text}, {statistics.mean(point.rise for point in points):+.4f}"


def allocations(study: Study, mean: float) -> None:
    """Print tables of widths with a mean of ``mean`` bits."""
    print(f"\n### {mean:g} bits on average\n")
    print("| widths | mean bits | MB | KL | rise, nats | seconds |")
    print("|---|---|---|---|---|---|")
    texts: dict[str, str] = {}
    if mean in WIDTHS:
        about = "low=2 high={0:g} fraction=0" if mean > 2 else "low=2 high=8 fraction=1"
        texts["uniform"] = f"assign-bits{{score=zd {about.format(mean)}}}"
    for low, high in itertools.combinations(WIDTHS, 2):
        if low < mean < high:
            about = f"low={low} high={high} target-bits={mean:g}"
            texts[f"lim, {low} and {high}"] = f"assign-bits{{score=lim {about}}}"
    found = [row(study, title, text) for title, text in texts.items()]
    best = found[0] if "uniform" in texts else min(found, key=lambda point: point.kl)
    for unit in ("block", "linear"):
        row(study, f"search-bits by {unit}", f"search-bits{{target-bytes={best.size} unit={unit}}}")


def row(study: Study, title: str, text: str) -> Point:
    """Print and return what the widths that a pass chooses cost."""
    started = time.perf_counter()
    point = study.point(text)
    seconds = time.perf_counter() - started
    figures = f"{point.bits:.3f} | {point.size / 1e6:.3f} | {point.kl:.5f} | {point.rise:+.4f}"
    print(f"| {title} | {figures} | {seconds:.0f} |", flush=True)
    return point


def draw(found: Mapping[str, Mapping[str, list[list[Point]]]], path: Path) -> None:
    """Draw KL against the share of blocks with fewer bits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for place, (title, by_order) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), place + 1)
        for order, points in by_order.items():
            shares = [100 * index / (len(points) - 1) for index in range(len(points))]
            kls = [[point.kl for point in one] for one in points]
            (line,) = axes.plot(shares, list(map(statistics.mean, kls)), marker=".", label=order)
            if order == "random":
                low, high = list(map(min, kls)), list(map(max, kls))
                axes.fill_between(shares, low, high, alpha=0.2, color=line.get_color())
        axes.set_title(title)
        axes.set_xlabel("blocks with fewer bits, %")
        axes.set_ylabel("KL per token, nats")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=["demo"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounding", default="method=rtn group-size=32")
    parser.add_argument("--means", default="3,4,5")
    parser.add_argument("--no-orders", action="store_true")
    parser.add_argument("--out")
    options = parser.parse_args()
    for model in options.models:
        study = Study(model, options)
        print(f"\n## {model}: {options.rounding}, measured on {options.tokens} tokens")
        if not options.no_orders:
            pairs = ((4, 8), (2, 4))
            found = {f"{high} to {low} bits": orders(study, low, high) for low, high in pairs}
            if options.out:
                name = Path(model).name if Path(model).is_dir() else model
                draw(found, Path(options.out) / f"bit_allocation_{name}.svg")
        for mean in map(float, options.means.split(",")):
            allocations(study, mean)


if __name__ == "__main__":
    main()
