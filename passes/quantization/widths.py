"""Widths chosen for blocks: marking them, and saying them as remarks and as a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ...ir import PassError, Program, mark, marks_of
from ..base import PassResult, Remark
from ..compare import Same, check_same_values, rewritten_calls
from ..select import chosen
from ..spec import to_spec
from .quantize_weights import QuantizeWeights
from .readers import WIDTH, Shared, find_shared
from .units import Unit, find_units, single_linears


@dataclass(frozen=True, slots=True)
class Chosen:
    """A width for every unit.

    Attributes:
        bits: of a number of each unit's weights.
        scores: what each unit was judged by, as text.
        about: what the scores are.
        rounding: the options with which the widths are meant to be used.
    """

    bits: tuple[int, ...]
    scores: tuple[str, ...]
    about: str
    rounding: QuantizeWeights = field(default_factory=QuantizeWeights)


def mean_bits(units: Sequence[Unit], bits: Sequence[float]) -> float:
    """Return the mean width of a number; scales and zero points are not counted."""
    total = sum(unit.numbers * width for unit, width in zip(units, bits, strict=True))
    return total / sum(unit.numbers for unit in units)


def put_widths(
    program: Program,
    name: str,
    units: Sequence[Unit],
    choice: Chosen,
    details: dict[str, Any] | None = None,
) -> PassResult:
    """Mark every linear of the units with its width.

    Args:
        program: is edited.
        name: of the pass.
        units: those of the program.
        choice: the widths.
        details: more figures for the manifest.
    """
    missed = find_units(program)[1]
    table = list(zip(units, choice.bits, choice.scores, strict=True))
    rows, changed = [], False
    for unit, bits, score in table:
        before = _marked(unit)
        changed = changed or before != {str(bits)}
        others = sorted(text for text in before if text not in (None, str(bits)))
        instead = f", in the place of {' and '.join(map(str, others))}" if others else ""
        rows.append(Remark("applied", unit.key, f"{score}: {bits} bits{instead}"))
        for _, node in _readers(unit):
            mark(node, WIDTH, str(bits))
    if not changed:
        have = Remark("missed", name, "every block has these widths already")
        return PassResult(program, (have, *missed))
    mean, text = mean_bits(units, choice.bits), recipe(program, units, choice)
    rows.append(Remark("applied", name, f"{mean:.4g} bits on average, by {choice.about}"))
    rows.append(Remark("applied", "recipe", text))
    known = {
        "bits": mean,
        "blocks": {unit.key: {"score": score, "bits": bits} for unit, bits, score in table},
        "recipe": text,
        **(details or {}),
    }
    return PassResult(program, (*rows, *missed), known)


def recipe(program: Program, units: Sequence[Unit], choice: Chosen) -> str:
    """Return one ``quantize-weights`` for each width that gives the same widths without marks.

    Behind them stand those for linears in no unit, such as the head, as it treats them by itself.
    """
    texts = []
    for width in sorted(set(choice.bits)):
        mine = [unit for unit, own in zip(units, choice.bits, strict=True) if own == width]
        blocks = tuple(dict.fromkeys(path for unit in mine for path in unit.paths))
        weights = [shared for unit in mine for shared in unit.weights]
        each = tuple(dict.fromkeys(path for shared in weights for path in shared.paths))
        only = blocks if _meant(program, blocks) == {s.name for s in weights} else each
        texts.append(_spec(choice, width, only))
    inside = {shared.name for unit in units for shared in unit.weights}
    others: dict[int, list[str]] = {}
    for shared in find_shared(program):
        bits = choice.rounding.width_of(shared)
        if bits is not None and not shared.obstacle and shared.name not in inside:
            others.setdefault(bits, []).extend(path for path in shared.paths if path)
    texts += [_spec(choice, bits, dict.fromkeys(paths)) for bits, paths in others.items() if paths]
    return ",".join(texts)


def _spec(choice: Chosen, bits: int, only: Iterable[str]) -> str:
    return to_spec(replace(choice.rounding, bits=bits, only=tuple(only)))  # type: ignore[arg-type]


def check_only_marked(before: Program, after: Program) -> None:
    """Check that two programs differ in nothing but widths, and that each weight has one.

    Raises:
        PassError: naming what else differs.
    """
    check_same_values(before, after)
    for name, graph in before.graphs.items():
        rewritten_calls(graph, after.graphs[name], _nothing_else)
    for unit in single_linears(after, find_units(after)[0]):
        if len(found := _marked(unit)) != 1:
            raise PassError(f"{unit.key}: calls that read one weight have the widths {found}")


def _nothing_else(old: fx.Node, new: fx.Node, same: Same) -> bool:
    return False


def _readers(unit: Unit) -> list[tuple[fx.Graph, fx.Node]]:
    return [reader for shared in unit.weights for reader in shared.readers]


def _marked(unit: Unit) -> set[str | None]:
    """Return the widths that a unit's linears are marked with; None for one without."""
    return {marks_of(node).get(WIDTH) for _, node in _readers(unit)}


def _meant(program: Program, globs: tuple[str, ...]) -> set[str]:
    """Return the weights that ``only=`` would quantise."""
    found: list[Shared] = find_shared(program)
    return {s.name for s in found if not s.obstacle and chosen(s.paths, globs, ())}
