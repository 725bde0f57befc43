"""What removing norms costs before and after healing, and how much faster the model is then.

    python -m modelathe.demo.train --shape gpt2 --output TWIN --minutes 45
    python benchmarks/norms.py TWIN demo [--second FILE] [--tokens 200000,1000000] [--out FOLDER]

For decoders, such as the LayerNorm twin of the demo model and the demo model itself (RMSNorm): rise
of the cross-entropy in nats on the held-out text of the healing source (the demo's, other modules
than it heals on) and on a second source, norms left, and latency in ONNX Runtime as a ratio to the
untouched model (below 1 is faster, medians of alternating runs) at three lengths.  For every run of
healing, a table of its judgements: norms that are live and KL on held-out text, by source.  The
same is drawn into FOLDER.  What cannot be frozen at once is said to be refused; with
``--progressive`` norms are frozen one by one while healing, and with ``--target-kl`` each waits
for the loss to be below it.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modelathe.backends import Onnx, open_artifact
from modelathe.backends.curves import draw_curves
from modelathe.cli.cache import cache_folder
from modelathe.demo import CALIBRATION_TEXT, HELDOUT_TEXT
from modelathe.ir import DataError, Norm, PassError, Program, capture
from modelathe.passes import PassContext, Pipeline
from modelathe.passes.fidelity import Reference
from modelathe.passes.probes import empty_cache, feeds

LENGTHS = (16, 128, 512)
_NORMS = ("LayerNormalization", "RMSNormalization", "ReduceMean", "SimplifiedLayerNormalization")


def rise(original: Program, program: Program, context: PassContext, text: Path) -> float:
    """Return by how many nats per token the cross-entropy on a text is higher."""
    measured = Reference(original, replace(context.fresh(), check_text=text)).measure(program)
    assert measured.perplexity is not None
    assert measured.reference_perplexity is not None
    return math.log(measured.perplexity / measured.reference_perplexity)


def norms_left(program: Program) -> int:
    """Return how many norms the graph has."""
    return sum(bool(Norm.match(node)) for graph in program.graphs.values() for node in graph.nodes)


def latencies(programs: dict[str, Program], folder: Path) -> dict[str, Any]:
    """Return medians of paired ratios to the first program by length, and norm nodes in ONNX."""
    import onnx

    sessions, counts = {}, {}
    for name, program in programs.items():
        place = folder / name
        Onnx().lower(program, check=False).save(place)
        kinds = collections.Counter(n.op_type for n in onnx.load(place / "model.onnx").graph.node)
        counts[name] = {"nodes": sum(kinds.values()), "norms": sum(kinds[k] for k in _NORMS)}
        sessions[name] = open_artifact(place)
    first = next(iter(programs.values()))
    ratios: dict[str, dict[int, float]] = {name: {} for name in programs}
    for length in LENGTHS:
        tokens = torch.randint(int(first.config["vocab_size"]), (1, length))
        inputs = {
            k: v.float() if v.is_floating_point() else v
            for k, v in feeds(first, tokens, empty_cache(first, 1), 0).items()
        }
        given = {name: value.numpy() for name, value in inputs.items()}
        times: dict[str, list[float]] = {name: [] for name in programs}
        for turn in range(60):
            for name, session in sessions.items():
                started = time.perf_counter()
                session.run(given)
                if turn >= 10:
                    times[name].append(time.perf_counter() - started)
        base = next(iter(times.values()))
        for name, values in times.items():
            ratios[name][length] = statistics.median(
                v / b for v, b in zip(values, base, strict=True)
            )
    return {name: {"ratios": ratios[name], **counts[name]} for name in programs}


def print_curve(curve: list[dict[str, float]], norms: int) -> None:
    """Print a line for each judgement of a run of healing."""
    sources = [name for name in ("text", "generated") if name in curve[0]]
    print("    step    tokens  norms" + "".join(f"  KL, {name:9}" for name in sources))
    for point in curve:
        live = int(point.get("live", norms))
        figures = "".join(f"  {point[name]:13.4f}" for name in sources)
        print(
            f"    {int(point['step']):4}  {int(point['tokens']):8}  {live:5}{figures}", flush=True
        )


def study(model: str, runs: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every pipeline on a model and print one row for each."""
    original = capture(model)
    context = PassContext(
        calibration=CALIBRATION_TEXT,
        calibration_samples=64,
        check_tokens=arguments.check_tokens,
        cache=cache_folder(),
    )
    texts = {"held-out": HELDOUT_TEXT}
    if arguments.second:
        texts["second"] = Path(arguments.second)
    programs: dict[str, Program] = {}
    rows: dict[str, Any] = {}
    plain = Pipeline.parse("canonicalize", context=context, check=False)(original).program
    programs["untouched"] = plain
    for name, text in runs.items():
        started = time.perf_counter()
        try:
            result = Pipeline.parse(text, context=context, check=False)(original)
        except (PassError, DataError) as error:
            print(json.dumps({"pipeline": text, "refused": str(error)}), flush=True)
            continue
        row: dict[str, Any] = {
            "pipeline": text,
            "norms": norms_left(result.program),
            "seconds": round(time.perf_counter() - started),
            **{f"rise, {n}": rise(original, result.program, context, t) for n, t in texts.items()},
        }
        steps = [step.summary() for step in result.steps]
        row["curve"] = [s["details"]["curve"] for s in steps if "details" in s]
        if arguments.out:
            place = Path(arguments.out) / f"{Path(model).name}-{name}".replace(" ", "-")
            place.mkdir(parents=True, exist_ok=True)
            draw_curves(steps, place)
        rows[name], programs[name] = row, result.program
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        shown.pop("curve")
        print(json.dumps(shown), flush=True)
        for curve in row["curve"]:
            print_curve(curve, row["norms"])
    with tempfile.TemporaryDirectory() as folder:
        for name, found in latencies(programs, Path(folder)).items():
            rows.setdefault(name, {}).update(found)
            print(name, json.dumps(found), flush=True)
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="model folders, or demo")
    parser.add_argument("--second", help="a text of another source")
    parser.add_argument("--tokens", default="200000,1000000")
    parser.add_argument("--check-tokens", type=int, default=32768)
    parser.add_argument("--progressive", action="store_true", help="the paper's schedule too")
    parser.add_argument(
        "--target-kl", default="", help="of the paper's schedule; norms wait for it"
    )
    parser.add_argument("--out", help="a folder for the curves and figures")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    tokens = [int(text) for text in arguments.tokens.split(",") if text]
    runs = {
        "frozen": "remove-norms{untie=true}",
        "frozen, no first": "remove-norms{untie=true first-position=false}",
        "frozen, head tied": "remove-norms",
    }
    for count in tokens:
        heal = f"heal{{tokens={count}}}"
        runs[f"healed {count}"] = f"remove-norms{{untie=true}},{heal}"
        if arguments.progressive:
            target = arguments.target_kl and f"target-kl={arguments.target_kl} "
            marked = f"remove-norms{{{target}schedule=progressive untie=true}}"
            runs[f"progressive {count}"] = f"{marked},{heal}"
    found = {Path(model).name: study(model, runs, arguments) for model in arguments.models}
    if arguments.out:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1)
        (Path(arguments.out) / "norms.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
