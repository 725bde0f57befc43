"""How the steps of a pipeline and what was measured are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .screen import figure

_LABELS = {
    "kl": "KL",
    "top1_agreement": "agreement",
    "perplexity": "perplexity",
    "reference_perplexity": "before",
    "cosine": "cosine",
    "error": "error",
}


def step_rows(steps: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of a table: pass, promise, what was measured, seconds."""
    return [
        [
            str(step["pass"]),
            str(step.get("fidelity", "")),
            fidelity_line(step.get("measured") or {}),
            figure(step.get("seconds"), 3),
        ]
        for step in steps
    ]


def fidelity_line(measured: Mapping[str, Any]) -> str:
    """Return measured figures in one line: ``KL 0.012, agreement 97.1 %, perplexity 8.3 (8.1)``."""
    parts = []
    for key in ("kl", "top1_agreement", "cosine", "error"):
        value = measured.get(key)
        if value is None:
            continue
        share = key == "top1_agreement"
        parts.append(f"{_LABELS[key]} {f'{value:.1%}' if share else figure(value, 3)}")
    if (now := measured.get("perplexity")) is not None:
        before = measured.get("reference_perplexity")
        was = "" if before is None else f" (was {figure(before, 4)})"
        parts.append(f"perplexity {figure(now, 4)}{was}")
    return ", ".join(parts)


def choices(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, str], str]]:
    """Return what passes chose: name of the pass, a text for each block, and the recipe."""
    found = []
    for step in steps:
        details = step.get("details") or {}
        if "recipe" not in details:
            continue
        blocks = details.get("blocks")
        table = blocks if isinstance(blocks, Mapping) else {}
        rows = {key: f"{one['bits']} bits, {one['score']}" for key, one in table.items()}
        found.append((str(step["pass"]).partition("{")[0], rows, str(details["recipe"])))
    return found


def remark_lines(steps: Sequence[Mapping[str, Any]], limit: int = 6) -> list[str]:
    """Return what passes say of their work as a whole, what they refused, and warnings.

    The first are those whose place is the pass itself.  Of refusals only ``limit`` are written out.
    """
    lines = []
    for step in steps:
        name = str(step["pass"]).partition("{")[0]
        remarks = step.get("remarks", ())
        whole = f"applied: {name}: "
        lines += [r.removeprefix("applied: ") for r in remarks if r.startswith(whole)]
        missed = [r for r in remarks if r.startswith("missed")]
        lines += [f"{name}: {remark}" for remark in missed[:limit]]
        if len(missed) > limit:
            lines.append(f"{name}: ... and {len(missed) - limit} more that it refused")
        lines += [f"warning: {text}" for text in step.get("warnings", ())]
    return lines
