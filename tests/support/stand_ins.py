"""Passes that do one simple thing, right or wrong: what a pipeline is tried with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from modelathe.ir import Linear, PassError, Program
from modelathe.passes import Fidelity, Pass, PassContext, PassResult, Remark


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiplies the weight of the first linear: another function on purpose."""

    name: ClassVar[str] = "scale"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    factor: float = 1.5

    def run(self, program: Program, context: PassContext) -> PassResult:
        view = next(view for node in program.graph.nodes if (view := Linear.match(node)))
        name = program.add_weight("scaled", program.weight(view.weight).load() * self.factor)
        node = program.weight_node(program.graph, name, before=view.node)
        view.set_weights(node, view.bias)
        return PassResult(program, (Remark("applied", view.node.name, "scaled"),))


@dataclass(frozen=True, kw_only=True)
class Idle(Pass):
    """Does nothing, and says what it looked at."""

    name: ClassVar[str] = "idle"
    fidelity: ClassVar[Fidelity] = Fidelity.BITWISE

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program, (Remark("missed", "main", "nothing to do"),))


@dataclass(frozen=True, kw_only=True)
class Failing(Idle):
    """Raises something of its own."""

    name: ClassVar[str] = "failing"

    def run(self, program: Program, context: PassContext) -> PassResult:
        raise KeyError("of its own")


@dataclass(frozen=True, kw_only=True)
class Claims(Scale):
    """Claims that nothing changes, and refuses models without a norm."""

    name: ClassVar[str] = "claims"

    def requires(self, program: Program) -> None:
        if not any("norm" in name for name in program.weights):
            raise PassError("claims: there is no norm", remedy="use another model")

    def ensures(self, before: Program, after: Program) -> None:
        raise PassError("claims: the result is not what it should be")


@dataclass(frozen=True, kw_only=True)
class AddsOutput(Idle):
    """Returns a value twice, and does not declare it."""

    name: ClassVar[str] = "adds-output"

    def run(self, program: Program, context: PassContext) -> PassResult:
        result = program.graph.output_node()
        (values,) = result.args
        assert isinstance(values, tuple)
        result.args = ((*values, values[0]),)
        (name, signature) = next(iter(program.signatures.items()))
        program.signatures[name] = replace(signature, outputs=(*signature.outputs, "again"))
        return PassResult(program, (Remark("applied", "main", "more"),))


@dataclass(frozen=True, kw_only=True)
class Breaks(Idle):
    """Returns a program that is not legal."""

    name: ClassVar[str] = "breaks"

    def run(self, program: Program, context: PassContext) -> PassResult:
        for node in program.graph.nodes:
            node.meta.pop("val", None)
        return PassResult(program)
