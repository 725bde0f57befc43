"""How passes and backends are listed: from their docstrings and fields, nothing written twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

from .screen import Screen
from .tables import read_table


def entry(kind: type[Any]) -> dict[str, Any]:
    """Return what a pass or backend says about itself, as --json prints it."""
    from ..passes.describe import describe

    about = describe(kind)
    fidelity = getattr(kind, "fidelity", None)
    return {
        "name": about.name,
        "summary": about.summary,
        **({"fidelity": fidelity.value} if fidelity is not None else {}),
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


def list_or_show(
    screen: Screen,
    group: str,
    what: str,
    name: str | None,
    registry: Callable[[], Mapping[str, type[Any]]],
) -> None:
    """Print all passes or backends, or one of them with its options.

    Args:
        screen: where to print.
        group: ``passes`` or ``backends``: the command, and the layer that has the table.
        what: one of them: ``pass`` or ``backend``.
        name: of the one to show; None for all.
        registry: gives every class by name; not called where the table can be read from source.

    Raises:
        BadParameter: there is none of that name.
    """
    table = f"ALL_{group.upper()}"
    plain = name is None and not screen.as_json
    if plain and (known := read_table(group, table)) is not None:
        return show_all(screen, known, group)
    classes = registry()
    if name is not None:
        one = entry(pick(classes, name, what))
        return screen.emit(one) if screen.as_json else show_one(screen, one)
    entries = [entry(kind) for kind in classes.values()]
    return screen.emit(entries) if screen.as_json else show_all(screen, entries, group)


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
