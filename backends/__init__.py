"""Backends: what a program can be lowered to.

``ALL_BACKENDS`` is the table of ours; ``all_backends`` adds those that installed packages offer
under the entry-point group ``modelathe.backends``.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from ..ir import LoweringError
from .base import Artifact, Backend
from .eager import Eager
from .onnx import Onnx
from .program import ProgramFolder
from .session import Session, open_artifact

ALL_BACKENDS: tuple[type[Backend], ...] = (Onnx, Eager, ProgramFolder)
REGISTRY: dict[str, type[Backend]] = {kind.name: kind for kind in ALL_BACKENDS}


def all_backends() -> dict[str, type[Backend]]:
    """Return every backend by its name: ours, and those of installed packages.

    Raises:
        LoweringError: an installed backend has a name that is taken, or is no backend.
    """
    found = dict(REGISTRY)
    for entry in entry_points(group="modelathe.backends"):
        kind = entry.load()
        if not (isinstance(kind, type) and issubclass(kind, Backend)):
            raise LoweringError(f"entry point {entry.name} ({entry.value}) is no backend")
        if found.setdefault(kind.name, kind) is not kind:
            raise LoweringError(f"two backends are called {kind.name}")
    return found


__all__ = [
    "ALL_BACKENDS",
    "REGISTRY",
    "Artifact",
    "Backend",
    "Eager",
    "Onnx",
    "ProgramFolder",
    "Session",
    "all_backends",
    "open_artifact",
]
