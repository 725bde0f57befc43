"""A program as text: stable, line-based, made to be diffed; and its fingerprint."""

from __future__ import annotations

import hashlib

import torch
from torch import fx
from torch.fx.node import Argument

from .blocks import marks_of
from .program import Program
from .weights import Weight

DTYPE_NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
}


class _Types:
    """Prints types, numbering symbolic sizes ``d0, d1, ...`` in order of appearance."""

    def __init__(self) -> None:
        self._sizes: dict[str, str] = {}

    def _size(self, size: int | torch.SymInt) -> str:
        text = str(size)
        return text if text.isdigit() else self._sizes.setdefault(text, f"d{len(self._sizes)}")

    def __call__(self, value: object) -> str:
        """Return ``f32[d0, 8]`` for a tensor, or the Python type's name."""
        if isinstance(value, torch.Tensor | Weight):
            name = DTYPE_NAMES.get(value.dtype, str(value.dtype))
            return f"{name}[{', '.join(map(self._size, value.shape))}]"
        if isinstance(value, tuple | list):
            return f"({', '.join(map(self, value))})"
        return type(value).__name__


def _arg_text(arg: Argument) -> str:
    if isinstance(arg, fx.Node):
        return f"@{arg.target}" if arg.op == "get_attr" else f"%{arg.name}"
    if isinstance(arg, list | tuple):
        return f"[{', '.join(_arg_text(a) for a in arg)}]"
    return "none" if arg is None else str(arg).removeprefix("torch.")


def call_name(node: fx.Node) -> str:
    """Return the operator's name as the text form has it, such as ``aten.linear``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def graph_text(program: Program, name: str) -> str:
    """Print one graph, one line per input, weight and call, in graph order."""
    lines = []
    printed: set[object] = set()
    type_text = _Types()
    signature = program.signatures[name]
    inputs = iter(signature.inputs)
    for node in program.graphs[name].nodes:
        if node.op == "placeholder":
            lines.append(f"input %{node.name} {next(inputs)}: {type_text(node.meta['val'])}")
        elif node.op == "get_attr" and node.target not in printed:
            printed.add(node.target)
            lines.append(f"weight @{node.target}: {type_text(program.weight(node))}")
        elif node.op == "call_function":
            args = [_arg_text(a) for a in node.args]
            args += [f"{k}={_arg_text(v)}" for k, v in node.kwargs.items()]
            head = f"%{node.name} = {call_name(node)}({', '.join(args)})"
            marks = "".join(f" !{key}={text}" for key, text in sorted(marks_of(node).items()))
            lines.append(f"{head}: {type_text(node.meta['val'])}{marks}")
        elif node.op == "output":
            pairs = zip(signature.outputs, node.args[0], strict=True)
            lines.append("return " + ", ".join(f"{n}=%{value.name}" for n, value in pairs))
    return "\n".join(lines) + "\n"


def to_text(program: Program) -> str:
    """Print every graph of ``program``; a graph that is not alone is headed by its name."""
    if len(program.graphs) == 1:
        return graph_text(program, next(iter(program.graphs)))
    return "\n".join(f"graph {n}:\n{graph_text(program, n)}" for n in program.graphs)


def fingerprint(program: Program) -> str:
    """Return a hash that differs when a graph's text or any weight may differ; reads no bytes."""
    digest = hashlib.sha256(to_text(program).encode())
    for name in sorted(program.weights):
        digest.update(f"\n{name} {program.weights[name].fingerprint}".encode())
    return digest.hexdigest()[:32]
