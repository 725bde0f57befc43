"""Compute in another dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from ...ir import (
    ComputedWeight,
    PassError,
    Program,
    Weight,
    Weights,
    converted,
    kept_calls,
    main_dtype,
    stored_bytes,
)
from ...ir.weights import DTYPES
from ..base import Fidelity, Pass, PassResult, Remark
from ..blame import first_wrong_node, place_of
from ..context import PassContext
from ..fidelity import EXACT, relative_error
from ..probes import Inputs, dtype_of, probes


@dataclass(frozen=True, kw_only=True)
class ConvertDtype(Pass):
    """Store weights and compute in another floating-point dtype.

    W' = round(W) for every weight, to the nearest number of the new dtype, when it is loaded.
    Calls, floating-point inputs (pixels, the cache) and outputs (logits) follow.  Tied weights stay
    tied, codes of quantised weights stay as they are.

    - What is made of whole numbers and vectors only, such as rotary angles, stays in float32 until
      it meets an activation: bfloat16 has no number for position 257.
    - A model stored in float16 or bfloat16 computes some things in float32 on purpose.  Those stay
      when it is converted to the other one.
    - Constants beyond the range, as masks have them, become the largest number of the dtype.
    - ``keep`` makes calls compute in float32, with conversions around them: ``norms`` means layer,
      RMS, group and batch norms, ``softmax`` softmax and attention.

    Refuses, as an error: a weight that has a finite number beyond the range of float16, and a
    value that overflows on small random inputs.  ``missed``: a program that computes in the dtype
    already, and a ``keep`` that no call answers to.

    Source: the definitions of the formats (IEEE 754-2019 binary16; bfloat16 is the upper half of
    binary32).

    Attributes:
        to: the dtype.
        keep: kinds of calls that compute in float32 nevertheless.
    """

    name: ClassVar[str] = "convert-dtype"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    to: Literal["float32", "float16", "bfloat16"]
    keep: tuple[Literal["norms", "softmax"], ...] = ()

    def __post_init__(self) -> None:
        if self.to not in DTYPES:
            raise ValueError(f"to is one of {', '.join(DTYPES)}, got {self.to!r}")
        for kind in self.keep:
            if kind not in ("norms", "softmax"):
                raise ValueError(f"keep takes norms and softmax, got {kind!r}")

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.to]

    def run(self, program: Program, context: PassContext) -> PassResult:
        source = main_dtype(program)
        made = converted(program, self._dtype, self.keep)
        changed = [made.weights[name] for name in made.weights if name not in program.weights]
        if not changed and source == self._dtype:
            return PassResult(program, (Remark("missed", "program", f"is in {self.to} already"),))
        remarks = []
        for kind in self.keep:
            calls = kept_calls(program, kind)
            if calls:
                text = f"{len(calls)} calls compute in float32"
                remarks.append(Remark("applied", f"keep={kind}", text))
            else:
                remarks.append(Remark("missed", f"keep={kind}", "no call is one of those"))
        before, after = (stored_bytes(p) for p in (program, made))
        text = f"{len(changed)} weights converted to {self.to}, {before} -> {after} bytes"
        remarks.append(Remark("applied", "program", text))
        return PassResult(made, tuple(remarks))

    def ensures(self, before: Program, after: Program) -> None:
        """Check each weight, the dtypes of inputs and outputs, the calls, and for overflow.

        The calls are checked in float64, where conversions do nothing: with the weights of
        ``before`` they must give its outputs.

        Raises:
            PassError: a weight is not the rounded old one, a call is wrong, or a value overflows.
        """
        originals = _originals(before, after)
        for name, old in originals.items():
            _check_cast(name, old, after.weights[name])
        _check_ends(before, after, self._dtype)
        rebound = replace(after, weights=Weights(originals))
        for graph, inputs in probes(before):
            if any(bool((v == 0).any()) for name, v in inputs.items() if "mask" in name):
                continue  # where all is masked, attention sees how large the mask's number is
            _check_calls(before, rebound, graph, inputs)
            _check_finite(before, after, graph, inputs)


def _originals(before: Program, after: Program) -> dict[str, Weight]:
    """Return the old weight behind each weight.

    Raises:
        PassError: a weight is no conversion of an old one.
    """
    known = {before.weights[name].fingerprint: before.weights[name] for name in before.weights}
    found = {}
    for name in after.weights:
        weight = after.weights[name]
        if weight.fingerprint not in known and isinstance(weight, ComputedWeight):
            (weight,) = weight.inputs
        if weight.fingerprint not in known:
            raise PassError(f"@{name}: is not a conversion of a weight that there was")
        found[name] = known[weight.fingerprint]
    return found


def _check_cast(name: str, old: Weight, new: Weight) -> None:
    if new.dtype == old.dtype:
        return
    # What is computed is rounded once, to the new dtype where that is the wider one.
    widened = old.dtype.is_floating_point and new.dtype.itemsize > old.dtype.itemsize
    expected, found = old.load(new.dtype if widened else None), new.load()
    if expected.dim() == 0 and bool(expected.isfinite()):
        limit = torch.finfo(new.dtype).max
        expected = expected.double().clamp(-limit, limit)
    if not torch.equal(expected.to(new.dtype).nan_to_num(7.0), found.nan_to_num(7.0)):
        raise PassError(f"@{name}: is not the old weight rounded to {new.dtype}")


def _check_ends(before: Program, after: Program, dtype: torch.dtype) -> None:
    """Check that inputs and outputs that were in the main dtype are in the new one."""
    main = main_dtype(before)
    for name, graph in after.graphs.items():
        for old, new in zip(_ends(before.graphs[name]), _ends(graph), strict=True):
            was, now = old.meta["val"].dtype, new.meta["val"].dtype
            if now != (dtype if was == main else was) and now != dtype:
                raise PassError(f"%{new.name}: is {now}, and was {was}")


def _ends(graph: fx.Graph) -> list[fx.Node]:
    return [*graph.find_nodes(op="placeholder"), *graph.output_node().all_input_nodes]


def _check_calls(before: Program, rebound: Program, graph: str, inputs: Inputs) -> None:
    expected = before.run(inputs, graph, dtype=torch.float64)
    found = rebound.run(inputs, graph, dtype=torch.float64)
    for name, value in expected.items():
        error = relative_error(value, found[name])
        if error > EXACT:
            node = first_wrong_node(before, rebound, graph, inputs, torch.float64, EXACT)
            raise PassError(
                f"output {name} is off by {error:.2g} of its largest value with the old weights in "
                f"float64{f', first wrong at {node}' if node else ''}",
                remedy="this is a defect of the pass: leave it out, and report it",
            )


def _check_finite(before: Program, after: Program, graph: str, inputs: Inputs) -> None:
    """Check that no output is infinite or nan that was not so before."""
    given = {name: value.to(dtype_of(after, graph, name)) for name, value in inputs.items()}
    overflows: list[str] = []

    def watch(node: fx.Node, value: object) -> None:
        if node.op == "call_function" and not overflows and _has_infinite(value):
            overflows.append(place_of(node))

    found = after.run(given, graph, observe=watch)
    if all(bool(value.isfinite().all()) for value in found.values()):
        return
    expected = before.run(inputs, graph)
    for name, value in found.items():
        if bool((expected[name].isfinite() & ~value.isfinite()).any()):
            place = f", first infinite at {overflows[0]}" if overflows else ""
            raise PassError(
                f"output {name} overflows {value.dtype}{place}",
                remedy="convert to bfloat16, which has the range of float32",
            )


def _has_infinite(value: object) -> bool:
    return isinstance(value, Tensor) and bool(value.isinf().any())
