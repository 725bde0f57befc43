"""Widths for the cache of each block: the search of KVTuner, against measured divergence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...ir import PassError, Program
from ..context import PassContext
from .attention_errors import AttentionErrors, attention_errors
from .clusters import grouped
from .entries import Entries
from .pareto import lower_hull, pareto_front
from .simulation import Simulation
from .widths import CANDIDATES, Widths, mean_bits, write_table

Method = Literal["sums", "nsga2"]
FEW = 128  # tables; all of them are measured
Config = tuple[int, ...]  # for each group, the index of a pair


@dataclass(frozen=True, slots=True)
class Point:
    """Widths of a whole cache and what they cost.

    Attributes:
        table: widths by block.
        bits: mean width of a number of the cache; scales not counted.
        kl: to the program that was searched for, nats per token of the calibration text.
    """

    table: Mapping[int, Widths]
    bits: float
    kl: float

    def known(self) -> dict[str, Any]:
        """Return the point as a manifest has it."""
        return {
            "bits": round(self.bits, 4),
            "kl": self.kl,
            "blocks": ",".join(write_table(self.table)),
        }


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        errors: attention-output errors of every block and pair.
        groups: blocks that share their widths.
        uniform: every pair that fits all blocks, the same in all; in the order of ``CANDIDATES``.
        front: what nothing that was measured dominates, smallest first.
        measured: how many tables were measured.
        space: how many tables the groups leave to choose from.
    """

    errors: AttentionErrors
    groups: tuple[tuple[int, ...], ...]
    uniform: tuple[Point, ...]
    front: tuple[Point, ...]
    measured: int
    space: int

    def within(self, bits: float) -> Point:
        """Return the best point of at most ``bits`` on average.

        Raises:
            PassError: none is that small.
        """
        small = [point for point in self.front if point.bits <= bits + 1e-9]
        if not small:
            raise PassError(
                f"quantize-cache: target-bits={bits:g} is out of reach: of {self.measured} tables "
                f"that were measured the smallest has {self.front[0].bits:.3g} bits",
                remedy="allow more; codes of a head fill whole bytes",
            )
        return small[-1]

    def known(self) -> dict[str, Any]:
        """Return what was found as a manifest has it; plain JSON values."""
        names = [f"{keys}/{values}" for keys, values in CANDIDATES]
        rows = zip(self.errors.blocks, self.errors.errors.tolist(), strict=True)
        return {
            "attention_errors": {
                str(block): {
                    name: round(error, 6)
                    for name, error in zip(names, row, strict=True)
                    if math.isfinite(error)
                }
                for block, row in rows
            },
            "groups": [list(group) for group in self.groups],
            "measured": self.measured,
            "space": self.space,
            "uniform": [point.known() for point in self.uniform],
            "front": [point.known() for point in self.front],
        }


def search(
    program: Program,
    context: PassContext,
    graph: str,
    *,
    tokens: int = 2048,
    groups: int = 16,
    method: Method = "sums",
    trials: int = 100,
) -> Found:
    """Search widths for the keys and values of every block.

    1. Attention-output errors of the nine pairs, block by block; a block keeps those pairs that no
       other one dominates in bits and error.
    2. Blocks with the same pairs and similar errors form groups, which share their widths.
    3. KL is measured for the uniform pairs and for all tables, where those are few.  Else ``sums``
       measures each group alone with each of its pairs, and then the tables that are best if those
       figures add up; ``nsga2`` measures ``trials`` tables that NSGA-II breeds from random ones.

    Steps 1, 2 and ``nsga2`` are KVTuner's; ``sums`` is ours.

    Args:
        program: a decoder with a cache that is not quantised.
        context: calibration text and seed.
        graph: which graph.
        tokens: how many of the calibration text are measured on, whole windows.
        groups: at most.
        method: of step 3.
        trials: of NSGA-II.

    Raises:
        PassError: optuna is needed and not installed, or attention cannot be measured.

    Source: KVTuner (arXiv 2502.04420), sections 4 and 5.
    """
    windows = context.calibration_tokens(program).tokens
    windows = windows[: max(1, round(tokens / windows.shape[1]))]
    errors = attention_errors(program, context, graph, windows)
    candidates = errors.candidates()
    sets = grouped(errors.errors, candidates, groups)
    plan = _Plan(program, graph, errors.blocks, candidates, sets)
    space = math.prod(map(len, plan.options))
    breeds = method == "nsga2" and space > FEW
    optuna = _optuna() if breeds else None
    simulation = Simulation(program, context, graph, windows)
    with context.progress.task("measuring widths", total=None) as advance:
        measured = _Measured(simulation, plan, advance)
        everywhere = errors.errors.isfinite().all(0).nonzero().view(-1).tolist()
        uniform = tuple(map(measured.uniform, everywhere))
        if optuna is not None:
            _breed(measured, plan, optuna, trials, context.seed)
        else:
            configs = itertools.product(*plan.options) if space <= FEW else _sums(measured, plan)
            for config in configs:
                measured.config(config)
    points = list(measured.points.values())
    front = pareto_front([p.bits for p in points], [p.kl for p in points])
    return Found(
        errors,
        tuple(tuple(errors.blocks[row] for row in rows) for rows in sets),
        uniform,
        tuple(points[i] for i in front),
        len(points),
        space,
    )


