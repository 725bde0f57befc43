"""``modelathe demo``: the main job on the model that comes with the package."""

from __future__ import annotations

import shlex
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug, Force, Json
from .report import fidelity_line
from .run import make, parse_backend
from .screen import Screen, figure, size_text
from .sources import open_program

if TYPE_CHECKING:
    from ..backends import Session
    from ..ir import Program
    from ..passes import Step

PIPELINE = "fold-norms,prune-blocks{count=1},quantize-weights{bits=4 group-size=32}"
PROMPT = "The function returns"
CALIBRATION_SAMPLES = 16  # of 512 tokens: a quarter of the shipped text, and quickly scored
CHECK_TOKENS = 4096
NEW_TOKENS = 40


def command(
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="OUT", help="Keep both artifacts in this folder."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the main job on the embedded model and show what each pass costs."""
    screen = Screen(as_json=as_json)
    with screen.quiet_libraries(debug=debug), tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        found = run_demo(screen, Path(scratch) if out is None else out, force=force)
        found["seconds"] = round(time.perf_counter() - started, 1)
    if as_json:
        return screen.emit(found)
    return show(screen, found, out)


def run_demo(screen: Screen, out: Path, *, force: bool = False) -> dict[str, Any]:
    """Make the artifact of the untouched model and that of the pipeline; measure both."""
    from ..backends import open_artifact
    from ..backends.output import check_writable
    from ..demo import CALIBRATION_TEXT, HELDOUT_TEXT
    from ..passes import PassContext, Pipeline

    for name in ("before", "after"):
        check_writable(out / name, force=force)
    screen.say("capturing the embedded model ...")
    program = open_program("demo", screen)
    backend = parse_backend("onnx")
    context = PassContext(
        calibration=CALIBRATION_TEXT,
        calibration_samples=CALIBRATION_SAMPLES,
        check_text=HELDOUT_TEXT,
        check_tokens=CHECK_TOKENS,
        progress=screen.progress,
    )
    plain = Pipeline.parse("", context=context, check=False)
    made = Pipeline.parse(PIPELINE, context=context)
    screen.say(f"running {PIPELINE} ...")
    steps = _Steps(program)
    make(screen, program, plain, backend, out / "before", force=force)
    make(screen, program, made, backend, out / "after", force=force, observe=steps.add)
    screen.say("measuring before and after in ONNX Runtime ...")
    sessions = [open_artifact(out / name) for name in ("before", "after")]
    return {
        "pipeline": PIPELINE,
        "passes": steps.rows,
        **measure(screen, sessions[0], sessions[1], HELDOUT_TEXT),
    }


def measure(screen: Screen, before: Session, after: Session, text: Path) -> dict[str, Any]:
    """Return size, quality, speed and a sample of both artifacts."""
    from ..backends.bench import bench
    from ..backends.evaluate import evaluate
    from ..backends.generate import generate
    from ..passes.tokenizer import open_tokenizer

    quality = evaluate(
        after, text=text, against=before, tokens=CHECK_TOKENS, progress=screen.progress
    )
    speed = bench(after, before, memory=False, progress=screen.progress)
    tokenizer = open_tokenizer(after.folder)
    prompt = tokenizer.encode(PROMPT)
    texts = [
        tokenizer.decode(prompt + generate(one, [prompt], max_new_tokens=NEW_TOKENS)[0])
        for one in (before, after)
    ]
    keys = ("bytes", "prefill", "decode")
    old, new = speed["against"], speed
    return {
        "before": {
            **{key: old[key] for key in keys},
            "perplexity": quality["reference_perplexity"],
            "text": texts[0],
        },
        "after": {
            **{key: new[key] for key in keys},
            "perplexity": quality["perplexity"],
            "kl": quality["kl"],
            "top1_agreement": quality["top1_agreement"],
            "text": texts[1],
        },
        "ratio": speed["ratio"],
    }


class _Steps:
    """Collects what each pass did to size and fidelity."""

    def __init__(self, program: Program) -> None:
        from ..backends.sizes import program_sizes

        self._sizes = program_sizes
        sizes = program_sizes(program)
        row = {"pass": "(as captured)", "blocks": sizes.blocks, "bytes": sizes.bytes}
        self.rows: list[dict[str, Any]] = [{**row, "seconds": None, "measured": {}}]

    def add(self, step: Step) -> None:
        from ..passes import to_spec

        sizes = self._sizes(step.after)
        self.rows.append(
            {
                "pass": to_spec(step.pass_),
                "blocks": sizes.blocks,
                "bytes": sizes.bytes,
                "seconds": round(step.seconds, 3),
                "measured": step.measured.known(),
            }
        )


def show(screen: Screen, found: dict[str, Any], out: Path | None) -> None:
    """Print what each pass cost, and before and after side by side."""
    rows = [
        [
            row["pass"],
            row["blocks"],
            size_text(row["bytes"]),
            fidelity_line(row["measured"]),
            figure(row["seconds"], 2),
        ]
        for row in found["passes"]
    ]
    columns = ["pass", "blocks", "size", "measured on held-out text", "seconds"]
    screen.table(columns, rows, "what each pass cost", right=["blocks", "size", "seconds"])
    before, after, ratio = found["before"], found["after"], found["ratio"]
    smaller = before["bytes"] / after["bytes"]
    table = [
        ["size", size_text(before["bytes"]), size_text(after["bytes"]), f"{smaller:.2f}x smaller"],
        ["perplexity", figure(before["perplexity"]), figure(after["perplexity"]), _rise(found)],
        ["KL to before (nats)", "0", figure(after["kl"], 3), ""],
        ["top-1 agreement", "100 %", f"{after['top1_agreement']:.1%}", ""],
    ]
    table += [
        [f"{key} (tokens/s)", figure(before[key]), figure(after[key]), f"{ratio[key]:.2f}x as fast"]
        for key in ("prefill", "decode")
    ]
    screen.table(
        ["in ONNX Runtime", "before", "after", ""], table, "before and after", ["before", "after"]
    )
    for name in ("before", "after"):
        screen.say(f"{name}:", style="bold")
        screen.say(f"  {' '.join(found[name]['text'].split())}\n")
    where = "add -o FOLDER to keep the artifacts" if out is None else f"the artifacts are in {out}"
    screen.say(f"{found['seconds']} s in all; {where}")
    screen.say(f"the same by hand: {by_hand()}")


def by_hand() -> str:
    """Return the command that makes what the demo calls after."""
    from ..demo import CALIBRATION_TEXT, HELDOUT_TEXT

    options = {
        "--calibration": CALIBRATION_TEXT,
        "--calibration-samples": CALIBRATION_SAMPLES,
        "--check-text": HELDOUT_TEXT,
        "--check-tokens": CHECK_TOKENS,
    }
    words = [word for pair in options.items() for word in map(str, pair)]
    return f'modelathe run demo -p "{PIPELINE}" {shlex.join(words)} -o out/'


def _rise(found: dict[str, Any]) -> str:
    return f"{found['after']['perplexity'] / found['before']['perplexity'] - 1:+.1%}"
