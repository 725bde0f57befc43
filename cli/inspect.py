"""``modelathe inspect``: what a model or an artifact is, and how it was made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import AllowPickle, Debug, Json
from .scores import block_scores, show_scores
from .screen import Screen, count_text, figure, size_text
from .sources import is_artifact_word, is_model_folder, is_plain_onnx, open_program

if TYPE_CHECKING:
    from ..ir import Program


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|ARTIFACT",
            help="demo, a model folder, a hub id, a .pt2 file, package.module:factory, "
            "or an artifact.",
        ),
    ],
    graph: Annotated[bool, typer.Option("--graph", help="Print every call of the graph.")] = False,
    scores: Annotated[
        bool,
        typer.Option(
            "--scores",
            help="Score each block: ZD; with --calibration also LIM and block influence.",
        ),
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Text that --scores reads.", metavar="FILE")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model or artifact is: blocks, parameters, bytes, and how it was made."""
    screen = Screen(as_json=as_json)
    if calibration is not None and not scores:
        raise typer.BadParameter("--calibration is read by --scores only")
    with screen.quiet_libraries(debug=debug):
        if is_artifact_word(model) or is_plain_onnx(model):
            if revision is not None:
                raise typer.BadParameter(f"--revision is of a hub id, and {model} is an artifact")
            about = artifact_facts(Path(model), screen, graph=graph)
            program = _program_of(Path(model), screen) if scores else None
        else:
            program = open_program(model, screen, revision=revision, allow_pickle=allow_pickle)
            about = program_facts(program, graph=graph)
        if scores and program is not None:
            about["scores"] = block_scores(program, screen, calibration)
    if as_json:
        screen.emit(about)
    show(screen, about, model)


def _program_of(folder: Path, screen: Screen) -> Program:
    """Return the program in an artifact.

    Raises:
        DataError: it holds none, as ONNX files do not.
    """
    from ..ir import DataError, is_program_folder

    if not (is_program_folder(folder) or is_model_folder(folder)):
        raise DataError(
            f"{folder} holds no program, so its blocks have no scores",
            remedy="score the model it was made from",
        )
    return open_program(folder, screen)


def program_facts(program: Program, *, graph: bool = False) -> dict[str, Any]:
    """Return what is known of a program without reading its weights."""
    from ..backends.manifest import program_signatures
    from ..backends.sizes import program_sizes
    from ..ir import to_text

    sizes = program_sizes(program)
    dtypes: dict[str, int] = {}
    for name in program.weights:
        weight = program.weights[name]
        kind = str(weight.dtype).removeprefix("torch.")
        dtypes[kind] = dtypes.get(kind, 0) + weight.bytes
    return {
        "model": program.origin.model,
        "kind": program.kind,
        "architecture": _architecture(program.config),
        "blocks": sizes.blocks,
        "parameters": sizes.parameters,
        "bytes": sizes.bytes,
        "bits_per_weight": sizes.bits_per_weight,
        "dtypes": dtypes,
        "norms": _norms(program),
        "aliases": dict(program.weights.aliases),
        "passes": list(program.origin.passes),
        "notes": list(program.origin.notes),
        "signatures": program_signatures(program),
        **({"graph": to_text(program)} if graph else {}),
    }