class _Plan:
    """What may be chosen: groups of blocks, and the pairs of each."""

    def __init__(
        self,
        program: Program,
        graph: str,
        blocks: tuple[int, ...],
        candidates: tuple[tuple[int, ...], ...],
        sets: tuple[tuple[int, ...], ...],
    ) -> None:
        self.blocks, self.sets = blocks, sets
        self.options = [candidates[rows[0]] for rows in sets]
        pairs = Entries.of(program, graph).pairs()
        self.numbers = {n: tuple(e.numbers for e in pair) for n, pair in pairs.items()}

    def table(self, config: Config) -> dict[int, Widths]:
        """Return the widths by block."""
        found = {
            self.blocks[row]: CANDIDATES[index]
            for rows, index in zip(self.sets, config, strict=True)
            for row in rows
        }
        return dict(sorted(found.items()))

    def alone(self, group: int, index: int) -> dict[int, Widths]:
        """Return the widths of one group, the other blocks not being rounded."""
        return {self.blocks[row]: CANDIDATES[index] for row in self.sets[group]}

    def bits(self, table: Mapping[int, Widths]) -> float:
        """Return the mean width of a table for all blocks."""
        return mean_bits(table, self.numbers)

    def sizes(self) -> Tensor:
        """Return what each group and pair adds to the mean width; inf for what is no option."""
        sizes = torch.full((len(self.sets), len(CANDIDATES)), torch.inf, dtype=torch.float64)
        whole = sum(map(sum, self.numbers.values()))
        for group, options in enumerate(self.options):
            for index in options:
                pair = CANDIDATES[index]
                counts = [self.numbers[self.blocks[row]] for row in self.sets[group]]
                total = sum(pair[0] * keys + pair[1] * values for keys, values in counts)
                sizes[group, index] = total / whole
        return sizes


class _Measured:
    """Points that were measured, each once."""

    def __init__(self, simulation: Simulation, plan: _Plan, advance: Any) -> None:
        self.simulation, self.plan, self.advance = simulation, plan, advance
        self.points: dict[tuple[Widths, ...], Point] = {}

    def uniform(self, index: int) -> Point:
        """Measure one pair for all blocks."""
        return self._table(dict.fromkeys(self.plan.blocks, CANDIDATES[index]))

    def config(self, config: Config) -> Point:
        """Measure a choice for each group."""
        return self._table(self.plan.table(config))

    def _table(self, table: dict[int, Widths]) -> Point:
        key = tuple(table.values())
        if key not in self.points:
            kl = self.simulation.kl(table)
            self.points[key] = Point(table, self.plan.bits(table), kl)
            self.advance(1)
        return self.points[key]


def _sums(measured: _Measured, plan: _Plan) -> list[Config]:
    """Return the tables that are best if what the groups cost alone adds up."""
    costs = torch.zeros(len(plan.sets), len(CANDIDATES), dtype=torch.float64)
    for group, options in enumerate(plan.options):
        for index in options:
            costs[group, index] = measured.simulation.kl(plan.alone(group, index))
            measured.advance(1)
    return lower_hull(plan.sizes(), costs)


def _breed(measured: _Measured, plan: _Plan, optuna: Any, trials: int, seed: int) -> None:
    """Let NSGA-II measure ``trials`` tables."""
    sampler = optuna.samplers.NSGAIISampler(population_size=max(2, trials // 5), seed=seed)
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        study.optimize(lambda trial: _objectives(measured, plan, trial), n_trials=trials)
    finally:
        optuna.logging.set_verbosity(level)


def _objectives(measured: _Measured, plan: _Plan, trial: Any) -> Iterable[float]:
    config = tuple(
        options[trial.suggest_int(f"group {group}", 0, len(options) - 1)]
        for group, options in enumerate(plan.options)
    )
    point = measured.config(config)
    return point.bits, point.kl


def _optuna() -> Any:
    """Return optuna.

    Raises:
        PassError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise PassError(
            "quantize-cache: NSGA-II needs optuna",
            remedy="pip install optuna, or leave search=nsga2 out",
        ) from error
    return optuna
