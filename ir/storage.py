"""Save and load a program: our own JSON of nodes beside one safetensors file; no pickle."""

from __future__ import annotations

import json
import math
import operator
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from .errors import CaptureError, StorageError
from .files import ALIGNMENT, SAFETENSORS_DTYPES, FileWeight, SafetensorsFile
from .infer import Sizes, infer_graph, size_hints
from .program import Origin, Program, Signature
from .watch import Report, Watch
from .weights import Weight, Weights, bytes_of, is_finite

PROGRAM_FILE = "program.json"
WEIGHTS_FILE = "weights.safetensors"
FORMAT_VERSION = 1

# What a graph may call besides operators: arithmetic on sizes, and ``getitem``.  Everything else in
# these modules is refused: a file must not be able to name ``operator.methodcaller``.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            *("getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "abs", "index"),
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in dir(torch)
        if name.startswith(("sym_", "_sym_"))
    },
}
_NAMESPACES = ("aten", "modelathe", "prims")
_KINDS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def is_program_folder(folder: Path) -> bool:
    """Tell whether ``folder`` holds a saved program."""
    return (folder / PROGRAM_FILE).is_file()


def save_program(
    program: Program, folder: Path, written: Callable[[str, Tensor], None] | None = None
) -> None:
    """Write ``program`` into an existing folder, one weight at a time.

    Args:
        program: what to write.
        folder: where; ``program.json`` and ``weights.safetensors`` are replaced.
        written: called with each weight's name and value while it is in memory.
    """
    weights = program.weights
    endless: list[str] = []

    def seen(name: str, tensor: Tensor) -> None:
        if not is_finite(tensor):
            endless.append(name)
        if written is not None:
            written(name, tensor)

    write_safetensors(folder / WEIGHTS_FILE, [(name, weights[name]) for name in weights], seen)
    description = {
        "format": "modelathe-program",
        "format_version": FORMAT_VERSION,
        "origin": _encode_origin(program.origin),
        "config": program.config,
        "aliases": weights.aliases,
        "buffers": sorted(weights.buffers),
        "fingerprints": {name: weights[name].fingerprint for name in weights},
        "not_finite": endless,
        "graphs": {name: _encode_graph(program, name) for name in program.graphs},
    }
    text = json.dumps(description, indent=1)
    (folder / PROGRAM_FILE).write_text(text + "\n", encoding="utf-8")


def load_program(
    folder: Path, report: Report | None = None, *, allow_pickle: bool = False
) -> Program:
    """Read a program that ``save_program`` wrote; weights stay unread.

    Args:
        folder: where it was written.
        report: called with the share of the work that is done, 0 to 1, as it grows.
        allow_pickle: let the untouched model behind it be captured from pickled files, a factory
            or the hub.

    Raises:
        StorageError: a file is missing, damaged, or of another version.
    """
    path = folder / PROGRAM_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if description["format_version"] != FORMAT_VERSION:
            raise StorageError(
                f"{path}: has format version {description['format_version']}, this is "
                f"version {FORMAT_VERSION}",
                remedy="run the pipeline again with this version of modelathe",
            )
        return _decode_program(folder, description, Watch(report), allow_pickle)
    except StorageError:
        raise
    except Exception as error:  # a damaged graph makes shape rules raise nearly anything
        raise StorageError(
            f"{path}: is not a saved program ({type(error).__name__}: {error})",
            remedy="write it again with --to program",
        ) from error


def _decode_program(
    folder: Path, description: dict[str, Any], watch: Watch, allow_pickle: bool
) -> Program:
    from . import ops as _ops  # noqa: F401  (registers our operators, which graphs may name)

    file = SafetensorsFile(folder / WEIGHTS_FILE)
    prints = description["fingerprints"]
    endless = set(description["not_finite"])
    table: dict[str, Weight] = {
        key: FileWeight(file, key, prints[key], finite=key not in endless) for key in file.keys
    }
    weights = Weights(table, description["aliases"], description["buffers"])
    origin = _decode_origin(description["origin"], folder, allow_pickle)
    program = Program({}, {}, weights, description["config"], origin)
    contents = description["graphs"]
    sizes = Sizes({k: v for content in contents.values() for k, v in content["hints"].items()})
    for name, content in contents.items():
        dims = {n: tuple(d) for n, d in content["dims"].items()}
        limits = {n: (low, high) for n, (low, high) in content.get("limits", {}).items()}
        signature = Signature(tuple(content["inputs"]), tuple(content["outputs"]), dims, limits)
        graph = _decode_graph(content["nodes"])
        dtypes = {n: getattr(torch, d) for n, d in content["dtypes"].items()}
        with watch.stage(1 / len(contents), len(graph.nodes)) as step:
            infer_graph(graph, signature, weights, dtypes, sizes, step)
        program.graphs[name], program.signatures[name] = graph, signature
    return program


