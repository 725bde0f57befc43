"""A module to a ``Program``: traced by ``torch.export``, copied into plain graphs."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram

from .blocks import stamp
from .computed import cast
from .config import has_one_layer, with_length
from .errors import CaptureError, ModelatheError
from .infer import Sizes, infer_graph
from .mapping import tied_names, tied_tensors
from .program import MAIN, Origin, Program, Signature
from .watch import DECOMPOSE, INFER, TRACE, Watch
from .weights import TensorWeight, Weight, Weights
from .wrappers import EXAMPLE_LENGTH, Wrapped, model_kind, wrap


def trace_wrapped(
    model: Any,
    name: str,
    mode: FakeTensorMode | None,
    found: Mapping[str, Weight],
    config: dict[str, Any],
    watch: Watch,
) -> Program:
    """Trace each graph of a transformers model and put them over one table of weights.

    Args:
        model: the model, in evaluation mode.
        name: of the model, for messages and the program's origin.
        mode: the fake mode that its parameters live in, or None.
        found: weights by the names of parameters; what is missing must be real in the model.
        config: becomes the program's, with the longest sequence where only the modules tell.
        watch: is told of every step.
    """
    with torch.no_grad(), _without_empty_masks(), mode or contextlib.nullcontext():
        kind = model_kind(model)
        graphs = wrap(model)
        each = 1 / len(graphs)
        parts = {
            graph: (wrapped, _export(wrapped, name, watch, each))
            for graph, wrapped in graphs.items()
        }
    origin = Origin(name, kind)
    lengths = {wrapped.length for wrapped, _ in parts.values()} - {EXAMPLE_LENGTH}
    sizes = Sizes({"sequence": max(lengths)} if lengths else None)
    program = Program(
        {}, {}, Weights(), with_length(config, positions_behind_padding(model)), origin
    )
    tied = tied_names(model)
    for graph, (wrapped, exported) in parts.items():
        signature = Signature(tuple(wrapped.inputs), wrapped.outputs, dict(wrapped.inputs))
        dtypes = {n: wrapped.dtypes.get(n, torch.int64) for n in wrapped.inputs}
        with watch.stage(each * INFER):
            _add_graph(
                program, graph, exported, signature, dtypes, sizes, found, tied, prefix="model."
            )
    _note_aliases(program, tied)
    if unread := sorted(set(tied.values()) - set(program.weights)):
        note = f"not captured: {len(unread)} parameters that no graph reads, such as {unread[0]}"
        program.origin = replace(origin, notes=(note,))
    return program


def positions_behind_padding(model: nn.Module) -> int | None:
    """Return for how many tokens a table of positions that has a row for padding has others.

    RoBERTa and its kin count from behind that row on, and no key of a configuration says so.
    """
    limits = []
    for path, module in model.named_modules():
        padding: Any = getattr(module, "padding_idx", None)
        if padding is not None and "position" in path.rpartition(".")[2]:
            limits.append(len(module.get_parameter("weight")) - padding - 1)
    return min(limits, default=None)


@contextlib.contextmanager
def _without_empty_masks() -> Iterator[None]:
    """Have transformers leave masks out that mask nothing, as it does where nobody traces.

    Traced, it makes them even for a model that reads no mask.  A model that adds its mask, as BEiT
    does to the bias of its positions, would round otherwise.
    """
    from transformers import masking_utils as utils

    original = getattr(utils, "_ignore_bidirectional_mask_sdpa", None)
    if original is None:  # a transformers that does it otherwise: the bits may differ, no more
        yield
        return

    def ignored(padding_mask: Any, kv_length: Any, local_attention_size: Any = None) -> bool:
        if padding_mask is None and local_attention_size is None:
            return True
        return bool(original(padding_mask, kv_length, local_attention_size))

    utils._ignore_bidirectional_mask_sdpa = ignored
    try:
        yield
    finally:
        utils._ignore_bidirectional_mask_sdpa = original


def _export(wrapped: Wrapped, name: str, watch: Watch, share: float) -> ExportedProgram:
    example = wrapped.example()
    dynamic = [
        {axis: Dim.DYNAMIC for axis, dim in enumerate(dims) if isinstance(dim, str)}
        for dims in wrapped.inputs.values()
    ]
    return _exported(wrapped.module, (example,), (dynamic,), name, watch, share)


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Keep from the user what torch.export says about its own use of torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)
        yield


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector from walking again and again through all that a trace builds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _exported(
    module: nn.Module,
    args: tuple[Any, ...],
    dynamic: Any,
    name: str,
    watch: Watch,
    share: float = 1.0,
    named: dict[str, Any] | None = None,
) -> ExportedProgram:
    """Export functionally.

    Without ``no_grad`` rotary embeddings become a sub-graph call; without ``run_decompositions``
    some calls write in place.
    """
    try:
        with torch.no_grad(), quiet_torch(), _uncollected():
            with watch.tracing(share * TRACE, module):
                exported: ExportedProgram = torch.export.export(
                    module, args, named, dynamic_shapes=dynamic, strict=False
                )
            with watch.decomposing(share * DECOMPOSE, exported):
                decomposed: ExportedProgram = exported.run_decompositions({})
        return decomposed
    except Exception as error:
        if isinstance(error, ModelatheError):
            raise
        first = str(error).strip().partition("\n")[0]
        raise CaptureError(
            f"{name}: torch.export cannot follow it: {first}",
            remedy="see the whole trace with --debug; rewrite the construct, or fix the size "
            "that it depends on",
        ) from error


def trace_plain(
    model: nn.Module,
    name: str,
    example_inputs: tuple[Tensor, ...] | Mapping[str, Tensor],
    dynamic_shapes: Any,
    watch: Watch,
) -> Program:
    """Trace a module on inputs of the user's."""
    # A tensor that is given twice would be traced as one input.
    copies: Any = torch.utils._pytree.tree_map_only(Tensor, torch.clone, example_inputs)
    named = dict(copies) if isinstance(copies, Mapping) else None
    args = tuple(copies) if named is None else ()
    exported = _exported(model, args, dynamic_shapes, name, watch, named=named)
    with watch.stage(INFER):
        return program_of(exported, name, model)


