"""The reference backend: torch runs the graph, call by call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..ir import Program, save_program
from ..ir.storage import PROGRAM_FILE, WEIGHTS_FILE
from ..passes import PassContext
from ..passes.progress import Progress
from .base import Backend
from .companions import write_companions
from .session import Session


@dataclass(frozen=True, kw_only=True)
class Eager(Backend):
    """Write the program as it is, to be run by torch: the oracle that others are compared with."""

    name: ClassVar[str] = "eager"

    def write(self, program: Program, folder: Path, context: PassContext) -> dict[str, Any]:
        names = list(program.weights)
        with context.progress.task("writing weights", total=len(names)) as advance:
            save_program(program, folder, lambda name, value: advance(1))
        write_companions(program, folder)
        return {}

    def file_names(self, program: Program) -> list[str]:
        return [PROGRAM_FILE, WEIGHTS_FILE, *super().file_names(program)]

    @classmethod
    def open(
        cls, folder: Path, manifest: Mapping[str, Any], *, threads: int, progress: Progress
    ) -> Session:
        from .program_session import ProgramSession

        return ProgramSession.open(folder, manifest, threads=threads, progress=progress)
