"""What a cache in few bits costs: uniform widths, the front that the search finds, smooth keys.

    python benchmarks/cache.py [MODEL] [--text FILE --calibration FILE] [--published] [--out FOLDER]

MODEL is ``demo`` or a decoder's folder.  Widths are searched on the calibration text and measured
on other text: mean KL per token to the model as it is.  Bits are codes only; bytes per token count
scales and zero points as a float32 model stores them, and, in brackets, as a 16-bit one does.

The ratio at 3.25 bits is the KL there over what lies on the straight line between K4V2 (3 bits)
and K4V4 (4 bits).  ``--published`` adds KVTuner's own search: 6 groups and 100 tables of NSGA-II
(needs ``pip install optuna``).  ``--out`` draws the fronts as ``cache.svg``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from modelathe.demo import CALIBRATION_TEXT, HELDOUT_TEXT
from modelathe.ir import Program, capture
from modelathe.passes import Canonicalize, PassContext, QuantizeCache, SmoothKeys
from modelathe.passes.cache.entries import cache_bytes, graph_with_cache
from modelathe.passes.cache.search import Found, Point, search
from modelathe.passes.cache.simulation import Simulation
from modelathe.passes.cache.widths import Pair, write_table

TARGET = 3.25
Costs = dict[tuple[str, ...], float]  # KL on other text, by table


def main() -> None:
    """Print the tables."""
    options = arguments()
    context = PassContext(
        calibration=options.calibration,
        check_text=options.text,
        calibration_samples=options.tokens // 512,
        check_tokens=options.tokens,
    )
    program = Canonicalize()(capture(options.model)).program
    smooth = SmoothKeys()(program, context).program
    fronts: dict[str, list[tuple[float, float]]] = {}
    line = None
    for title, made in {"as it is": program, "smooth-keys": smooth}.items():
        found, costs = measured(made, context, options.tokens)
        print(f"\n## {title}\n")
        print_table("uniform", made, found.uniform, costs, context)
        print_table("front of the search", made, found.front, costs, context)
        line = line or [costs[key(uniform(found, pair))] for pair in ((4, 2), (4, 4))]
        print_ratio(found, costs, line, "of the model as it is" if made is smooth else "")
        fronts[title] = points(found.front, costs)
        fronts[f"{title}, uniform"] = points(found.uniform, costs)
    if options.published:
        published(program, context, options.tokens, fronts)
    if options.out:
        draw(fronts, Path(options.out))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", default=HELDOUT_TEXT)
    parser.add_argument("--calibration", default=CALIBRATION_TEXT)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--out")
    return parser.parse_args()


def measured(program: Program, context: PassContext, tokens: int) -> tuple[Found, Costs]:
    """Search widths on calibration text, and measure uniform ones and the front on the other."""
    graph = graph_with_cache(program)
    assert graph is not None
    begun = time.perf_counter()
    found = search(program, context, graph, tokens=tokens // 2)
    seconds = time.perf_counter() - begun
    print(f"{found.measured} tables measured on {found.errors.tokens} tokens in {seconds:.0f} s")
    return found, held_out(program, context, graph, (*found.uniform, *found.front))


def held_out(
    program: Program, context: PassContext, graph: str, wanted: tuple[Point, ...]
) -> Costs:
    """Return the KL of tables on the text that nothing was chosen on."""
    windows = context.check_tokens_of(program)
    assert windows is not None
    tokens: Tensor = windows.tokens
    simulation = Simulation(program, context, graph, tokens)
    return {key(point): simulation.kl(point.table) for point in wanted}


def print_table(
    title: str,
    program: Program,
    wanted: tuple[Point, ...],
    costs: Costs,
    context: PassContext,
) -> None:
    """Print one line for each point."""
    print(f"| {title}, keys/values by block | bits | bytes per token | KL, calibration | KL |")
    print("|---|---|---|---|---|")
    for point in sorted(wanted, key=lambda one: (one.bits, one.kl)):
        table = ",".join(key(point))
        wide, narrow = stored(program, point.table, context)
        print(
            f"| {table} | {point.bits:.3g} | {wide} ({narrow}) | {point.kl:.5f} | "
            f"{costs[key(point)]:.5f} |"
        )
    print()


def stored(program: Program, table: Mapping[int, Pair], context: PassContext) -> tuple[int, int]:
    """Return the bytes of a token in the cache, with scales of 4 and of 2 bytes."""
    pass_ = QuantizeCache(key_bits=None, value_bits=None, blocks=write_table(table))
    after = pass_.run(program.editable(), context).program
    names = [n for n in after.signatures[graph_with_cache(after) or ""].inputs if "_scale" in n]
    heads = sum(int(after.signatures[graph_with_cache(after) or ""].dims[n][1]) for n in names)
    itemsize = 4 if program.config.get("dtype") in (None, "float32") else 2
    total = cache_bytes(after)
    return total + (4 - itemsize) * heads, total + (2 - itemsize) * heads


def print_ratio(found: Found, costs: Costs, line: list[float], whose: str) -> None:
    """Print how 3.25 bits compare with what lies between 3 and 4, and the front with uniform pairs.

    Args:
        found: by the search.
        costs: on other text.
        line: KL of K4V2 and K4V4.
        whose: of which model, where it is not the one that was searched for.
    """
    chosen = found.within(TARGET)
    between = line[0] + (line[1] - line[0]) * (TARGET - 3)
    kl = costs[key(chosen)]
    print(f"at {chosen.bits:.3g} bits: KL {kl:.4f}, {kl / between:.2f} of the line {whose}")
    beaten = [
        (",".join(key(point)), ",".join(key(other)))
        for point in found.front
        for other in found.uniform
        if other.bits <= point.bits and costs[key(other)] < costs[key(point)]
    ]
    print(f"points of the front that a uniform pair beats on other text: {beaten or 'none'}")


def published(
    program: Program,
    context: PassContext,
    tokens: int,
    fronts: dict[str, list[tuple[float, float]]],
) -> None:
    """Print the front of KVTuner's own search."""
    graph = graph_with_cache(program)
    assert graph is not None
    found = search(
        program, context, graph, tokens=tokens // 2, groups=6, method="nsga2", trials=100
    )
    costs = held_out(program, context, graph, (*found.uniform, *found.front))
    print("\n## 6 groups, NSGA-II\n")
    print(f"groups: {found.groups}")
    print_table("front", program, found.front, costs, context)
    line = [costs[key(uniform(found, pair))] for pair in ((4, 2), (4, 4))]
    print_ratio(found, costs, line, "")
    fronts["6 groups, NSGA-II"] = points(found.front, costs)


def uniform(found: Found, pair: Pair) -> Point:
    """Return the point where every block has ``pair``."""
    return next(one for one in found.uniform if set(one.table.values()) == {pair})


def key(point: Point) -> tuple[str, ...]:
    """Return the table of a point as text."""
    return write_table(point.table)


def points(wanted: tuple[Point, ...], costs: Costs) -> list[tuple[float, float]]:
    """Return bits and KL on other text."""
    return [(point.bits, costs[key(point)]) for point in wanted]


def draw(fronts: Mapping[str, list[tuple[float, float]]], folder: Path) -> None:
    """Draw KL against bits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for title, found in fronts.items():
        style = {"marker": "x", "linestyle": ""} if title.endswith("uniform") else {"marker": "."}
        axes.plot(*zip(*sorted(found), strict=True), label=title, **style)
    axes.set_yscale("log")
    axes.set_xlabel("bits per number of the cache")
    axes.set_ylabel("KL per token, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "cache.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
