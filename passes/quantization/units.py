"""What gets one width: the linears of a block, of blocks that share weights, or one linear."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from ...ir import PassError, Program
from ..base import Remark
from ..tying.stacks import find_stacks
from .readers import Shared, find_shared, quantized_paths

Place = tuple[str, int]  # name of a graph, number of a block in it


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears that get one width: those of blocks, or all that read one weight.

    Attributes:
        places: of the blocks.
        key: of the first block or linear, and how many others there are.
        paths: module paths of the blocks or linears.
        weights: of the linears, each once.
        numbers: how many numbers those have.
    """

    places: tuple[Place, ...]
    key: str
    paths: tuple[str, ...]
    weights: tuple[Shared, ...]
    numbers: int


def find_units(program: Program) -> tuple[tuple[Unit, ...], tuple[Remark, ...]]:
    """Return the units in the order of the graphs, and remarks on what can have no width.

    Linears outside the blocks are in none.  Linears of the encoder's graph that make a decoder
    block's cross-attention keys and values belong to that block.
    """
    owners: dict[fx.Node, Place] = {}
    names: dict[Place, tuple[str, str]] = {}  # key and module path
    for stack in find_stacks(program):
        for index, block in enumerate(stack.blocks):
            place = stack.graph, index
            names[place] = block.key, block.path
            owners.update(dict.fromkeys(stack.nodes(index), place))
    order = {place: number for number, place in enumerate(names)}
    found: list[tuple[Shared, list[Place]]] = []
    missed: list[Remark] = []
    for shared in find_shared(program):
        places = {owners.get(node) for _, node in shared.readers}
        inside = sorted((place for place in places if place), key=order.__getitem__)
        if shared.obstacle and _is_under(shared.paths, (path for _, path in names.values())):
            missed.append(Remark("missed", f"@{shared.name}", shared.obstacle))
        elif inside and None in places:
            reason = f"read outside the blocks too: {', '.join(shared.paths)}"
            missed.append(Remark("missed", f"@{shared.name}", reason))
        elif inside:
            found.append((shared, inside))
    units = []
    for members in _joined([inside for _, inside in found], order):
        keys = [names[place][0] for place in members]
        paths = [names[place][1] for place in members]
        weights = [shared for shared, inside in found if inside[0] in members]
        units.append(_unit(program, members, keys, paths, weights))
    return tuple(units), tuple(missed)


def single_linears(program: Program, units: Iterable[Unit]) -> tuple[Unit, ...]:
    """Return a unit for each weight of some units: its linears alone."""
    return tuple(
        _unit(program, unit.places, shared.paths, shared.paths, [shared])
        for unit in units
        for shared in unit.weights
    )


def _unit(
    program: Program,
    places: Sequence[Place],
    keys: Sequence[str],
    paths: Sequence[str],
    weights: Sequence[Shared],
) -> Unit:
    more = len(keys) - 1
    key = f"{keys[0]} and {more} that share weights with it" if more else keys[0]
    numbers = sum(math.prod(program.weight(shared.name).shape) for shared in weights)
    return Unit(tuple(places), key, tuple(dict.fromkeys(paths)), tuple(weights), numbers)


def check_units(program: Program, name: str) -> None:
    """Check that widths can be chosen: there are blocks with linears, and nothing is quantised.

    Args:
        program: what a pass was given.
        name: of the pass.

    Raises:
        PassError: they cannot.
    """
    if quantized := list(quantized_paths(program)):
        raise PassError(
            f"{name}: {len(quantized)} weights are quantised already, such as @{quantized[0][0]}: "
            "scores are those of the program before",
            remedy=f"put {name} in front of quantize-weights",
        )
    if not find_units(program)[0]:
        raise PassError(
            f"{name}: there are no repeated blocks with linears", remedy="leave the pass out"
        )


def _is_under(paths: Iterable[str], blocks: Iterable[str]) -> bool:
    fronts = tuple(f"{block}." for block in blocks)
    return any(path.startswith(fronts) for path in paths)


def _joined(sets: Sequence[Sequence[Place]], order: dict[Place, int]) -> list[list[Place]]:
    """Return the blocks that share weights, directly or through others, in order."""
    group: dict[Place, set[Place]] = {}
    for places in sets:
        whole = set(places).union(*(group[place] for place in places if place in group))
        group.update(dict.fromkeys(whole, whole))
    unique = {id(members): members for members in group.values()}
    ordered = [sorted(members, key=order.__getitem__) for members in unique.values()]
    return sorted(ordered, key=lambda members: order[members[0]])
