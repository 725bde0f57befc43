"""Symbolic sizes as ONNX values: each size of the graph is computed once, from the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch.utils._sympy import functions as torch_sympy

from .builder import Builder

Size = int | torch.SymInt
Expression = Any  # a sympy expression; sympy has no types


class UnknownSizeError(Exception):
    """A size depends on data, or on a function that has no translation."""


def expression(size: Size) -> Expression:
    """Return a size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


class Sizes:
    """The sizes of one graph.

    A size is kept as a row of one ``int64``, which is what shapes are joined from, and made a
    scalar only where an operator wants one.

    Args:
        builder: where nodes go.
        names: what to call each symbol.
    """

    def __init__(self, builder: Builder, names: Mapping[Expression, str]) -> None:
        self._builder = builder
        self._names = dict(names)
        self._rows: dict[Expression, ir.Value] = {}
        self._scalars: dict[Expression, ir.Value] = {}
        self._shapes: dict[tuple[Expression, ...], ir.Value] = {}
        self._sources: dict[Expression, tuple[ir.Value, int]] = {}

    def bind(self, value: ir.Value, dims: Sequence[Size]) -> None:
        """Note that ``value`` has these sizes at run time; the first to have a size gives it."""
        for axis, dim in enumerate(dims):
            if isinstance(dim, torch.SymInt) and not expression(dim).is_Integer:
                self._sources.setdefault(expression(dim), (value, axis))

    def remember(self, size: Size, row: ir.Value) -> None:
        """Note the value of a size that was computed otherwise."""
        self._rows.setdefault(expression(size), row)

    def text(self, size: Size) -> int | str:
        """Return a size as a number, or a text of named sizes such as ``past + sequence``."""
        made = expression(size)
        if made.is_Integer:
            return int(made)
        names = {s: sympy.Symbol(self._names.get(s, str(s))) for s in made.free_symbols}
        return str(made.xreplace(names))

    def may_be_zero(self, size: Size) -> bool:
        """Tell whether a size can be 0: that of an empty cache can, a batch cannot."""
        made = expression(size)
        empty = {
            s: 0 for s in made.free_symbols if self._names.get(s, "").startswith(("past", "?"))
        }
        return bool(made == 0 or (empty and made.subs(empty) == 0))

    def row(self, size: Size) -> ir.Value:
        """Return a size as ``int64[1]``.

        Raises:
            UnknownSizeError: it cannot be computed from what was bound.
        """
        return self._row(expression(size))

    def scalar(self, size: Size) -> ir.Value:
        """Return a size as an ``int64`` scalar."""
        made = expression(size)
        if made.is_Integer:
            return self._builder.constant(int(made), ir.DataType.INT64)
        if made not in self._scalars:
            axis = self._builder.ints(0)
            self._scalars[made] = self._builder.op("Squeeze", self._row(made), axis)
        return self._scalars[made]

    def shape(self, sizes: Sequence[Size]) -> ir.Value:
        """Return several sizes as one ``int64[n]``."""
        made = tuple(expression(size) for size in sizes)
        if all(part.is_Integer for part in made):
            return self._builder.ints(*(int(part) for part in made))
        if made not in self._shapes:
            rows = [self._row(part) for part in made]
            joined = self._builder.op("Concat", *rows, axis=0) if len(rows) > 1 else rows[0]
            self._shapes[made] = joined
        return self._shapes[made]

    def reshape_target(self, before: Sequence[Size], after: Sequence[Size]) -> ir.Value:
        """Return what a ``Reshape`` from sizes ``before`` to sizes ``after`` takes as its shape.

        A constant where 0 (the same size as before) and one -1 (what is left) can say it: no
        node has to run then.  -1 is not used beside a size that may be 0, where it has no meaning.
        """
        was = [expression(size) for size in before]
        wanted: list[int] = []
        unknown = 0
        for axis, size in enumerate(after):
            made = expression(size)
            if made.is_Integer and int(made) > 0:
                wanted.append(int(made))
            elif axis < len(was) and was[axis] == made:
                wanted.append(0)
            else:
                unknown += 1
                wanted.append(-1)
        others = [size for size, want in zip(after, wanted, strict=True) if want != -1]
        if unknown == 0 or (unknown == 1 and not any(self.may_be_zero(size) for size in others)):
            return self._builder.ints(*wanted)
        return self.shape(after)

    def _row(self, made: Expression) -> ir.Value:
        if made.is_Integer:
            return self._builder.ints(int(made))
        if made not in self._rows:
            if made in self._sources:
                value, axis = self._sources[made]
                self._rows[made] = self._builder.op(
                    "Shape", value, start=axis, end=axis + 1, dtype=ir.DataType.INT64
                )
            else:
                self._rows[made] = self._compute(made)
        return self._rows[made]

    def _compute(self, made: Expression) -> ir.Value:
        rule = _RULES.get(made.func)
        if rule is None:
            raise UnknownSizeError(str(made))
        return rule(self._builder, [self._row(part) for part in made.args])


def floor_divide(builder: Builder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Return ``a // b`` on integers, rounded towards minus infinity as Python does."""
    rest = builder.op("Mod", a, b)  # has the sign of b
    return builder.op("Div", builder.op("Sub", a, rest), b)


def _fold(kind: str) -> Callable[[Builder, list[ir.Value]], ir.Value]:
    def rule(builder: Builder, parts: list[ir.Value]) -> ir.Value:
        total = parts[0]
        for part in parts[1:]:
            total = builder.op(kind, total, part)
        return total

    return rule


_RULES: dict[Any, Callable[[Builder, list[ir.Value]], ir.Value]] = {
    sympy.Add: _fold("Add"),
    sympy.Mul: _fold("Mul"),
    sympy.Max: _fold("Max"),
    sympy.Min: _fold("Min"),
    torch_sympy.Max: _fold("Max"),
    torch_sympy.Min: _fold("Min"),
    torch_sympy.Mod: _fold("Mod"),
    torch_sympy.PythonMod: _fold("Mod"),
    torch_sympy.CleanDiv: _fold("Div"),
    torch_sympy.FloorDiv: lambda builder, parts: floor_divide(builder, parts[0], parts[1]),
}
