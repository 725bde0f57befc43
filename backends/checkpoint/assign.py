"""The value of each parameter of an architecture, from the weights that play its parts."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...ir import ComputedWeight, LoweringError, Program, TensorWeight, Weight
from .align import Alignment, Source

SOLVED = "solve"  # how rules begin whose result is rounded


@dataclass(slots=True)
class Assignment:
    """Values of parameters.

    Attributes:
        values: of each parameter.
        rivals: parameters that would need several values, with the weights that hold them.
        copies: weights of the program that several parameters would hold, with those parameters.
    """

    values: dict[str, Weight] = field(default_factory=dict)
    rivals: dict[str, list[str]] = field(default_factory=dict)
    copies: dict[str, list[str]] = field(default_factory=dict)


def assign(
    program: Program, architecture: Program, canonical: Program, alignment: Alignment
) -> Assignment:
    """Give each parameter that the graphs of ``architecture`` read its value.

    Args:
        program: where the values come from.
        architecture: as it was captured, its parameters unset.
        canonical: the same in canonical form.
        alignment: of ``program`` and ``canonical``.

    Raises:
        LoweringError: what the architecture computes from a parameter cannot be undone.
    """
    solver = _Solver(architecture)
    for name, sources in alignment.weights.items():
        for source in sources:
            solver.solve(canonical.weights[name], *_given(program, canonical, name, source))
    return solver.result()


def _given(program: Program, canonical: Program, name: str, source: Source) -> tuple[Weight, str]:
    if isinstance(source, str):
        return program.weights[source], source
    shape, dtype = canonical.weights[name].shape, canonical.weights[name].dtype
    fill = f"fill {source:g}"
    made = ComputedWeight(fill, (), shape, dtype, lambda: torch.full(shape, source, dtype=dtype))
    return made, fill


@dataclass(frozen=True, slots=True)
class _Value:
    """A value of a parameter: fitted to it, as it was given, and what it comes from."""

    fitted: Weight
    given: Weight
    source: str


class _Solver:
    def __init__(self, architecture: Program) -> None:
        weights = architecture.weights
        self.names = {id(weights[name]): name for name in weights}
        self.found: dict[str, list[_Value]] = {}
        self.undone: dict[tuple[int, str], Weight | None] = {}

    def solve(self, wanted: Weight, given: Weight, source: str) -> None:
        """Find the parameters with which ``wanted`` has the value of ``given``."""
        name = self.names.get(id(wanted))
        if isinstance(wanted, TensorWeight):
            return self._compare(wanted, given, name, source)
        if name is not None:
            value = _Value(_fitting(given, wanted, name), given, source)
            return self.found.setdefault(name, []).append(value)
        assert isinstance(wanted, ComputedWeight)
        if isinstance(given, ComputedWeight) and _alike(wanted, given):
            for part, other in zip(wanted.inputs, given.inputs, strict=True):
                self.solve(part, other, source)
            return None
        key = (id(given), wanted.rule)  # one object each, so that a shared value is seen to be
        if key not in self.undone:
            self.undone[key] = undo(wanted, given)
        undone = self.undone[key]
        if undone is None:
            raise LoweringError(
                f"@{source}: the architecture computes it ({wanted.rule}), and no parameter is "
                "known that gives the new value",
                remedy="leave out the pass that changes it, or write --to program",
            )
        return self.solve(wanted.inputs[0], undone, source)

    def _compare(self, wanted: Weight, given: Weight, name: str | None, source: str) -> None:
        """Check that a value that no file holds is the program's too.

        Raises:
            LoweringError: it is not.
        """
        ours, theirs = given.load(), wanted.load()
        narrow = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        if ours.shape != theirs.shape or not torch.equal(ours.to(narrow), theirs.to(narrow)):
            raise LoweringError(
                f"@{source}: the architecture makes {name or 'it'} itself, with other values",
                remedy="leave out the pass that changes it, or write --to program",
            )

    def result(self) -> Assignment:
        made = Assignment()
        holders: dict[int, tuple[str, list[str]]] = {}
        for name, values in self.found.items():
            if len({value.given.fingerprint for value in values}) > 1:
                made.rivals[name] = list(dict.fromkeys(value.source for value in values))
            made.values[name] = values[0].fitted
            holders.setdefault(id(values[0].given), (values[0].source, []))[1].append(name)
        made.copies = {source: names for source, names in holders.values() if len(names) > 1}
        return made


def _alike(wanted: ComputedWeight, given: ComputedWeight) -> bool:
    same = (wanted.rule, wanted.shape) == (given.rule, given.shape)
    return same and len(wanted.inputs) == len(given.inputs)


def _fitting(given: Weight, wanted: Weight, name: str) -> Weight:
    """Return a weight in the dtype of its parameter.

    Raises:
        LoweringError: it has a wider one.
    """
    if given.dtype == wanted.dtype:
        return given
    if torch.promote_types(given.dtype, wanted.dtype) == wanted.dtype:
        widened = (given,)
        return ComputedWeight("widen", widened, given.shape, wanted.dtype, lambda t: t, keep=False)
    raise LoweringError(
        f"{name} is {_plain(given.dtype)}, and from_pretrained would make it "
        f"{_plain(wanted.dtype)} like the others",
        remedy="add convert-dtype at the end of the pipeline, so that all weights have one dtype",
    )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def undo(wanted: ComputedWeight, given: Weight) -> Weight | None:
    """Return the input with which the rule of ``wanted`` gives ``given``.

    The rule is tried on a small tensor: it may move dimensions, or multiply by one number and add
    another one.  None for any other rule.
    """
    if len(wanted.inputs) != 1:
        return None
    (inner,) = wanted.inputs
    rank = len(inner.shape)
    sizes = (2, 3, 5, 7, 11)[:rank]
    if len(sizes) != rank or not rank:
        return None
    count = math.prod(sizes)
    sample = (torch.arange(count, dtype=torch.float64) - count // 3).reshape(sizes)
    result = wanted.function(sample)
    inverse = _permutation(sample, result) or _line(sample, result)
    if inverse is None:
        return None
    verb, function = inverse
    rule = f"{verb} {wanted.rule}"
    return ComputedWeight(rule, (given,), inner.shape, inner.dtype, function, keep=False)


Inverse = tuple[str, Callable[[Tensor], Tensor]]


def _permutation(sample: Tensor, result: Tensor) -> Inverse | None:
    for order in itertools.permutations(range(sample.dim())):
        moved = sample.permute(order)
        if result.shape == moved.shape and torch.equal(result, moved):
            back = sorted(range(len(order)), key=order.__getitem__)
            return "move back", functools.partial(torch.permute, dims=back)
    return None


def _line(sample: Tensor, result: Tensor) -> Inverse | None:
    if result.shape != sample.shape:
        return None
    first, last = sample.flatten()[[0, -1]].tolist()
    low, high = result.flatten()[[0, -1]].tolist()
    slope = (high - low) / (last - first)
    offset = low - slope * first
    if slope == 0 or not torch.allclose(result, slope * sample + offset, rtol=1e-12, atol=0):
        return None
    return SOLVED, lambda tensor: (tensor.double() - offset) / slope