def artifact_facts(folder: Path, screen: Screen, *, graph: bool = False) -> dict[str, Any]:
    """Return what is known of an artifact from its manifest and its files.

    Raises:
        StorageError: it is not complete, or an ONNX file names data outside of the folder.
    """
    from ..backends.manifest import check_files, model_bytes, read_manifest
    from ..backends.onnx.initializers import graph_lines, read_contents
    from ..backends.onnx.session import refuse_outside_data
    from ..backends.session import read_config
    from ..ir import is_program_folder

    refuse_outside_data(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    config = read_config(folder)
    files = sorted(folder.glob("*.onnx"))
    contents = {path.name: read_contents(path) for path in files}
    about: dict[str, Any] = {
        **manifest,
        "architecture": _architecture(config),
        "bytes": model_bytes(manifest),
        "opsets": {name: c.opsets for name, c in contents.items()},
        "operators": {name: c.operators for name, c in contents.items()},
    }
    for key in ("blocks", "parameters", "bits_per_weight"):
        about.setdefault(key, manifest.get("sizes", {}).get(key))
    if graph and (is_program_folder(folder) or is_model_folder(folder)):
        from ..ir import to_text

        about["graph"] = to_text(_program_of(folder, screen))
    elif graph:
        about["graph"] = "\n".join(line for path in files for line in graph_lines(path))
    return about


def show(screen: Screen, about: dict[str, Any], word: str) -> None:
    """Print the facts for people."""
    bits = about.get("bits_per_weight")
    count = about.get("parameters")
    screen.facts(
        {
            "kind": " ".join(filter(None, [about.get("architecture"), about["kind"]])),
            "blocks": about.get("blocks"),
            "parameters": None if count is None else count_text(count),
            "size": size_text(about["bytes"]),
            "bits per weight": None if bits is None else figure(float(bits), 3),
            "stored as": _dtypes(about),
            "norms": norms_text(about.get("norms") or {}),
            "tied": ", ".join(f"{a} = {b}" for a, b in about.get("aliases", {}).items()) or None,
            "passes": ", ".join(about["passes"]) if about.get("passes") else None,
            "notes": "; ".join(about.get("notes") or []) or None,
            **(_making(about) if "backend" in about else {}),
        },
        title=word,
    )
    if "backend" in about:
        _show_making(screen, about)
    for name, signature in about["signatures"].items():
        for side in ("inputs", "outputs"):
            screen.say(f"  {name} {side}: {_tensors(signature[side])}")
    if "scores" in about:
        show_scores(screen, about["scores"])
    if "graph" in about:
        screen.say("")
        screen.say(about["graph"].rstrip())


def _norms(program: Program) -> dict[str, Any]:
    """Return the placement of the norms of each graph, by ``norm_placement``."""
    from dataclasses import asdict

    from ..passes import Canonicalize
    from ..passes.analysis.norm_placement import norm_placement

    canonical = Canonicalize()(program).program
    found = {name: asdict(norm_placement(canonical, name)) for name in canonical.graphs}
    return {
        name: {key: value[key] for key in ("blocks", "outside")} for name, value in found.items()
    }


def norms_text(norms: dict[str, Any]) -> str | None:
    """Return one phrase for each run of blocks that are alike: ``pre (rms) in blocks 0-11``."""
    graphs = []
    for name, found in norms.items():
        runs: list[tuple[str, int, int]] = []
        for index, block in enumerate(found["blocks"]):
            kinds = " and ".join(dict.fromkeys(block["kinds"]))
            special = ", with norms of queries and keys" if block["query_key"] else ""
            what = f"{block['placement']}{f' ({kinds}{special})' if kinds or special else ''}"
            if runs and runs[-1][0] == what:
                runs[-1] = what, runs[-1][1], index
            else:
                runs.append((what, index, index))
        if runs:
            graphs.append((name, "; ".join(_run_text(run, len(runs)) for run in runs)))
    if len(graphs) < 2:
        return graphs[0][1] if graphs else None
    return "; ".join(f"{name}: {text}" for name, text in graphs)


def _run_text(run: tuple[str, int, int], count: int) -> str:
    what, first, last = run
    if count == 1:
        return f"{what} in every block"
    return f"{what} in block {first}" if first == last else f"{what} in blocks {first}-{last}"


def _making(about: dict[str, Any]) -> dict[str, object]:
    return {
        "made from": about.get("model"),
        "made by": about.get("tool"),
        "pipeline": about.get("pipeline") or "none: a plain export",
        "backend": about["backend"],
        "seed": about.get("seed"),
    }


def _show_making(screen: Screen, about: dict[str, Any]) -> None:
    from .report import fidelity_line, step_rows

    if about.get("steps"):
        screen.table(["pass", "outputs", "measured", "seconds"], step_rows(about["steps"]))
    if line := fidelity_line(about.get("fidelity") or {}):
        screen.say(f"  as shipped, against the original: {line}")
    for name, operators in about["operators"].items():
        most = ", ".join(f"{count} {op}" for op, count in list(operators.items())[:8])
        screen.say(f"  {name}: {most}{', ...' if len(operators) > 8 else ''}")


def _dtypes(about: dict[str, Any]) -> str | None:
    kinds = about.get("dtypes")
    return ", ".join(f"{k} {size_text(v)}" for k, v in kinds.items()) if kinds else None


def _tensors(entries: list[dict[str, Any]]) -> str:
    """Return names with sizes; names that differ in a number only are written once: ``N (12x)``."""
    counts: dict[str, int] = {}
    for entry in entries:
        name = re.sub(r"\d+", "N", entry["name"])
        word = f"{name} [{', '.join(map(str, entry['shape']))}]"
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(word if n == 1 else f"{word} ({n}x)" for word, n in counts.items())


def _architecture(config: dict[str, Any]) -> str | None:
    names = config.get("architectures") or []
    return str(names[0]) if names else config.get("model_type")
