"""``modelathe bench``: how fast and how large an artifact is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import Artifact, Debug, Json, Threads
from .screen import Screen, figure, size_text
from .sources import open_artifact_folder


def command(
    artifact: Artifact,
    against: Annotated[
        str | None, typer.Option(metavar="ARTIFACT", help="Another artifact, timed in turns.")
    ] = None,
    threads: Threads = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time an artifact in its own runtime (batch 1, medians of 5), alone or --against another."""
    screen = Screen(as_json=as_json)
    with screen.quiet_libraries(debug=debug):
        session = open_artifact_folder(str(artifact), screen, threads=threads)
        other = None
        if against is not None:
            other = open_artifact_folder(against, screen, threads=threads)
        from ..backends.bench import bench

        figures = bench(session, other, progress=screen.progress)
    if as_json:
        screen.emit(figures)
    show(screen, figures, [str(artifact), str(against)])


def show(screen: Screen, figures: dict[str, Any], names: list[str]) -> None:
    """Print one column per artifact, and the ratios between them."""
    rows = [("prefill", "tokens/s"), ("decode", "tokens/s"), ("latency", "ms")]
    rows += [("bytes", ""), ("peak_memory", "")]
    both = [figures] if figures["against"] is None else [figures, figures["against"]]
    ratio = figures["ratio"] or {}
    table = [
        [_title(key, unit), *(_value(key, one[key]) for one in both), *_ratio(ratio, key)]
        for key, unit in rows
        if key in figures
    ]
    columns = ["", *names[: len(both)], *(["ratio"] if ratio else [])]
    settings = figures["settings"]
    threads = settings.get("threads") or "all"
    screen.table(columns, table, right=columns[1:])
    sizes = ", ".join(f"{name} = {size}" for name, size in figures["sizes"].items()) or "batch 1"
    screen.say(f"  {settings['runtime']}, threads: {threads}, {sizes}, medians of 5 rounds")


def _title(key: str, unit: str) -> str:
    name = {"bytes": "size", "peak_memory": "peak memory"}.get(key, key)
    return f"{name} ({unit})" if unit else name


def _value(key: str, value: Any) -> str:
    if key in ("bytes", "peak_memory"):
        return size_text(value)
    return figure(value * 1000 if key == "latency" else value)


def _ratio(ratio: dict[str, Any], key: str) -> list[str]:
    if not ratio:
        return []
    return [f"{ratio[key]:.2f}x" if ratio.get(key) else "-"]
