"""Names for the outputs and the symbolic sizes of a user's own exported program."""

from __future__ import annotations

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument

from .errors import CaptureError


def output_names(exported: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Return ``output`` for a single tensor, else ``output_0`` and so on; None has no name.

    Raises:
        CaptureError: an output is neither a tensor nor None, or none is a tensor.
    """
    specs = exported.graph_signature.output_specs
    values = [spec.arg for spec in specs if spec.kind is OutputKind.USER_OUTPUT]
    kept = []
    for place, value in enumerate(values):
        if isinstance(value, TensorArgument):
            kept.append(place)
        elif not (isinstance(value, ConstantArgument) and value.value is None):
            raise CaptureError(
                f"output {place} is no tensor ({type(value).__name__})",
                remedy="return tensors only; what is constant needs no graph",
            )
    if not kept:
        raise CaptureError("the module returns no tensor", remedy="return at least one")
    return tuple(f"output_{place}" for place in kept) if len(kept) > 1 else ("output",)


def input_dims(
    exported: torch.export.ExportedProgram,
) -> tuple[dict[str, tuple[int | str, ...]], dict[str, torch.dtype]]:
    """Return sizes and dtype of every input; symbols are called ``d0``, ``d1`` ... in order.

    Raises:
        CaptureError: an input is no tensor, or a size is not a sum of symbols and numbers.
    """
    names = [
        spec.arg.name
        for spec in exported.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    ]
    values = {n.name: n.meta.get("val") for n in exported.graph.find_nodes(op="placeholder")}
    symbols: dict[str, str] = {}
    dims: dict[str, tuple[int | str, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name in names:
        value = values[name]
        if not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"input {name} is a {type(value).__name__}, not a tensor",
                remedy="make it a constant of the module",
            )
        dims[name] = tuple(_dim(size, symbols, name) for size in value.shape)
        dtypes[name] = value.dtype
    return dims, dtypes


def _dim(size: int | torch.SymInt, symbols: dict[str, str], name: str) -> int | str:
    if isinstance(size, int):
        return size
    terms = []
    for term in str(size).split("+"):
        factors = []
        for factor in term.split("*"):
            word = factor.strip()
            if not word.isidentifier() and not word.isdigit():
                raise CaptureError(
                    f"input {name} has the size {size}, which is not a sum of symbols",
                    remedy="give the size a dimension of its own in dynamic_shapes",
                )
            plain = word.isdigit()
            factors.append(word if plain else symbols.setdefault(word, f"d{len(symbols)}"))
        terms.append("*".join(factors))
    return " + ".join(terms)
