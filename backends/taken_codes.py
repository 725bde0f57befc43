"""Activations rounded as an artifact rounded them.

Where a number lies between two codes, another order of summation decides which, and two right runs
differ from there on by whole steps, which move more numbers across other middles.  So the program
goes on with the artifact's codes, and each of them is judged where it was made: it must be within
half a step of the number that it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.activations import (
    RoundedActivations,
    largest_code,
    middle_code,
    rounded_activations,
)
from .session import Array


class TakenCodes:
    """What stands in for the values of calls that round activations, for ``Program.run``.

    Attributes:
        expected: the numbers that were to be rounded, those beyond a fixed range at its end.
        found: the same, off by what a code is further away than half a step.

    Args:
        graph: whose calls round.
        codes: of each such call, by its name; a call without any rounds by itself.
    """

    def __init__(self, graph: fx.Graph, codes: Mapping[str, Array]) -> None:
        views = [v for v in rounded_activations(graph) if v.node.name in codes]
        self._views = {view.node: view for view in views}
        self._read = {part for v in views for part in (v.input, v.scale, v.zero)}
        self._codes = codes
        self._values: dict[fx.Node, Tensor] = {}
        self.expected: dict[str, Tensor] = {}
        self.found: dict[str, Tensor] = {}

    def __call__(self, node: fx.Node, value: Any) -> Any:
        """Return what the codes of ``node`` stand for, or ``value`` where there are none."""
        if node in self._views:
            value = self._taken(self._views[node])
        if node in self._read:
            self._values[node] = value
        return value

    def _taken(self, view: RoundedActivations) -> Tensor:
        given = self._values[view.input]
        codes = torch.from_numpy(self._codes[view.node.name]).to(given.dtype)
        if view.scale is None or view.zero is None:
            middle: Tensor | int = middle_code(view.bits)
            step = given.abs().amax(-1, keepdim=True) / (middle_code(view.bits) - 1)
            nearest = given
        else:
            step, middle = self._values[view.scale], self._values[view.zero].to(given.dtype)
            nearest = given.clamp(-middle * step, (largest_code(view.bits) - middle) * step)
        taken = (codes - middle) * step
        gap = taken - nearest
        blamed = (gap.abs() - step / 2).clamp_min(0)
        name = f"%{view.node.name}, rounded,"
        self.expected[name] = nearest
        self.found[name] = nearest + torch.where(gap > 0, blamed, -blamed)
        return taken
