"""Scores of blocks, as ``inspect --scores`` shows them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .screen import Screen, figure

if TYPE_CHECKING:
    from ..ir import Program


def block_scores(
    program: Program, screen: Screen, calibration: Path | None
) -> list[dict[str, Any]]:
    """Return ZD of every block, and LIM and block influence on a text where one is given.

    A score that a block does not have, such as ZD of a quantised one, is None.

    Raises:
        DataError: there is no such text, or the model reads none.
    """
    from ..ir import DataError, find_blocks
    from ..passes import Canonicalize, PassContext
    from ..passes.analysis.block_influence import block_influence
    from ..passes.analysis.lim import lim
    from ..passes.analysis.zd import zd

    if calibration is not None and not calibration.is_file():
        raise DataError(f"cannot read {calibration}: no such file", remedy="check the path")
    canonical = Canonicalize()(program).program
    context = PassContext(calibration=calibration, progress=screen.progress)
    rows: list[dict[str, Any]] = []
    for name, graph in canonical.graphs.items():
        columns = {"zd": zd(canonical, name)}
        if calibration is not None:
            columns["lim"] = lim(canonical, context, name)
            columns["block_influence"] = block_influence(canonical, context, name)
        for block in find_blocks(graph):
            scores = {key: found.scores[block.index] for key, found in columns.items()}
            known = {key: None if math.isnan(s) else s for key, s in scores.items()}
            rows.append({"block": block.key, **known})
    return rows


def show_scores(screen: Screen, rows: list[dict[str, Any]]) -> None:
    """Print the table for people."""
    names = [key for key in (rows[0] if rows else {}) if key != "block"]
    cells = [
        [row["block"], *("-" if row[n] is None else figure(row[n], 4) for n in names)]
        for row in rows
    ]
    screen.table(["block", *names], cells, right=names)
