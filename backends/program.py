"""Programs as artifacts: a folder that ``run`` takes as its MODEL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .eager import Eager


@dataclass(frozen=True, kw_only=True)
class ProgramFolder(Eager):
    """Write a Program folder: graphs as JSON, weights as safetensors, for further passes.

    It holds what an ``eager`` artifact holds, and runs the same way; the name in the manifest says
    what it was made for.
    """

    name: ClassVar[str] = "program"
