"""Learning curves of a run, drawn beside the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_TITLES = {
    "training": "training",
    "text": "held-out text",
    "generated": "held-out text that the model wrote",
}


def draw_curves(steps: Iterable[Mapping[str, Any]], folder: Path) -> list[str]:
    """Draw the learning curve of every pass that trained, as ``<pass>.svg``; return the names.

    Needs matplotlib (``pip install matplotlib``); without it nothing is drawn, and the figures
    are in the manifest alone.

    Args:
        steps: of the manifest; a pass that trained has ``details.curve``.
        folder: where the files go.
    """
    curves = [
        (str(step["pass"]).partition("{")[0], step["details"]["curve"])
        for step in steps
        if "curve" in step.get("details", {})
    ]
    if not curves or find_spec("matplotlib") is None:
        return []
    names: list[str] = []
    for name, curve in curves:
        same = sum(one.startswith(name) for one in names)
        names.append(f"{name}{f'-{same + 1}' if same else ''}.svg")
        _draw(curve, folder / names[-1])
    return names


def _draw(curve: list[Mapping[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, title in _TITLES.items():
        points = [(point["tokens"], point[key]) for point in curve if key in point]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=title)
    if any("turned" in point for point in curve):
        share = axes.twinx()
        share.plot([p["tokens"] for p in curve], [p["turned"] for p in curve], "k--", lw=0.8)
        share.set_ylabel("share switched (dashed)")
        share.set_ylim(0, 1.05)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
