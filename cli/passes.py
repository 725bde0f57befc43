"""``modelathe passes``: what can be written in a pipeline."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .listing import list_or_show
from .options import Debug, Json
from .screen import Screen


def command(
    name: Annotated[
        str | None, typer.Argument(help="Show one pass (yours: module:Class) with its options.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the passes, ours and installed ones, or show one of them."""

    def registry() -> dict[str, type[Any]]:
        from ..passes import Pass, all_passes
        from ..passes.spec import class_called

        found: dict[str, type[Any]] = dict(all_passes())
        if name is not None and ":" in name:  # a pass outside this package, by its import path
            found[name] = class_called(name, found, Pass)
        return found

    list_or_show(Screen(as_json=as_json), "passes", "pass", name, registry)
