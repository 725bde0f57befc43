"""How the codes of one weight are chosen when what it reads is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...ir import PassError, Weight
from ...ir.quant import Clip, Grid, QuantizedTensor, QuantType, choose_grid
from .outliers import Kind, Outliers, Solved, choose_outliers
from .sequential import Moments
from .sweeps import Columns, Decide, damped, error, gptq, quantease, refit

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
        refit: choose the scales again when the codes are known, with quantease three times and
            with more sweeps in between.
        outliers: share of the entries that are kept beside the codes; none: none.
        outlier_kind: which ones.
    """

    method: Method
    clip: Clip = "none"
    act_order: bool = False
    iterations: int = 30
    relax: bool = True
    damping: float = 0.0
    refit: bool = False
    outliers: float | None = None
    outlier_kind: Kind = "structured"

    @property
    def reads_text(self) -> bool:
        """Whether it needs to know what weights read."""
        return self.method != "rtn"

    @property
    def refits(self) -> int:
        """How often scales are chosen again: more than once where sweeps move codes in between."""
        if not self.refit:
            return 0
        return _REFITS if "quantease" in self.method else 1

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
        if self.outliers is not None:
            parts.append(f"{100 * self.outliers:g} % {self.outlier_kind} outliers")
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


_STEADY = 1e-4  # of the mean power, is added to moments that scales are fitted on
_REFITS = 3  # how often scales are chosen again where there are sweeps
_SWEEPS = 2  # of coordinate descent between two of them


def solve_together(
    weights: Mapping[str, Weight], moments: Moments, types: Mapping[str, QuantType], recipe: Recipe
) -> dict[str, Solved]:
    """Choose the codes of weights that read the same: rows do not meet, so they are stacked.

    Outliers are a share of each weight, so with them each is solved on its own.

    Args:
        weights: by name.
        moments: of what they read.
        types: the number type of each.
        recipe: how.
    """
    alike: dict[object, list[str]] = {}
    for name, weight in weights.items():
        own = "" if recipe.outliers is None else name
        alike.setdefault((types[name], weight.dtype, own), []).append(name)
    found: dict[str, Solved] = {}
    for names in alike.values():
        if recipe.outliers is not None:
            (name,) = names
            found[name] = solve(name, weights[name].load(), moments, types[name], recipe)
            continue
        rows = torch.cat([weights[name].load() for name in names])
        whole = solve(names[0], rows, moments, types[names[0]], recipe).codes
        start = 0
        for name in names:
            stop = start + weights[name].shape[0]
            found[name] = Solved(whole.rows(slice(start, stop)))
            start = stop
    return found


def solve(name: str, weight: Tensor, moments: Moments, qtype: QuantType, recipe: Recipe) -> Solved:
    """Choose the codes of a weight, and its outliers, where its moments are; return them in memory.

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
        kept = choose_outliers(wide, power, recipe.outliers, recipe.outlier_kind, qtype)
        covered = weight.to(wide.device).masked_fill(kept, 0)  # zero is in every range
        grid = choose_grid(covered, qtype, recipe.clip, power)
    except ValueError as problem:
        raise PassError(f"@{name}: {problem}", remedy="mend or replace the weight") from problem
    order = torch.argsort(power, descending=True) if recipe.act_order else torch.arange(len(power))
    natural, plain, free = moments.matrix, wide.T, kept.T[order].contiguous()
    matrix = damped(natural, recipe.damping)
    if recipe.act_order:
        matrix = matrix[order][:, order]
    columns = Columns.of(grid, order.to(wide.device), torch.float32)
    decide = _keeping(free, columns.nearest)
    target = plain[order].contiguous()
    try:
        found = _rounded(target, matrix, columns, decide, free, recipe, weight.dtype)
    except ValueError as problem:
        raise PassError(
            f"@{name}: {problem}",
            remedy="give more calibration text, or add to the moments: damping=0.1",
        ) from problem
    beside, levels = _parted(found, free, columns, weight.dtype)
    found = torch.where(free, beside, found)
    back = torch.argsort(order)
    # Undamped, scales of columns that read next to nothing could become anything; damped as the
    # sweeps are, they would fit held-out inputs worse.
    steady = natural.clone()
    steady.diagonal().add_(_STEADY * power.mean())
    for turn in range(recipe.refits):
        if turn:
            found = quantease(target, matrix, found, decide, _SWEEPS, relax=False)
            beside, levels = _parted(found, free, columns, weight.dtype)
        rest = plain - beside[back]
        scales = refit(rest, levels[back], columns.scales, steady, sweeps=3)
        columns.scales = scales.to(weight.dtype).float()
        found = levels * columns.wide() + beside
    result = columns.grid(weight.dtype)
    stored = QuantizedTensor.from_codes(_codes(levels[back], result), result)
    outliers = Outliers.of(beside[back].T.to(weight.dtype), kept, recipe.outlier_kind)
    solved = Solved(stored, outliers)
    if not solved.dequantize(torch.float32).T[order].equal(found):
        raise PassError(f"@{name}: what is stored does not stand for the numbers computed")
    return solved.cpu()


def _keeping(free: Tensor, nearest: Decide) -> Decide:
    """Return a rule that rounds a column but for those entries that are kept as they are.

    Args:
        free: bool [in, out], the entries that are kept, columns as they are visited.
        nearest: rounds a column.
    """
    some = free.any(1).tolist()

    def decide(j: int, u: Tensor) -> Tensor:
        return torch.where(free[j], u, nearest(j, u)) if some[j] else nearest(j, u)

    return decide


def _parted(
    found: Tensor, free: Tensor, columns: Columns, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what is kept beside the codes, as it will be stored, and whole numbers for the rest.

    Both are [in, out], and zero where the other is not.
    """
    beside = found.masked_fill(~free, 0).to(dtype).float()
    return beside, columns.levels(found.masked_fill(free, 0))


def share_lost(weight: Tensor, stored: Solved, moments: Moments) -> float:
    """Return the share of the mean square of a weight's results that storing it costs.

    Args:
        weight: [out, in].
        stored: in its place.
        moments: of what it reads.
    """
    plain = weight.to(moments.matrix.device, torch.float32).T
    whole = error(plain, torch.zeros_like(plain), moments.matrix)
    lost = error(plain, stored.dequantize(torch.float32).to(plain.device).T, moments.matrix)
    return lost / whole if whole > 0 else 0.0


def _rounded(
    target: Tensor,
    matrix: Tensor,
    columns: Columns,
    decide: Decide,
    free: Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
) -> Tensor:
    """Return the values of a weight on its grid, columns in the order in which they are visited."""
    found = target
    if recipe.method.startswith("gptq"):
        size = len(target) // len(columns.scales)
        # as published: a group's grid covers its columns as they are when they are reached
        moving = len(columns.scales) > 1 and not recipe.act_order and recipe.clip == "none"

        def cover(j: int, run: Tensor) -> None:
            columns.cover(j // size, run.masked_fill(free[j : j + size], 0), dtype)

        found = gptq(target, matrix, decide, size if moving else 1, cover if moving else None)
    if recipe.method.endswith("quantease"):
        turns = recipe.iterations
        found = quantease(target, matrix, found, decide, turns, recipe.relax)
    return found


def _codes(levels: Tensor, grid: Grid) -> Tensor:
    """Return the codes uint8 [out, in] of whole numbers [in, out]."""
    grouped = levels.T.reshape(*grid.scales.shape, -1)
    return (grouped + grid.zero_points(torch.float32)).to(torch.uint8).view(levels.shape[::-1])
