"""``modelathe diff``: what a pipeline changes, or how two programs or artifacts differ."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cache import cache_folder
from .options import AllowPickle, Debug, Json
from .recipe import PipelineText, pipeline_text
from .screen import Screen, size_text
from .sources import is_artifact_word, is_model_folder, is_plain_onnx, open_program

if TYPE_CHECKING:
    from ..ir import Program
    from ..passes import Pipeline

# Facts that differ between any two runs and say nothing about what was made.
_UNINTERESTING = ("files", "steps")


def command(
    first: Annotated[str, typer.Argument(metavar="A", help="A model, Program folder or artifact.")],
    second: Annotated[
        str | None, typer.Argument(metavar="[B]", help="What to compare it with.")
    ] = None,
    pipeline: PipelineText = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a pipeline changes in A (-p TEXT), or how A and B differ.

    Models are compared in their canonical form, which every pipeline begins with.
    """
    if (second is None) == (pipeline is None):
        raise typer.BadParameter("give either a second thing to compare with, or -p PIPELINE")
    screen = Screen(as_json=as_json)
    with screen.quiet_libraries(debug=debug):
        if second is not None and _is_lowered(first) and _is_lowered(second):
            found = artifact_differences(Path(first), Path(second))
        else:
            found = _program_differences(screen, first, second, pipeline, allow_pickle)
    if as_json:
        return screen.emit(found)
    return _show(screen, found)


def artifact_differences(first: Path, second: Path) -> dict[str, Any]:
    """Compare manifests, file sizes and initialisers of two artifacts.

    Raises:
        StorageError: one of them is no complete artifact, or names data outside of its folder.
    """
    from ..backends.manifest import check_files, read_manifest
    from ..backends.onnx.session import refuse_outside_data

    for folder in (first, second):
        refuse_outside_data(folder)
    manifests = [read_manifest(folder) for folder in (first, second)]
    for folder, manifest in zip((first, second), manifests, strict=True):
        check_files(folder, manifest)
    tensors = [_initializers(folder) for folder in (first, second)]
    sizes = [{n: e["bytes"] for n, e in manifest["files"].items()} for manifest in manifests]
    told = [{k: v for k, v in m.items() if k not in _UNINTERESTING} for m in manifests]
    plain = [dict(_flat(facts)) for facts in told]
    found: dict[str, Any] = {
        "manifest": _changes(*plain),
        "files": _changes(*sizes),
        "initializers": _changes(*tensors),
    }
    same = len(set(tensors[0].items()) & set(tensors[1].items()))
    return {"changed": any(found.values()), **found, "equal_initializers": same}


def text_diff(before: str, after: str) -> str:
    """Return the changed lines of two program texts, each with a line around it."""
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "before", "after", n=1, lineterm=""
    )
    return "\n".join(lines)


def _program_differences(
    screen: Screen, first: str, second: str | None, pipeline: str | None, allow_pickle: bool
) -> dict[str, Any]:
    """Compare two models, or one before and after a pipeline, in their canonical form.

    A pipeline that begins with ``canonicalize`` is compared with the model as it was captured.
    """
    from ..ir import to_text
    from ..passes import Canonicalize

    for word in filter(None, (first, second)):
        if _is_lowered(word):
            raise typer.BadParameter(f"{word} is an artifact: compare it with another artifact")
    made = None if pipeline is None else _parsed(screen, pipeline)
    captured = open_program(first, screen, allow_pickle=allow_pickle)
    before = _canonical(captured)
    if made is None:
        assert second is not None
        after = _canonical(open_program(second, screen, allow_pickle=allow_pickle))
    else:
        after = made(captured).program
        if made.passes and isinstance(made.passes[0], Canonicalize):
            before = captured
    texts = to_text(before), to_text(after)
    values = _other_values(screen, before, after) if made is None else []
    changed = texts[0] != texts[1] or bool(values)
    return {"changed": changed, "diff": text_diff(*texts), "values": values}


def _parsed(screen: Screen, pipeline: str) -> Pipeline:
    from ..passes import PassContext, Pipeline

    context = PassContext(progress=screen.progress, cache=cache_folder())
    # The checks judge values, which a diff of the text does not show; `run` makes them.
    return Pipeline.parse(pipeline_text(pipeline), context=context, check=False)


def _canonical(program: Program) -> Program:
    """Return the form that every pipeline begins with, which a saved program already has."""
    from ..passes import Canonicalize, PassContext

    return Canonicalize()(program, PassContext()).program


def _other_values(screen: Screen, before: Program, after: Program) -> list[str]:
    """Return the weights that have the same name, sizes and dtype in both and other numbers.

    All are read: fingerprints go by name, size and time of files, which may agree.
    """
    import torch

    pairs = {name: (before.weights[name], after.weights.get(name)) for name in before.weights}
    found = []
    with screen.progress.task("comparing weights", total=len(pairs)) as advance:
        for name, (mine, theirs) in pairs.items():
            alike = theirs is not None and (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            if theirs is not None and alike:
                found += [] if torch.equal(mine.load(), theirs.load()) else [name]
            advance(1)
    return found


def _is_lowered(word: str) -> bool:
    """Tell whether ``word`` is an artifact, or looks like one, without a Program or model in it."""
    made, path = is_artifact_word(word) or is_plain_onnx(word), Path(word)
    return made and not ((path / "program.json").exists() or is_model_folder(path))


def _initializers(folder: Path) -> dict[str, str]:
    from ..backends.onnx.initializers import read_contents

    table = {}
    for path in sorted(folder.glob("*.onnx")):
        for one in read_contents(path, hashes=True).initializers:
            shape = "x".join(map(str, one.shape))
            table[f"{path.stem}:{one.name}"] = f"{one.dtype}[{shape}] {one.sha256[:12]}"
    return table


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return key to [before, after] where they differ; None stands for a key that is missing."""
    keys = [*before, *(key for key in after if key not in before)]
    pairs = {key: [before.get(key), after.get(key)] for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _show(screen: Screen, found: dict[str, Any]) -> None:
    if not found["changed"]:
        return screen.say("no difference")
    if "diff" in found:
        for line in found["diff"].splitlines():
            color = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1])
            screen.say(line, style=color)
        for name in found["values"]:
            screen.say(f"other numbers: @{name}")
        return None
    _show_changes(screen, "manifest", found["manifest"])
    _show_changes(screen, "files", {k: list(map(_size, v)) for k, v in found["files"].items()})
    title = f"initialisers ({found['equal_initializers']} are equal)"
    return _show_changes(screen, title, found["initializers"])


def _show_changes(screen: Screen, title: str, changes: Mapping[str, list[Any]]) -> None:
    if changes:
        rows = [[key, *("-" if v is None else v for v in pair)] for key, pair in changes.items()]
        screen.table(["", "A", "B"], rows, title=title)


def _size(value: int | None) -> str | None:
    return None if value is None else size_text(value)
