"""A model to a ``Program``, by ``torch.export``: functional graphs that compute the same bits."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim

from .blocks import stamp
from .checkpoint import (
    fake_model,
    fetch,
    map_weights,
    read_config,
    stored_tensors,
    tied_names,
    tied_tensors,
    unset_weights,
)
from .errors import CaptureError, ModelatheError
from .infer import Sizes, infer_graph
from .program import MAIN, Origin, Program, Signature
from .storage import is_program_folder, load_program
from .weights import ComputedWeight, TensorWeight, Weight, Weights
from .wrappers import EXAMPLE_LENGTH, Wrapped, model_kind, wrap

DEMO = "demo"


def capture(
    model: nn.Module | str | Path,
    example_inputs: tuple[Tensor, ...] | Mapping[str, Tensor] | None = None,
    dynamic_shapes: Any = None,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Program:
    """Capture a model as a program, without changing a bit of what it computes.

    Args:
        model: a module; or a text: ``demo``, a Hugging Face model folder or hub id, a ``.pt2``
            file, a Program folder, or ``package.module:factory``, a callable that returns
            ``(module, example_inputs, dynamic_shapes)``.
        example_inputs: for a module that is not a transformers model.
        dynamic_shapes: which sizes are symbolic, as ``torch.export.export`` takes it.
        revision: of a hub id.
        allow_pickle: read pickled weights (``weights_only``) and ``.pt2`` files.

    Raises:
        CaptureError: the model cannot be found, read or traced; the message says which.
    """
    if isinstance(model, nn.Module):
        return _capture_module(model, example_inputs, dynamic_shapes)
    text = os.fspath(model)
    path = Path(text)
    if text == DEMO:
        path = Path(__file__).parents[1] / "demo" / "model"
        return replace_origin(_capture_folder(path, allow_pickle), model=DEMO)
    if path.suffix == ".pt2":
        return _capture_pt2(path, allow_pickle)
    if path.is_dir():
        if is_program_folder(path):
            return load_program(path)
        return _capture_folder(path, allow_pickle)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        return _capture_factory(text)
    if path.exists():
        raise CaptureError(
            f"{text}: is a file, not a model folder", remedy="pass the folder that it lies in"
        )
    folder = fetch(text, revision, allow_pickle)
    return replace_origin(_capture_folder(folder, allow_pickle), model=text)


def replace_origin(program: Program, **changes: Any) -> Program:
    """Return the program with fields of its origin replaced."""
    return replace(program, origin=replace(program.origin, **changes))


def _capture_module(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...] | Mapping[str, Tensor] | None,
    dynamic_shapes: Any,
    name: str | None = None,
) -> Program:
    if model.training:
        raise CaptureError(
            f"{type(model).__name__} is in training mode, which would capture dropout",
            remedy="call model.eval() first",
        )
    name = name or type(model).__name__
    if example_inputs is None and hasattr(model, "main_input_name"):
        program = _capture_wrapped(model, name, None, {}, _config_of(model))
    elif example_inputs is None:
        raise CaptureError(
            f"{name} is not a transformers model, so it needs example inputs",
            remedy="pass example_inputs, and dynamic_shapes for sizes that vary",
        )
    else:
        program = _capture_plain(model, name, example_inputs, dynamic_shapes)
    origin = replace(program.origin, recapture=lambda: program)
    return replace(program, origin=origin)


def _config_of(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_dict()
    return config


def _capture_folder(folder: Path, allow_pickle: bool) -> Program:
    config = read_config(folder)
    stored = stored_tensors(folder, allow_pickle)
    model, mode = fake_model(folder, config)
    weights = map_weights(model, stored, folder)
    program = _capture_wrapped(model, str(folder), mode, weights, config)
    origin = replace(
        program.origin,
        folder=folder.resolve(),
        source=_source_identity(stored),
        recapture=lambda: _capture_folder(folder, allow_pickle),
    )
    return replace(program, origin=origin)


def capture_architecture(folder: Path) -> Program:
    """Capture the model that ``config.json`` of a folder describes; weight files are not read.

    Its parameters and persistent buffers are weights that have no value: reading one raises.
    """
    config = read_config(folder)
    model, mode = fake_model(folder, config)
    return _capture_wrapped(model, str(folder), mode, unset_weights(model), config)


def _source_identity(stored: Mapping[str, Weight]) -> str:
    import hashlib

    text = "\n".join(sorted(weight.fingerprint for weight in stored.values()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _capture_pt2(path: Path, allow_pickle: bool) -> Program:
    if not path.is_file():
        raise CaptureError(f"{path}: no such file", remedy="check the path")
    if not allow_pickle:
        raise CaptureError(
            f"{path}: loading a .pt2 file may unpickle, and a pickle can run code",
            remedy="trust the file with --allow-pickle",
        )
    try:
        with torch.no_grad(), _quiet_torch():
            exported = torch.export.load(path).run_decompositions({})
    except Exception as error:
        raise CaptureError(
            f"{path}: torch.export.load rejects it", remedy="export it again with this torch"
        ) from error
    program = _from_exported(exported, str(path), None)
    origin = replace(program.origin, recapture=lambda: _capture_pt2(path, allow_pickle))
    return replace(program, origin=origin)


def _capture_factory(text: str) -> Program:
    module_name, _, attribute = text.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise CaptureError(
            f"{text}: cannot be imported ({error})",
            remedy="the module must be importable from here, as with python -m",
        ) from error
    made = factory()
    if isinstance(made, nn.Module):
        made = (made, None, None)
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module)):
        raise CaptureError(
            f"{text}: returned {type(made).__name__}",
            remedy="return (module, example_inputs, dynamic_shapes)",
        )
    program = _capture_module(*made, name=text)
    return replace_origin(program, notes=(f"runs the user's own code: {text}",))


def _capture_wrapped(
    model: Any,
    name: str,
    mode: FakeTensorMode | None,
    found: Mapping[str, Weight],
    config: dict[str, Any],
) -> Program:
    """Trace each graph of a transformers model and put them over one table of weights."""
    with torch.no_grad(), mode or contextlib.nullcontext():
        kind = model_kind(model)
        parts = {graph: (wrapped, _export(wrapped, name)) for graph, wrapped in wrap(model).items()}
    origin = Origin(name, kind)
    lengths = {wrapped.length for wrapped, _ in parts.values()} - {EXAMPLE_LENGTH}
    sizes = Sizes({"sequence": max(lengths)} if lengths else None)
    program = Program({}, {}, Weights(), dict(config), origin)
    tied = tied_names(model)
    for graph, (wrapped, exported) in parts.items():
        signature = Signature(tuple(wrapped.inputs), wrapped.outputs, dict(wrapped.inputs))
        dtypes = {n: wrapped.dtypes.get(n, torch.int64) for n in wrapped.inputs}
        _add_graph(program, graph, exported, signature, dtypes, sizes, found, tied, prefix="model.")
    _note_aliases(program, tied)
    return program


def _export(wrapped: Wrapped, name: str) -> torch.export.ExportedProgram:
    example = wrapped.example()
    dynamic = [
        {axis: Dim.DYNAMIC for axis, dim in enumerate(dims) if isinstance(dim, str)}
        for dims in wrapped.inputs.values()
    ]
    return _exported(wrapped.module, (example,), (dynamic,), name)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep from the user what torch.export says about its own use of torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)
        yield


def _exported(
    module: nn.Module,
    args: tuple[Any, ...],
    dynamic: Any,
    name: str,
    named: dict[str, Any] | None = None,
) -> torch.export.ExportedProgram:
    """Export functionally.

    Without ``no_grad`` rotary embeddings become a sub-graph call; without ``run_decompositions``
    some calls write in place.
    """
    try:
        with torch.no_grad(), _quiet_torch():
            exported: torch.export.ExportedProgram = torch.export.export(
                module, args, named, dynamic_shapes=dynamic, strict=False
            ).run_decompositions({})
            return exported
    except Exception as error:
        if isinstance(error, ModelatheError):
            raise
        first = str(error).strip().partition("\n")[0]
        raise CaptureError(
            f"{name}: torch.export cannot follow it: {first}",
            remedy="see the whole trace with --debug; rewrite the construct, or fix the size "
            "that it depends on",
        ) from error


def _capture_plain(
    model: nn.Module,
    name: str,
    example_inputs: tuple[Tensor, ...] | Mapping[str, Tensor],
    dynamic_shapes: Any,
) -> Program:
    # A tensor that is given twice would be traced as one input.
    copies: Any = torch.utils._pytree.tree_map_only(Tensor, torch.clone, example_inputs)
    named = dict(copies) if isinstance(copies, Mapping) else None
    args = tuple(copies) if named is None else ()
    exported = _exported(model, args, dynamic_shapes, name, named)
    return _from_exported(exported, name, model)


def _from_exported(
    exported: torch.export.ExportedProgram, name: str, model: nn.Module | None
) -> Program:
    """Build a program of kind ``module``; sizes keep the names that the user gave them."""
    from .symbols import input_dims

    dims, dtypes = input_dims(exported)
    outputs = tuple(
        f"output_{i}" if len(exported.graph_signature.user_outputs) > 1 else "output"
        for i in range(len(exported.graph_signature.user_outputs))
    )
    program = Program({}, {}, Weights(), {}, Origin(name, "module"))
    signature = Signature(tuple(dims), outputs, dims)
    tied = tied_tensors(exported.state_dict) if model is None else tied_names(model)
    _add_graph(program, MAIN, exported, signature, dtypes, Sizes(), {}, tied)
    _note_aliases(program, tied)
    return program


def _note_aliases(program: Program, tied: Mapping[str, str]) -> None:
    program.weights.aliases = {
        alias: first for alias, first in tied.items() if alias != first and first in program.weights
    }


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_ASSERTS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")


def _add_graph(
    program: Program,
    name: str,
    exported: torch.export.ExportedProgram,
    signature: Signature,
    dtypes: Mapping[str, torch.dtype],
    sizes: Sizes,
    found: Mapping[str, Weight],
    tied: Mapping[str, str],
    prefix: str = "",
) -> None:
    """Copy an exported graph into ``program``: plain names, no assertions, no owning module."""
    with _quiet_torch():
        module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    inputs = iter(signature.inputs)
    for node in module.graph.nodes:
        if node.op == "call_module" and not node.users:
            continue  # a guard function
        if node.op == "call_function" and any(a in str(node.target) for a in _ASSERTS):
            continue
        if node.op == "output":
            flat, _ = torch.utils._pytree.tree_flatten(node.args[0])
            graph.output(tuple(values[result] for result in flat))
            continue
        copy = graph.node_copy(node, values.__getitem__)
        copy.meta = {"custom": {"modelathe": {"stack": _stack(node, prefix)}}}
        values[node] = copy
        if node.op == "placeholder":
            copy.target = next(inputs)
        elif node.target in _VIEWS:
            copy.target = torch.ops.aten.reshape.default  # the same values, whatever the strides
        elif node.op == "get_attr":
            weight = str(node.target).removeprefix(prefix)
            copy.target = _add_weight(program, _attribute(module, node), weight, found, tied)
    program.graphs[name] = graph
    program.signatures[name] = signature
    parameters = {text.removeprefix(prefix) for text in exported.graph_signature.parameters}
    parameters |= {tied[text] for text in parameters if text in tied}
    program.weights.buffers |= {name for name in program.weights if name not in parameters}
    program.clean()
    infer_graph(graph, signature, program.weights, dtypes, sizes)
    stamp(graph, signature)


def _stack(node: fx.Node, prefix: str) -> list[list[str]]:
    """Return the modules around a call, outermost first, as ``[path, instance, class]``."""
    stack = []
    for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        _, _, instance = key.partition("@")
        class_name = kind if isinstance(kind, str) else kind.__qualname__
        stack.append([path.removeprefix(prefix), instance, class_name.rpartition(".")[2]])
    return stack


def _attribute(module: fx.GraphModule, node: fx.Node) -> Tensor:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def _add_weight(
    program: Program,
    tensor: Tensor,
    name: str,
    found: Mapping[str, Weight],
    tied: Mapping[str, str],
) -> str:
    """Register the value of a ``get_attr`` node and return its name in the program."""
    name = tied.get(name, name)
    if name in program.weights:
        return name
    aliases = [name, *(alias for alias, first in tied.items() if first == name)]
    weight = next((found[alias] for alias in aliases if alias in found), None)
    if weight is None:
        if isinstance(tensor, FakeTensor):
            raise CaptureError(f"{name}: has no value in the model's files")
        return program.add_weight(name, TensorWeight(tensor))
    if weight.dtype != tensor.dtype:
        weight = cast(weight, tensor.dtype)
    return program.add_weight(name, weight)


def cast(weight: Weight, dtype: torch.dtype) -> Weight:
    """Return ``weight`` in another dtype, converted when it is loaded."""
    return ComputedWeight(f"cast {dtype}", (weight,), weight.shape, dtype, lambda t: t)
