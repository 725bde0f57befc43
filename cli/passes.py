"""``modelathe passes``: what can be written in a pipeline."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .listing import list_or_show
from .options import Debug, Json
from .screen import Screen


def command(
    name: Annotated[str | None, typer.Argument(help="Show one pass with its options.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the passes, ours and installed ones, or show one of them."""

    def registry() -> dict[str, type[Any]]:
        from ..passes import all_passes

        return dict(all_passes())

    list_or_show(Screen(as_json=as_json), "passes", "pass", name, registry)
