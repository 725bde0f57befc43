"""``modelathe backends``: what --to can name."""

from __future__ import annotations

from typing import Annotated

import typer

from .listing import entry, pick, show_all, show_one
from .options import Debug, Json
from .screen import Screen
from .tables import read_table


def command(
    name: Annotated[str | None, typer.Argument(help="Show one backend with its options.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the backends that --to can name, or show one of them."""
    screen = Screen(as_json=as_json)
    if (
        name is None
        and not as_json
        and (known := read_table("backends", "ALL_BACKENDS")) is not None
    ):
        return show_all(screen, known, "backends")
    from ..backends import all_backends

    registry = all_backends()
    if name is not None:
        one = entry(pick(registry, name, "backend"))
        return screen.emit(one) if as_json else show_one(screen, one)
    entries = [entry(kind) for kind in registry.values()]
    return screen.emit(entries) if as_json else show_all(screen, entries, "backends")
