"""Programs whose norms are marked to become RepBN, and the switches that do it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from modelathe.ir import Norm, Program
from modelathe.passes import ReplaceNorms
from modelathe.passes.norms.rep_switch import RepSwitch
from support.models import canonical
from support.training import context
from support.views import views

PASS = ReplaceNorms(schedule="progressive")


def marked(name: str, **options: Any) -> Program:
    return ReplaceNorms(schedule="progressive", **options)(canonical(name), context()).program


def switches(program: Program) -> Mapping[fx.Node, RepSwitch]:
    """Return the switches of a program's norms as healing begins, none in its place yet."""
    nodes = [norm.node for norm in views(Norm, program)]
    made = PASS.make_switches(program, nodes, context())
    return {node: s for node, s in made.items() if isinstance(s, RepSwitch)}