def write_safetensors(
    path: Path,
    weights: Iterable[tuple[str, Weight]],
    written: Callable[[str, Tensor], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights to one safetensors file, holding one of them in memory at a time.

    The format has no gaps, so weights whose sizes are multiples of the alignment come first: they
    can then be mapped without a copy.
    """
    entries = sorted(weights, key=lambda entry: entry[1].bytes % ALIGNMENT != 0)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, weight in entries:
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, offset + weight.bytes],
        }
        offset += weight.bytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, weight in entries:
            tensor = weight.load()
            if written is not None:
                written(name, tensor)
            if tensor.numel():
                file.write(bytes_of(tensor))


def _encode_graph(program: Program, name: str) -> dict[str, Any]:
    signature, graph = program.signatures[name], program.graphs[name]
    placeholders = graph.find_nodes(op="placeholder")
    dtypes = {str(n.target): _plain(n.meta["val"].dtype) for n in placeholders}
    return {
        "inputs": signature.inputs,
        "outputs": signature.outputs,
        "dims": signature.dims,
        "hints": size_hints(graph, signature),
        "limits": signature.limits,
        "dtypes": dtypes,
        "nodes": [_encode_node(node) for node in graph.nodes],
    }


def _encode_node(node: fx.Node) -> dict[str, Any]:
    encoded: dict[str, Any] = {"op": node.op, "name": node.name, "target": _target_text(node)}
    if node.args:
        encoded["args"] = [_encode(arg) for arg in node.args]
    if node.kwargs:
        encoded["kwargs"] = {key: _encode(value) for key, value in node.kwargs.items()}
    if custom := node.meta.get("custom"):
        encoded["custom"] = custom
    return encoded


def _target_text(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return f"ops.{target}"
    for name, function in _FUNCTIONS.items():
        if function is target:
            return name
    raise StorageError(f"%{node.name}: {target} cannot be written to a file")


def _plain(value: object) -> str:
    return str(value).removeprefix("torch.")


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        items = [_encode(item) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in _KINDS.items():
        if isinstance(value, kind):
            return {name: _plain(value)}
    raise StorageError(f"an argument of type {type(value).__name__} cannot be written to a file")


def _decode_graph(nodes: list[dict[str, Any]]) -> fx.Graph:
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for encoded in nodes:
        args = tuple(_decode(arg, known) for arg in encoded.get("args", ()))
        kwargs = {key: _decode(value, known) for key, value in encoded.get("kwargs", {}).items()}
        target: Any = encoded["target"]
        if encoded["op"] == "call_function":
            target = _resolve(target)
        elif encoded["op"] not in ("placeholder", "get_attr", "output"):
            raise ValueError(f"a node of kind {encoded['op']}")
        node = graph.create_node(encoded["op"], target, args, kwargs, name=encoded["name"])
        if custom := encoded.get("custom"):
            node.meta["custom"] = custom
        known[encoded["name"]] = node
    return graph


def _resolve(text: str) -> Any:
    """Return the function a target names: a registered operator, or one on sizes.

    Raises:
        ValueError: the operator writes to its arguments or to a file, or is none that graphs call.
    """
    if text in _FUNCTIONS:
        return _FUNCTIONS[text]
    kind, *parts = text.split(".")
    if kind != "ops" or len(parts) != 3 or parts[0] not in _NAMESPACES:
        raise ValueError(f"a call of {text}")
    operator_: Any = torch.ops
    for part in parts:
        operator_ = getattr(operator_, part)
    if not isinstance(operator_, OpOverload) or parts[1] == "from_file":
        raise ValueError(f"a call of {text}")
    if operator_._schema.is_mutable:
        raise ValueError(f"a call of {text}, which writes in place")
    return operator_


def _decode(value: Any, known: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return known[content]
    if kind == "tuple":
        return tuple(_decode(item, known) for item in content)
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    if kind in _KINDS and isinstance(found := getattr(torch, content, None), _KINDS[kind]):
        return found
    raise ValueError(f"an argument {value}")


def _encode_origin(origin: Origin) -> dict[str, Any]:
    return {
        "model": origin.model,
        "kind": origin.kind,
        "folder": str(origin.folder) if origin.folder else None,
        "captured_from": str(origin.captured_from) if origin.captured_from else None,
        "passes": origin.passes,
        "notes": origin.notes,
        "source": origin.source,
        "record": dict(origin.record),
    }


def _decode_origin(encoded: dict[str, Any], saved: Path, allow_pickle: bool) -> Origin:
    """Return the origin of a program that lies in the folder ``saved``.

    Configuration and tokenizer were copied there; they serve where the source's own are gone.
    """
    folder = Path(encoded["folder"]) if encoded["folder"] else None
    # 0.1 wrote no ``captured_from``.
    source = encoded.get("captured_from", encoded["folder"] or encoded["model"])
    if source is not None and Path(source).is_absolute():
        source = Path(source)
    return Origin(
        encoded["model"],
        encoded["kind"],
        saved.resolve() if folder is not None and not folder.is_dir() else folder,
        tuple(encoded["passes"]),
        tuple(encoded["notes"]),
        encoded["source"],
        encoded["record"],
        recapture=None if source is None else partial(_recapture, saved, source, allow_pickle),
        captured_from=source,
        allow_pickle=allow_pickle,
    )


def _recapture(
    saved: Path, source: str | Path, allow_pickle: bool, report: Report | None
) -> Program:
    """Capture again what the program in the folder ``saved`` was made of.

    The folder may have come from anywhere, and it names the source: what would import code or
    fetch files is captured only where ``allow_pickle`` trusts it.

    Raises:
        CaptureError: it is gone, or not trusted, or cannot be captured.
    """
    from .capture import capture, kind_of

    if isinstance(source, Path) and not source.exists():
        raise CaptureError(
            f"the untouched model behind {saved}, {source}, is gone",
            remedy="put it back; or go on without comparing anything with it: --no-check",
        )
    if not allow_pickle and (kind := kind_of(source)) in ("factory", "hub"):
        danger = "can run any code" if kind == "factory" else "would be fetched from the hub"
        raise CaptureError(
            f"{saved} says that the untouched model behind it is {source}, which {danger}",
            remedy="trust it with --allow-pickle; or go on without comparing anything with it: "
            "--no-check",
        )
    return capture(source, allow_pickle=allow_pickle, report=report)
