"""How passes and backends are listed: from their docstrings and fields, nothing written twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from .screen import Screen


def entry(kind: type[Any], group: str | None = None) -> dict[str, Any]:
    """Return what a pass or backend says about itself, as --json prints it."""
    from ..passes.describe import describe

    about = describe(kind)
    fidelity = getattr(kind, "fidelity", None)
    return {
        "name": about.name,
        "summary": about.summary,
        **({"fidelity": fidelity.value} if fidelity is not None else {}),
        **({"from": group} if group else {}),
        "details": about.details,
        "options": [
            {"name": o.name, "type": o.type, "default": o.default, "doc": o.doc}
            for o in about.options
        ],
    }


def pick(registry: Mapping[str, type[Any]], name: str, what: str) -> type[Any]:
    """Return one class by name.

    Raises:
        BadParameter: there is none; the message has the nearest name.
    """
    from ..ir.errors import did_you_mean

    if name not in registry:
        raise typer.BadParameter(f"no {what} is called {name!r}{did_you_mean(name, registry)}")
    return registry[name]


def show_all(screen: Screen, entries: Sequence[Mapping[str, Any]], command: str) -> None:
    """Print one line for each, and how to read more."""
    has_fidelity = any("fidelity" in one for one in entries)
    columns = ["name", *(["outputs"] if has_fidelity else []), "what it does"]
    rows = [
        [one["name"], *([one.get("fidelity", "")] if has_fidelity else []), one["summary"]]
        for one in entries
    ]
    screen.table(columns, rows)
    screen.say(f"  more about one, with its options: modelathe {command} NAME")


def show_one(screen: Screen, one: dict[str, Any]) -> None:
    """Print everything that is known about one."""
    promise = f"  ({one['fidelity']})" if "fidelity" in one else ""
    screen.say(f"{one['name']}{promise}", style="bold")
    screen.say(f"  {one['summary']}\n")
    for line in one["details"].splitlines():
        screen.say(f"  {line}".rstrip())
    if one["details"]:
        screen.say("")
    if not one["options"]:
        screen.say("  It takes no options.")
        return
    rows = [
        [o["name"], o["type"], "required" if o["default"] is None else o["default"], o["doc"]]
        for o in one["options"]
    ]
    screen.table(["option", "values", "default", ""], rows)
    screen.say(f"  written as: {one['name']}{{{_example(one['options'])}}}")


def _example(options: list[dict[str, Any]]) -> str:
    required = [o for o in options if o["default"] is None] or options[:1]
    return " ".join(f"{o['name']}={o['default'] or '...'}" for o in required)
