"""How many bits keys and values of each block get, and the text form of such a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ...ir.cache import WIDTHS

Widths = tuple[int, int]  # of keys and of values
Pair = tuple[int | None, int | None]  # the same; None: as they are
CANDIDATES: tuple[Widths, ...] = tuple(
    (keys, values) for keys in reversed(WIDTHS) for values in reversed(WIDTHS)
)
_ROW = re.compile(r"(?P<first>\d+)(?:-(?P<last>\d+))?:(?P<keys>\w+)/(?P<values>\w+)")


def read_table(rows: Iterable[str]) -> dict[int, Pair]:
    """Return the widths that a table gives, by block.

    >>> read_table(["0:8/8", "1-2:4/none"])
    {0: (8, 8), 1: (4, None), 2: (4, None)}

    Raises:
        ValueError: a row is not of the form, or gives a block a second time.
    """
    table: dict[int, Pair] = {}
    for row in rows:
        match = _ROW.fullmatch(row)
        if match is None:
            raise ValueError(f"blocks has rows such as 0:8/8 or 1-5:4/2, got {row!r}")
        first, last = int(match["first"]), int(match["last"] or match["first"])
        pair = _width(row, match["keys"]), _width(row, match["values"])
        if last < first:
            raise ValueError(f"blocks: {row!r} ends before it begins")
        for block in range(first, last + 1):
            if block in table:
                raise ValueError(f"blocks gives block {block} twice")
            table[block] = pair
    return table


def write_table(table: Mapping[int, Pair]) -> tuple[str, ...]:
    """Return the shortest table that ``read_table`` reads as ``table``.

    >>> write_table({0: (8, 8), 1: (4, None), 2: (4, None)})
    ('0:8/8', '1-2:4/none')
    """
    runs: list[tuple[int, int, Pair]] = []
    for block, pair in sorted(table.items()):
        if runs and runs[-1][1] == block - 1 and runs[-1][2] == pair:
            runs[-1] = (runs[-1][0], block, pair)
        else:
            runs.append((block, block, pair))
    return tuple(
        f"{first}{f'-{last}' if last > first else ''}:{_text(pair[0])}/{_text(pair[1])}"
        for first, last, pair in runs
    )


def mean_bits(table: Mapping[int, Widths], numbers: Mapping[int, tuple[int, ...]]) -> float:
    """Return the mean width of a number of the cache; scales are not counted.

    Args:
        table: widths by block.
        numbers: how many numbers of keys and of values a token has, by block.

    >>> mean_bits({0: (8, 4), 1: (4, 2)}, {0: (64, 64), 1: (64, 64)})
    4.5
    """
    total = sum(
        bits * count
        for block, pair in table.items()
        for bits, count in zip(pair, numbers[block], strict=True)
    )
    return total / sum(sum(numbers[block]) for block in table)


def _width(row: str, text: str) -> int | None:
    if text == "none":
        return None
    if text not in map(str, WIDTHS):
        raise ValueError(f"blocks: a width is 2, 4, 8 or none, got {text!r} in {row!r}")
    return int(text)


def _text(width: int | None) -> str:
    return "none" if width is None else str(width)