def program_of(exported: ExportedProgram, name: str, model: nn.Module | None = None) -> Program:
    """Build a program of kind ``module``; sizes keep the names that the user gave them."""
    from .symbols import inputs_of, output_names

    inputs, outputs = inputs_of(exported), output_names(exported)
    signature = Signature(tuple(inputs.dims), outputs, inputs.dims, inputs.limits)
    tied = tied_tensors(exported.state_dict) if model is None else tied_names(model)

    def build(hints: dict[str, int]) -> Program:
        program = Program({}, {}, Weights(), {}, Origin(name, "module"))
        _add_graph(program, MAIN, exported, signature, inputs.dtypes, Sizes(hints), {}, tied)
        _note_aliases(program, tied)
        return program

    try:
        return build(inputs.told_apart())
    except CaptureError:  # sizes may depend on each other, as a window's does on what it is cut of
        return build(inputs.examples)


def _note_aliases(program: Program, tied: Mapping[str, str]) -> None:
    program.weights.aliases = {
        alias: first for alias, first in tied.items() if alias != first and first in program.weights
    }


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_ASSERTS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")


def _add_graph(
    program: Program,
    name: str,
    exported: ExportedProgram,
    signature: Signature,
    dtypes: Mapping[str, torch.dtype],
    sizes: Sizes,
    found: Mapping[str, Weight],
    tied: Mapping[str, str],
    prefix: str = "",
) -> None:
    """Copy an exported graph into ``program``: plain names, no assertions, no owning module."""
    with quiet_torch():
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
            graph.output(tuple(values[result] for result in flat if result is not None))
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
    try:
        infer_graph(graph, signature, program.weights, dtypes, sizes)
    except Exception as error:  # shape rules raise nearly anything
        first = str(error).strip().partition("\n")[0]
        raise CaptureError(
            f"{program.origin.model}: its shapes cannot be followed: {first}",
            remedy="see the whole trace with --debug; fix the size that it depends on",
        ) from error
    stamp(graph, signature, has_one_layer(program.config))


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
        checked = f"{program.origin.model}: {name}" if isinstance(tensor, nn.Parameter) else ""
        return program.add_weight(name, TensorWeight(tensor, finite=checked))
    return program.add_weight(name, cast(weight, tensor.dtype))
