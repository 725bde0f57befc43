"""Names for the outputs and the symbolic sizes of a user's own exported program."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument

from .dims import Dims, Limits
from .errors import CaptureError
from .infer import learn

_ENDLESS = 2**62


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


@dataclass(frozen=True, slots=True)
class Inputs:
    """Sizes and dtypes of a program's inputs, and what is known of each symbolic size.

    Symbols are called ``d0``, ``d1`` ... in order.

    Attributes:
        dims: the sizes of every input.
        dtypes: the dtype of every input.
        examples: values of the symbols in the inputs that the program was exported with.
        limits: the smallest and largest value of symbols.
    """

    dims: dict[str, Dims]
    dtypes: dict[str, torch.dtype]
    examples: dict[str, int]
    limits: dict[str, Limits]

    def told_apart(self) -> dict[str, int]:
        """Return the examples with multiples for equal ones, so that no two look equal by accident.

        A multiple is as large as the example at least, and divides by whatever it does.
        """
        made: dict[str, int] = {}
        for name, size in self.examples.items():
            _, high = self.limits.get(name, (0, None))
            free = (size * k for k in range(1, len(made) + 2) if size * k not in made.values())
            multiple = next(free)
            made[name] = multiple if high is None or multiple <= high else size
        return made


def inputs_of(exported: torch.export.ExportedProgram) -> Inputs:
    """Return what is known of every input.

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
    found = Inputs({}, {}, {}, {})
    for name in names:
        value = values[name]
        if not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"input {name} is a {type(value).__name__}, not a tensor",
                remedy="make it a constant of the module",
            )
        found.dims[name] = tuple(_dim(size, symbols, name) for size in value.shape)
        found.dtypes[name] = value.dtype
        for size, dim in zip(value.shape, found.dims[name], strict=True):
            if isinstance(size, torch.SymInt) and size.node.hint is not None:
                learn(str(dim), int(size.node.hint), found.examples)
    for symbol, bounds in exported.range_constraints.items():
        if str(symbol) in symbols:
            # torch writes the largest of its numbers where there is no largest
            high = int(bounds.upper) if bounds.upper < _ENDLESS else None
            found.limits[symbols[str(symbol)]] = int(bounds.lower), high
    return found


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
