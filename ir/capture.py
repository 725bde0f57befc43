"""Whatever names a model, to a ``Program``: functional graphs that compute the same bits."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import (
    fake_model,
    fetch,
    read_config,
    stored_tensors,
    unset_weights,
)
from .errors import CaptureError, ModelatheError
from .mapping import map_weights
from .program import Program
from .storage import is_program_folder, load_program
from .tracing import program_of, quiet_torch, trace_plain, trace_wrapped
from .watch import BUILD, DECOMPOSE, INFER, TRACE, Report, Watch
from .weights import Weight

DEMO = "demo"


def capture(
    model: nn.Module | str | Path,
    example_inputs: tuple[Tensor, ...] | Mapping[str, Tensor] | None = None,
    dynamic_shapes: Any = None,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    report: Report | None = None,
) -> Program:
    """Capture a model as a program, without changing a bit of what it computes.

    Args:
        model: a module; a path of a Hugging Face model folder, a ``.pt2`` file or a Program folder;
            or a text: ``demo``, the embedded model, whatever lies here under that name; a path; a
            hub id; or ``package.module:factory``, a callable that returns
            ``(module, example_inputs, dynamic_shapes)``.
        example_inputs: for a module that is not a transformers model.
        dynamic_shapes: which sizes are symbolic, as ``torch.export.export`` takes it.
        revision: of a hub id.
        allow_pickle: read pickled weights (``weights_only``) and ``.pt2`` files, and trust the
            source that a Program folder names where that is a factory or on the hub.
        report: called with the share of the work that is done, 0 to 1, as it grows.

    Raises:
        CaptureError: the model cannot be found, read or traced; the message says which.
    """
    if isinstance(model, nn.Module):
        return _capture_module(model, example_inputs, dynamic_shapes, report)
    text, kind = str(model), kind_of(model)
    if revision is not None and kind != "hub":
        raise CaptureError(
            f"{text}: is no hub id, so there is no revision {revision} of it",
            remedy="leave the revision out",
        )
    match kind:
        case "demo":
            path = Path(__file__).parents[1] / "demo" / "model"
            return replace_origin(_capture_folder(path, allow_pickle, report), model=DEMO)
        case "pt2":
            return _capture_pt2(Path(model), allow_pickle, report)
        case "program":
            return load_program(Path(model), report, allow_pickle=allow_pickle)
        case "folder":
            return _capture_folder(Path(model), allow_pickle, report)
        case "factory":
            return _capture_factory(text, report)
        case _:
            folder = fetch(text, revision, allow_pickle)
            return replace_origin(_capture_folder(folder, allow_pickle, report), model=text)


def kind_of(model: str | Path) -> str:
    """Return what a text or a path stands for.

    Raises:
        CaptureError: it is a path of something that is no model.
    """
    if model == DEMO:
        return "demo"
    path = Path(model)
    if path.suffix == ".pt2":
        return "pt2"
    if path.is_dir():
        return "program" if is_program_folder(path) else "folder"
    if path.exists():
        raise CaptureError(
            f"{model}: is a file, not a model folder", remedy="pass the folder that it lies in"
        )
    if isinstance(model, Path):
        raise CaptureError(f"{model}: no such folder", remedy="check the path")
    return "factory" if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", model) else "hub"


def replace_origin(program: Program, **changes: Any) -> Program:
    """Return the program with fields of its origin replaced."""
    return replace(program, origin=replace(program.origin, **changes))


def _capture_module(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...] | Mapping[str, Tensor] | None,
    dynamic_shapes: Any,
    report: Report | None,
    name: str | None = None,
) -> Program:
    if model.training:
        raise CaptureError(
            f"{type(model).__name__} is in training mode, which would capture dropout",
            remedy="call model.eval() first",
        )
    name, watch = name or type(model).__name__, Watch(report)
    if example_inputs is None and hasattr(model, "main_input_name"):
        program = trace_wrapped(model, name, None, {}, _config_of(model), watch)
    elif example_inputs is None:
        raise CaptureError(
            f"{name} is not a transformers model, so it needs example inputs",
            remedy="pass example_inputs, and dynamic_shapes for sizes that vary",
        )
    else:
        program = trace_plain(model, name, example_inputs, dynamic_shapes, watch)
    source = _source_identity(program.weights)
    return replace_origin(program, source=source, recapture=lambda _: program)


def _config_of(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_dict()
    return config


def _capture_folder(folder: Path, allow_pickle: bool, report: Report | None) -> Program:
    watch = Watch(report)
    with watch.stage(BUILD):
        config = read_config(folder)
        stored = stored_tensors(folder, allow_pickle)
        model, mode = fake_model(folder, config)
        mapped = map_weights(model, stored, folder)
    name = f"./{DEMO}" if str(folder) == DEMO else str(folder)  # what means it again as a text
    program = trace_wrapped(model, name, mode, mapped.weights, config, watch)
    origin = replace(
        program.origin,
        folder=folder.resolve(),
        captured_from=folder.resolve(),
        source=_source_identity(stored),
        notes=(*program.origin.notes, *_left_out_note(model, mapped.left_out)),
        recapture=lambda report: _capture_folder(folder, allow_pickle, report),
        allow_pickle=allow_pickle,
    )
    return replace(program, origin=origin)


def capture_architecture(folder: Path) -> Program:
    """Capture the model that ``config.json`` of a folder describes; weight files are not read.

    Its parameters and persistent buffers are weights that have no value: reading one raises.
    """
    config = read_config(folder)
    model, mode = fake_model(folder, config)
    return trace_wrapped(model, str(folder), mode, unset_weights(model), config, Watch())


def _left_out_note(model: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        return ()
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    kind = type(model).__name__
    return (f"left out: {len(names)} tensors of other models' heads, not of {kind}: {some}",)


def _source_identity(stored: Mapping[str, Weight]) -> str:
    import hashlib

    text = "\n".join(sorted(weight.fingerprint for weight in stored.values()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _capture_pt2(path: Path, allow_pickle: bool, report: Report | None) -> Program:
    if not path.is_file():
        raise CaptureError(f"{path}: no such file", remedy="check the path")
    if not allow_pickle:
        raise CaptureError(
            f"{path}: loading a .pt2 file may unpickle, and a pickle can run code",
            remedy="trust the file with --allow-pickle",
        )
    watch = Watch(report)
    try:
        with torch.no_grad(), quiet_torch():
            with watch.stage(BUILD + TRACE):
                exported = torch.export.load(path)
            with watch.decomposing(DECOMPOSE, exported):
                exported = exported.run_decompositions({})
    except Exception as error:
        raise CaptureError(
            f"{path}: torch.export.load rejects it", remedy="export it again with this torch"
        ) from error
    with watch.stage(INFER):
        program = program_of(exported, str(path))
    return replace_origin(
        program,
        source=_source_identity(program.weights),
        captured_from=path.resolve(),
        recapture=lambda report: _capture_pt2(path, allow_pickle, report),
    )


def _capture_factory(text: str, report: Report | None) -> Program:
    module_name, _, attribute = text.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a module that is being imported raises anything
        raise CaptureError(
            f"{text}: cannot be imported ({error})",
            remedy="the module must be importable from here, as with python -m",
        ) from error
    try:
        made = factory()
    except ModelatheError:
        raise
    except Exception as error:  # the user's own code raises anything
        first = str(error).strip().partition("\n")[0]
        raise CaptureError(
            f"{text}: raised {type(error).__name__}: {first}",
            remedy="mend the factory; --debug shows where",
        ) from error
    if isinstance(made, nn.Module):
        made = (made, None, None)
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module)):
        raise CaptureError(
            f"{text}: returned {type(made).__name__}",
            remedy="return (module, example_inputs, dynamic_shapes)",
        )
    program = _capture_module(*made, report, name=text)
    notes = (f"runs the user's own code: {text}", *program.origin.notes)
    return replace_origin(program, notes=notes, captured_from=text)
