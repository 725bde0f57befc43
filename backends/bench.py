"""How fast and how large an artifact is, alone or against another one."""

from __future__ import annotations

import statistics
import time
from typing import Any

from ..passes.progress import Progress, SilentProgress
from .manifest import model_bytes
from .peak import peak_memory
from .session import Session, check_kinds
from .workload import run_once

REPEATS = 5
ROUND_SECONDS = 0.25  # a shorter round would time the clock and the machine's other work
_SILENT = SilentProgress()


def bench(
    session: Session,
    against: Session | None = None,
    *,
    repeats: int = REPEATS,
    memory: bool = True,
    progress: Progress = _SILENT,
) -> dict[str, Any]:
    """Time an artifact, batch 1 or at a user's own sizes, and return its figures by name.

    After one round to warm up, ``repeats`` rounds; with ``against`` the two take turns, so that a
    busy machine slows both.

    Args:
        session: what is timed.
        against: an artifact to compare it with.
        repeats: rounds after the first one.
        memory: measure peak memory too, which takes a process of its own.
        progress: hears how far it is.

    Returns:
        medians of ``prefill`` and ``decode`` (tokens per second; decoders), or ``latency``
        (seconds); ``bytes`` of the model's files; ``peak_memory``, the bytes that opening and
        running it adds to a process (None where that is not known); ``sizes`` that a user's own
        module was given; ``settings`` of the runtime; ``against``, the same of the other artifact;
        and ``ratio``, this one's figures divided by the other's: for times the median of the
        rounds' ratios.  The last two are None without ``against``.

    Raises:
        DataError: the two are of different kinds.
    """
    check_kinds(session, against)
    both = [session] if against is None else [session, against]
    rounds: list[list[dict[str, float]]] = []
    with progress.task("timing", total=(repeats + 2) * len(both)) as advance:
        for number in range(repeats + 1):
            # Every second round starts with the other one, or going first would be an advantage.
            order = both if number % 2 == 0 else both[::-1]
            figures = {}
            for one in order:
                figures[id(one)] = _round(one)
                advance(1)
            rounds.append([figures[id(one)] for one in both])
        del rounds[0]
        peaks = []
        for one in both:
            peaks.append(peak_memory(one) if memory else None)
            advance(1)
    results = [
        _figures(one, [pair[place] for pair in rounds], peaks[place])
        for place, one in enumerate(both)
    ]
    if against is None:
        return {**results[0], "against": None, "ratio": None}
    ratio: dict[str, float | None] = {
        key: statistics.median(pair[0][key] / pair[1][key] for pair in rounds)
        for key in rounds[0][0]
    }
    for key in ("bytes", "peak_memory"):
        mine, theirs = results[0][key], results[1][key]
        ratio[key] = mine / theirs if mine and theirs else None
    return {**results[0], "against": results[1], "ratio": ratio}


def _round(session: Session) -> dict[str, float]:
    """Repeat the work until a round is long enough; return the medians."""
    start = time.perf_counter()
    runs = [run_once(session)]
    while time.perf_counter() - start < ROUND_SECONDS:
        runs.append(run_once(session))
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _figures(
    session: Session, rounds: list[dict[str, float]], memory: int | None
) -> dict[str, Any]:
    medians = {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
    return {
        **medians,
        "bytes": model_bytes(session.manifest),
        "peak_memory": memory,
        "sizes": {k: v for spec in session.graphs.values() for k, v in spec.sizes.items()},
        "settings": session.settings,
    }
