"""Programs of a test's own small modules, with perturbed weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modelathe.ir import Program, capture
from modelathe.passes import Canonicalize
from support.models import Case

Build = Callable[[], nn.Module]


def chain(*parts: nn.Module) -> Build:
    """Return what builds the parts in a row, as they are."""
    return lambda: nn.Sequential(*parts)


def captured(build: Build, *shape: int) -> Program:
    """Return a module as it is captured; its input is [3, 8] if no shape is given."""
    return capture(Case(build).module(), (torch.ones(shape or (3, 8)),))


def captured_with_input(
    build: Build, *shape: int, dtype: torch.dtype = torch.float32
) -> tuple[Program, Tensor]:
    """Return a module as it is captured, and normal numbers to run it on."""
    model, x = Case(build).module().to(dtype), torch.randn(shape).to(dtype)
    return capture(model, (x,)), x


def outputs(found: Program, x: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Run a program that has one input."""
    return found.run({found.signature.inputs[0]: x}, dtype=dtype)


def small(build: Build, *inputs: Tensor) -> Program:
    """Return a module as passes are given it; its input is [2, 3, 8] if none is given."""
    return Canonicalize()(capture(Case(build).module(), inputs or (torch.ones(2, 3, 8),))).program
