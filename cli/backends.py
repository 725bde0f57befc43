"""``modelathe backends``: what --to can name."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .listing import list_or_show
from .options import Debug, Json
from .screen import Screen


def command(
    name: Annotated[str | None, typer.Argument(help="Show one backend with its options.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the backends that --to can name, or show one of them."""

    def registry() -> dict[str, type[Any]]:
        from ..backends import all_backends

        return dict(all_backends())

    list_or_show(Screen(as_json=as_json), "backends", "backend", name, registry)
