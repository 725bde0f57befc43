"""How the codes of one weight are chosen when what it reads is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...ir import PassError, Weight
from ...ir.quant import Clip, Grid, QuantizedTensor, QuantType, choose_grid
from .sequential import Moments
from .sweeps import Columns, damped, error, gptq, quantease, refit

Method = Literal["rtn", "gptq", "quantease", "gptq-quantease"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method and all its settings.

    Attributes:
        method: rtn: nearest numbers; gptq; quantease: coordinate descent from the weight;
            gptq-quantease: from the result of gptq.
        clip: how the grid is chosen.
        act_order: visit columns by falling power of what they read.
        iterations: sweeps of coordinate descent.
        relax: leave some of them unrounded.
        damping: share of the mean power that is added to every column's.
        refit: choose the scales again when the codes are known, and sweep once more.
    """

    method: Method
    clip: Clip = "none"
    act_order: bool = False
    iterations: int = 30
    relax: bool = True
    damping: float = 0.0
    refit: bool = False

    @property
    def reads_text(self) -> bool:
        """Whether it needs to know what weights read."""
        return self.method != "rtn" or self.clip == "activation"

    def __str__(self) -> str:
        parts: list[str] = [self.method]
        if self.act_order:
            parts.append("by falling power")
        if "quantease" in self.method:
            parts.append(f"{self.iterations} sweeps{', relaxed' if self.relax else ''}")
        if self.clip != "none":
            parts.append(f"range by {self.clip}")
        if self.refit:
            parts.append("scales refitted")
        return ", ".join(parts)


PUBLISHED: dict[Method, Recipe] = {
    "rtn": Recipe("rtn"),
    "gptq": Recipe("gptq", damping=0.01),
    "quantease": Recipe("quantease"),
    "gptq-quantease": Recipe("gptq-quantease", damping=0.01),
}
AUTO = Recipe(
    "gptq-quantease",
    clip="activation",
    act_order=True,
    damping=0.01,
    refit=True,
)


def recipe_for(
    method: Literal["auto", Method], settings: Mapping[str, Any], has_text: bool
) -> tuple[Recipe, str]:
    """Return a method with all its settings, and why it is this one.

    Args:
        method: as asked for.
        settings: of the recipe, those that were asked for.
        has_text: whether there is calibration text.
    """
    if method != "auto":
        return replace(PUBLISHED[method], **settings), "as asked for"
    if set(settings) - {"clip"} or settings.get("clip") == "activation":
        return replace(AUTO, **settings), "what was asked for needs text"
    if has_text:
        return replace(AUTO, **settings), "there is calibration text"
    return replace(PUBLISHED["rtn"], **settings), "there is no calibration text that it could read"


_REFITS = 3  # how often scales are chosen again
_SWEEPS = 2  # of coordinate descent between two of them


def solve_together(
    weights: Mapping[str, Weight], moments: Moments, types: Mapping[str, QuantType], recipe: Recipe
) -> dict[str, QuantizedTensor]:
    """Choose the codes of weights that read the same: rows do not meet, so they are stacked.

    Args:
        weights: by name.
        moments: of what they read.
        types: the number type of each.
        recipe: how.
    """
    alike: dict[object, list[str]] = {}
    for name, weight in weights.items():
        alike.setdefault((types[name], weight.dtype), []).append(name)
    found: dict[str, QuantizedTensor] = {}
    for names in alike.values():
        rows = torch.cat([weights[name].load() for name in names])
        whole = solve(names[0], rows, moments, types[names[0]], recipe)
        start = 0
        for name in names:
            stop = start + weights[name].shape[0]
            found[name] = whole.rows(slice(start, stop))
            start = stop
    return found


def solve(
    name: str, weight: Tensor, moments: Moments, qtype: QuantType, recipe: Recipe
) -> QuantizedTensor:
    """Choose the codes of a weight.

    Args:
        name: of the weight, for messages.
        weight: [out, in]; rows of several weights that read the same may be stacked.
        moments: of what it reads.
        qtype: the number type.
        recipe: how.

    Raises:
        PassError: the weight is not finite, or the moments are not positive definite.
    """
    wide = weight.to(moments.matrix.device, torch.float32)
    power = moments.matrix.diagonal()
    try:
        grid = choose_grid(weight.to(wide.device), qtype, recipe.clip, power)
    except ValueError as problem:
        raise PassError(f"@{name}: {problem}", remedy="mend or replace the weight") from problem
    order = torch.argsort(power, descending=True) if recipe.act_order else torch.arange(len(power))
    natural, plain = moments.matrix, wide.T
    matrix = damped(natural, recipe.damping)
    if recipe.act_order:
        matrix = matrix[order][:, order]
    columns = Columns.of(grid, order.to(wide.device), torch.float32)
    target = plain[order].contiguous()
    try:
        found = _rounded(target, matrix, columns, recipe, weight.dtype)
    except ValueError as problem:
        raise PassError(
            f"@{name}: {problem}",
            remedy="give more calibration text, or add to the moments: damping=0.1",
        ) from problem
    levels = columns.levels(found)
    back = torch.argsort(order)
    for turn in range(_REFITS if recipe.refit else 0):
        if turn:
            found = quantease(target, matrix, found, columns.nearest, _SWEEPS, relax=False)
            levels = columns.levels(found)
        scales = refit(plain, levels[back], columns.scales, natural, sweeps=3)
        columns.scales = scales.to(weight.dtype).float()
        found = levels * columns.wide()
    result = columns.grid(weight.dtype)
    stored = QuantizedTensor.from_codes(_codes(levels[back], result), result)
    values = stored.dequantize(torch.float32)
    if not values.T[order].equal(found):
        raise PassError(f"@{name}: the stored codes do not stand for the numbers computed")
    return stored


def share_lost(weight: Tensor, stored: QuantizedTensor, moments: Moments) -> float:
    """Return the share of the mean square of a weight's results that storing it costs.

    Args:
        weight: [out, in].
        stored: in its place.
        moments: of what it reads.
    """
    plain = weight.to(moments.matrix.device, torch.float32).T
    whole = error(plain, torch.zeros_like(plain), moments.matrix)
    lost = error(plain, stored.dequantize(torch.float32).T, moments.matrix)
    return lost / whole if whole > 0 else 0.0


def _rounded(
    target: Tensor, matrix: Tensor, columns: Columns, recipe: Recipe, dtype: torch.dtype
) -> Tensor:
    """Return the values of a weight on its grid, columns in the order in which they are visited."""
    found = target
    if recipe.method == "rtn":
        return torch.stack([columns.nearest(j, column) for j, column in enumerate(target)])
    if recipe.method.startswith("gptq"):
        size = len(target) // len(columns.scales)
        # as published: a group's grid covers its columns as they are when they are reached
        moving = len(columns.scales) > 1 and not recipe.act_order and recipe.clip == "none"
        begin = (lambda j, run: columns.cover(j // size, run, dtype)) if moving else None
        found = gptq(target, matrix, columns.nearest, size if moving else 1, begin)
    if recipe.method.endswith("quantease"):
        turns = recipe.iterations
        found = quantease(target, matrix, found, columns.nearest, turns, recipe.relax)
    return found


def _codes(levels: Tensor, grid: Grid) -> Tensor:
    """Return the codes uint8 [out, in] of whole numbers [in, out]."""
    grouped = levels.T.reshape(*grid.scales.shape, -1)
    return (grouped + grid.zero_points(torch.float32)).to(torch.uint8).view(levels.shape[::-1])
