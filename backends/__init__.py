"""Backends: what a program can be lowered to.

``ALL_BACKENDS`` is the table of ours; ``all_backends`` adds those that installed packages offer
under the entry-point group ``modelathe.backends``.
"""

from __future__ import annotations

from ..ir import LoweringError
from ..passes.spec import with_installed
from .base import Artifact, Backend
from .checkpoint import Checkpoint
from .eager import Eager
from .onnx import Onnx
from .program import ProgramFolder
from .session import Session, open_artifact

ALL_BACKENDS: tuple[type[Backend], ...] = (Onnx, Eager, ProgramFolder, Checkpoint)
REGISTRY: dict[str, type[Backend]] = {kind.name: kind for kind in ALL_BACKENDS}


def all_backends() -> dict[str, type[Backend]]:
    """Return every backend by its name: ours, and those of installed packages.

    Raises:
        LoweringError: an installed backend has a name that is taken, or is no backend.
    """
    return with_installed(REGISTRY, "modelathe.backends", Backend, LoweringError)


__all__ = [
    "ALL_BACKENDS",
    "REGISTRY",
    "Artifact",
    "Backend",
    "Checkpoint",
    "Eager",
    "Onnx",
    "ProgramFolder",
    "Session",
    "all_backends",
    "open_artifact",
]
