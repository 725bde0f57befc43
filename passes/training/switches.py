"""Calls that change while a program is trained, each at its own time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ...ir import Program, call_key, marks_of
from ..base import Pass, PassContext, PassResult
from ..spec import parse

SWITCH = "switch"
"""The mark of a call that healing changes; its text is the pass that put it there."""


class Switch(nn.Module, ABC):
    """What takes a marked call's place while the program is trained.

    What it learns are parameters; what it measures are buffers.  Both are kept with the run, so a
    run that goes on has them.

    Attributes:
        tokens: the windows of this step, int64 [rows, length].
    """

    tokens: Tensor | None = None

    @property
    @abstractmethod
    def turned(self) -> float:
        """How far it is turned, from 0 to 1, where it is what it will be."""

    @property
    @abstractmethod
    def live(self) -> bool:
        """Whether the call that it replaces still has a part in the result."""

    @abstractmethod
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """Take the arguments of the call that it replaces."""


@dataclass(frozen=True)
class SwitchingPass(Pass):
    """A pass that can leave its change to training: it marks calls, and ``heal`` turns them."""

    @abstractmethod
    def make_switches(
        self, program: Program, calls: Sequence[fx.Node], context: PassContext
    ) -> Mapping[fx.Node, Switch]:
        """Return what marked calls become while they are trained.

        Args:
            program: an editable copy that nothing was trained or switched in yet; to be read.
            calls: those of it with this pass's mark, in graph order.
            context: of the healing.
        """

    @abstractmethod
    def turn(self, switches: Mapping[fx.Node, Switch], step: int, steps: int, loss: float) -> None:
        """Move the switches before a step.

        Args:
            switches: by marked call, in graph order.
            step: from 0.
            steps: of the whole run.
            loss: of the step before, per token; infinite before the first.
        """

    @abstractmethod
    def settle(self, program: Program, switches: Mapping[str, Switch]) -> PassResult:
        """Return the program as the switches stand at the end.

        Args:
            program: an editable copy with the trained weights, still marked.
            switches: by key of the marked call (``call_key``).
        """


def marked_passes(program: Program) -> dict[str, SwitchingPass]:
    """Return the passes that left marks on calls of ``program``, by their text."""
    from .. import all_passes

    texts = {
        marks_of(node)[SWITCH]
        for graph in program.graphs.values()
        for node in graph.nodes
        if SWITCH in marks_of(node)
    }
    found: dict[str, SwitchingPass] = {}
    for text in sorted(texts):
        (pass_,) = parse(text, all_passes(), base=Pass)
        assert isinstance(pass_, SwitchingPass)
        found[text] = pass_
    return found


def marked_calls(program: Program, text: str) -> dict[fx.Node, str]:
    """Return the calls with a pass's mark, in graph order, and the graph that each is in."""
    return {
        node: name
        for name, graph in program.graphs.items()
        for node in graph.nodes
        if marks_of(node).get(SWITCH) == text
    }


def by_key(program: Program, switches: Mapping[fx.Node, Switch]) -> dict[str, Switch]:
    """Return switches by the keys of the calls whose place they have in ``program``."""
    return {
        call_key(name, node): switches[node]
        for name, graph in program.graphs.items()
        for node in graph.nodes
        if node in switches
    }


def put_switches(program: Program, context: PassContext) -> dict[str, Mapping[fx.Node, Switch]]:
    """Put a switch in the place of every marked call; return them by the text of their pass.

    Args:
        program: an editable copy, only to be trained.
        context: of the healing.
    """
    made = {
        text: pass_.make_switches(program, list(marked_calls(program, text)), context)
        for text, pass_ in marked_passes(program).items()
    }
    for switches in made.values():
        for node, switch in switches.items():
            node.target = switch
    return made
