"""``modelathe run``: capture a model, run passes over it, lower it to a folder that deploys."""

from __future__ import annotations

import enum
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cache import cache_folder
from .options import SEEDS, AllowPickle, Debug, Force, Json
from .plan import plan, show_plan
from .recipe import PipelineText, pipeline_text
from .report import choices, fidelity_line, remark_lines, step_rows
from .screen import Screen, count_text, figure, size_text
from .sources import open_program

if TYPE_CHECKING:
    from ..backends import Backend
    from ..ir import Program
    from ..passes import Pipeline, Step


TEXT, LIMITS = "Text and measuring", "Limits: the run fails where one is broken"


class Device(enum.StrEnum):
    """Where heavy work of passes runs."""

    CPU = "cpu"
    CUDA = "cuda"


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="demo, a model folder, a hub id, a .pt2 file, a Program folder, or "
            "package.module:factory.",
        ),
    ],
    pipeline: PipelineText = None,
    to: Annotated[
        str, typer.Option("--to", metavar="BACKEND", help='Such as "onnx{dtype=float16}".')
    ] = "onnx",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="OUT", help="The folder to write.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Capture, say what would be done, write nothing.")
    ] = False,
    force: Force = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run to OUT that was stopped.")
    ] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Neither check passes nor the artifact's outputs.")
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel=TEXT, min=0, max=SEEDS, metavar="S", help="Of everything random."
        ),
    ] = 0,
    calibration: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=TEXT,
            metavar="FILE|self",
            help="Text to calibrate on (.txt, .jsonl, .npy).",
        ),
    ] = None,
    calibration_samples: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=TEXT,
            min=1,
            metavar="N",
            help="How many samples of it; else 128, or as many as it has.",
        ),
    ] = None,
    calibration_length: Annotated[
        int, typer.Option(rich_help_panel=TEXT, min=2, metavar="N", help="Tokens of a sample.")
    ] = 512,
    check_text: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=TEXT,
            metavar="FILE",
            help="Text to measure fidelity on; else the calibration text's end.",
        ),
    ] = None,
    check_tokens: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=TEXT,
            min=2,
            metavar="N",
            help="Tokens to measure on, at most; else 8192.",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=LIMITS, min=0.0, metavar="X", help="Nats of KL per token, at most."
        ),
    ] = None,
    max_perplexity_increase: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=LIMITS,
            min=0.0,
            metavar="X",
            help="Rise of perplexity, at most (0.1 is 10 %).",
        ),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=LIMITS,
            min=0.0,
            max=1.0,
            metavar="X",
            help="Share of equal first choices, at least.",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
    device: Annotated[
        Device, typer.Option(rich_help_panel=TEXT, help="Where heavy work runs.")
    ] = Device.CPU,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a pipeline of passes over MODEL and write what it becomes into a folder.

    Without -p it is a plain export.  What passes exist: modelathe passes.
    """
    measured = {
        "--max-kl": max_kl,
        "--max-perplexity-increase": max_perplexity_increase,
        "--min-agreement": min_agreement,
        "--check-text": check_text,
        "--check-tokens": check_tokens,
    }
    asked = [name for name, value in measured.items() if value is not None]
    _check_together(out, dry_run, resume, asked if no_check else [])
    screen = Screen(as_json=as_json)
    with screen.quiet_libraries(debug=debug):
        from ..backends.output import (
            SCRATCH_FOLDER,
            check_free,
            check_writable,
            kept_state,
            resumable,
        )
        from ..ir import SCRATCH
        from ..passes import Budget, PassContext, Pipeline
        from ..passes.data import read_text

        context = PassContext(
            calibration=calibration,
            check_text=check_text,
            calibration_samples=calibration_samples,
            calibration_length=calibration_length,
            check_tokens=PassContext.check_tokens if check_tokens is None else check_tokens,
            seed=seed,
            device=device.value,
            progress=screen.progress,
            cache=cache_folder(),
        )
        budget = Budget(
            max_kl=max_kl,
            max_perplexity_increase=max_perplexity_increase,
            min_agreement=min_agreement,
        )
        # Everything that can be wrong in the command itself is found before the model is read.
        text = pipeline_text(pipeline)
        passes = Pipeline.parse(text, context=context, budget=budget, check=not no_check)
        backend = parse_backend(to)
        for path in (check_text, None if calibration == "self" else calibration):
            if path is not None:
                read_text(path)
        if out is not None and not dry_run:
            check_writable(out, force=force)
        program = open_program(model, screen, revision=revision, allow_pickle=allow_pickle)
        for note in program.origin.notes:
            screen.progress.note(note)
        if dry_run:
            planned = plan(program, passes, backend, None if out is None else str(out))
            return screen.emit(planned) if as_json else show_plan(screen, planned)
        assert out is not None
        check_free(out, backend.file_names(program))
        settings = {
            "model": model,
            "pipeline": str(passes),
            "seed": seed,
            "calibration": calibration,
            "calibration-samples": calibration_samples,
            "calibration-length": calibration_length,
        }
        with (
            resumable(out, settings, resume=resume, force=force) as (state, found),
            SCRATCH.within(state / SCRATCH_FOLDER),
        ):
            if resume and not found:
                screen.progress.note(
                    f"{out}: no stopped run to go on with, so this one starts anew"
                )
            passes = replace(passes, context=replace(context, state=state))
            try:
                manifest = make(screen, program, passes, backend, out, force=force)
            except BaseException:
                if kept_state(state):
                    words = "--force --resume" if out.exists() else "--resume"
                    screen.progress.note(f"what was learned so far is kept: {words} goes on")
                raise
    return screen.emit(manifest) if as_json else show(screen, manifest, out)


def _check_together(out: Path | None, dry_run: bool, resume: bool, unread: list[str]) -> None:
    """Refuse options that contradict each other; ``unread`` ask for checks that are not made."""
    if out is None and not dry_run:
        raise typer.BadParameter("say where to write: -o OUT (or --dry-run to write nothing)")
    if resume and dry_run:
        raise typer.BadParameter("--resume goes on with a run, and --dry-run makes none")
    if unread:
        raise typer.BadParameter(f"--no-check measures nothing, so drop it or {', '.join(unread)}")


def parse_backend(text: str) -> Backend:
    """Return the backend that ``--to`` names.

    Raises:
        SpecSyntaxError: it names no backend, or not exactly one.
    """
    from ..backends import Backend, all_backends
    from ..ir import SpecSyntaxError
    from ..passes import parse

    found = parse(text, all_backends(), Backend)
    if len(found) != 1:
        raise SpecSyntaxError(text, 0, f"one backend, got {len(found)}", remedy="such as --to onnx")
    return found[0]


def make(
    screen: Screen,
    program: Program,
    pipeline: Pipeline,
    backend: Backend,
    out: Path,
    *,
    force: bool = False,
    observe: Callable[[Step], None] | None = None,
) -> dict[str, Any]:
    """Run the pipeline, lower the result, write the artifact and return its manifest."""
    names = [pass_.name for pass_ in pipeline.passes]
    with screen.progress.task("running passes", total=len(names) + 1) as advance:

        def follow(step: Step) -> None:
            for warning in step.warnings:
                screen.progress.note(f"warning: {warning}")
            advance(1)

        observers = (follow,) if observe is None else (follow, observe)
        result = pipeline(program, observers=observers)
    with screen.progress.task(f"lowering to {backend.name}"):
        artifact = backend.lower(
            result.program,
            check=pipeline.check,
            context=pipeline.context,
            budget=pipeline.budget,
        )
    return artifact.save(out, force=force)


def show(screen: Screen, manifest: dict[str, Any], out: Path) -> None:
    """Print what was done, and what to do next."""
    from ..backends.manifest import model_bytes

    steps = manifest.get("steps") or []
    if steps:
        screen.table(
            ["pass", "outputs", "measured", "seconds"], step_rows(steps), right=["seconds"]
        )
    for name, rows, recipe in choices(steps):
        if rows:
            screen.facts(rows, title=f"{name} chose")
        screen.say(f"  {name}, as a recipe: {recipe}")
    for line in [*remark_lines(steps), *manifest.get("remarks", ())]:
        screen.say(f"  {line}")
    sizes = manifest.get("sizes") or {}
    before = (sizes.get("captured") or {}).get("bytes")
    bits = sizes.get("bits_per_weight")
    was = f" (was {size_text(before)})" if before else ""
    count = sizes.get("parameters")
    screen.facts(
        {
            "blocks": sizes.get("blocks"),
            "parameters": None if count is None else count_text(count),
            "size": f"{size_text(model_bytes(manifest))}{was}",
            "bits per weight": None if bits is None else figure(float(bits), 3),
            "as shipped": fidelity_line(manifest.get("fidelity") or {}) or None,
        },
        title=f"wrote {out}",
    )
    if manifest["kind"] in ("decoder", "encoder-decoder"):
        screen.say(f'  try it: modelathe generate {shlex.quote(str(out))} "The function returns"')
