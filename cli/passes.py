"""``modelathe passes``: what can be written in a pipeline."""

from __future__ import annotations

from typing import Annotated

import typer

from .listing import entry, pick, show_all, show_one
from .options import Debug, Json
from .screen import Screen
from .tables import read_table


def command(
    name: Annotated[str | None, typer.Argument(help="Show one pass with its options.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the passes, ours and installed ones, or show one of them."""
    screen = Screen(as_json=as_json)
    if name is None and not as_json and (known := read_table("passes", "ALL_PASSES")) is not None:
        return show_all(screen, known, "passes")
    from ..passes import all_passes

    registry = all_passes()
    if name is not None:
        one = entry(pick(registry, name, "pass"))
        return screen.emit(one) if as_json else show_one(screen, one)
    entries = [entry(kind) for kind in registry.values()]
    return screen.emit(entries) if as_json else show_all(screen, entries, "passes")
