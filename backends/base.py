"""What a backend is, and the artifact that it makes."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..ir import Program
from ..passes import Budget, PassContext, to_spec
from ..passes.progress import Progress, SilentProgress
from .companions import companion_names
from .curves import draw_curves
from .manifest import (
    file_names,
    file_table,
    model_bytes,
    program_signatures,
    read_manifest,
    write_manifest,
)
from .output import check_free, writing
from .session import Session
from .sizes import program_sizes


@dataclass(frozen=True)
class Backend(ABC):
    """A named lowering; its dataclass fields are its options, in the syntax of passes.

    Attributes:
        name: what the backend is called in ``--to``.
        runtime: modules that run the artifact; their size is none of the model's memory.
    """

    name: ClassVar[str]
    runtime: ClassVar[tuple[str, ...]] = ("torch",)

    def lower(
        self,
        program: Program,
        *,
        check: bool = True,
        context: PassContext | None = None,
        budget: Budget | None = None,
    ) -> Artifact:
        """Return the artifact of ``program``, to be saved.

        Args:
            program: what to lower; left as it is.
            check: compare what was written with the eager program, and measure it against the
                captured one, when it is saved.
            context: data to measure on; the pipeline's own where there was one.
            budget: limits of the artifact, as shipped, against the captured program.

        Raises:
            LoweringError: an operator or an option cannot be lowered.
        """
        lowered = self.prepare(program)
        return Artifact(self, program, lowered, check, context, budget or Budget())

    def prepare(self, program: Program) -> Program:
        """Return the program that is written, such as one converted to the backend's dtype."""
        return program

    def converts_to(self, passes: Sequence[str]) -> str | None:
        """Return the dtype that ``prepare`` converts what these passes made to; None: it does not.

        Args:
            passes: their texts.
        """
        return None

    @abstractmethod
    def write(self, program: Program, folder: Path, context: PassContext) -> dict[str, Any]:
        """Write every file but the manifest into an empty folder; return notes for the manifest."""

    def file_names(self, program: Program) -> list[str]:
        """Return the names of the files that ``write`` makes, as far as they are known before.

        Args:
            program: what is to be written, passes to be run over it or not.
        """
        return companion_names(program)

    def computes_in(self, program: Program) -> str:
        """Return the dtype that the artifact computes in: that of most weights."""
        from .checks import compute_dtype

        return compute_dtype(program)

    @classmethod
    @abstractmethod
    def open(
        cls, folder: Path, manifest: Mapping[str, Any], *, threads: int, progress: Progress
    ) -> Session:
        """Open an artifact folder, as ``write`` and ``save`` left it, ready to run.

        Args:
            folder: where it is.
            manifest: what is in its ``manifest.json``.
            threads: processor threads of one operator; 0 leaves the choice to the runtime.
            progress: is told how far it is.

        Raises:
            StorageError: a file is missing or damaged, or refers to others outside of the folder.
        """

    def check(
        self, source: Program, program: Program, folder: Path, context: PassContext
    ) -> dict[str, Any]:
        """Check that what was written computes what the program does; return the figures.

        Args:
            source: the program before lowering.
            program: the program as it was written.
            folder: what was written.
            context: for progress.

        Raises:
            LoweringError: it does not.
        """
        from .checks import check_lowering

        with self.exact_session(folder) as exact:
            return check_lowering(source, exact, self.computes_in(program), context.progress)

    @contextlib.contextmanager
    def exact_session(self, folder: Path) -> Iterator[Session]:
        """Open what was written with every approximation of the runtime switched off."""
        yield self.open(folder, read_manifest(folder), threads=0, progress=SilentProgress())


@dataclass(frozen=True, eq=False)
class Artifact:
    """A lowered program, not written yet.

    Attributes:
        backend: what lowered it.
        source: the program before lowering.
        program: the program as it is written.
        check: whether ``save`` checks what it wrote.
        context: data for the check; None for the pipeline's own.
        budget: limits against the captured program.
    """

    backend: Backend
    source: Program
    program: Program
    check: bool = True
    context: PassContext | None = None
    budget: Budget = field(default_factory=Budget)

    def save(
        self, folder: str | Path, *, force: bool = False, record: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write the artifact's folder, check it, and return its manifest.

        The folder appears only when everything is written and every check has passed.

        Args:
            folder: must not exist, unless ``force``.
            force: replace what modelathe wrote there before; other files are kept.
            record: further entries of the manifest.

        Raises:
            LoweringError: the artifact does not compute what the program does.
            FidelityError: a limit of the budget is broken.
            StorageError: the folder exists, or cannot be written.
        """
        with writing(Path(folder), force=force) as partial:
            check_free(Path(folder), self.backend.file_names(self.program))
            return self._save(partial, dict(record or {}))

    def _save(self, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
        from .checks import check_fidelity

        context = self.context or PassContext()
        draw_curves(self.source.origin.record.get("steps", ()), folder)
        notes = self.backend.write(self.program, folder, context)
        files = file_table(folder, file_names(folder), context.progress)
        fields = {**self._fields(context.progress), **notes, **record}
        fields["sizes"] = {**fields["sizes"], "artifact_bytes": model_bytes({"files": files})}
        # Opening the artifact, to check it, takes a manifest.
        manifest = write_manifest(folder, fields, files)
        if not self.check:
            return manifest
        fields["lowering"] = self.backend.check(self.source, self.program, folder, context)
        shipped = self.backend.open(folder, manifest, threads=0, progress=SilentProgress())
        measured, data = check_fidelity(self.source, shipped, context)
        fields["fidelity"] = measured.known()
        fields["data"] = {**fields.get("data", {}), **data}
        self.budget.judge(measured, f"the {self.backend.name} artifact")
        return write_manifest(folder, fields, files)

    def _fields(self, progress: Progress) -> dict[str, Any]:
        from importlib.metadata import version

        origin = self.source.origin
        sizes, captured = program_sizes(self.program), origin.record.get("captured", {})
        return {
            "tool": f"modelathe {version('modelathe')}",
            "backend": to_spec(self.backend),
            "kind": origin.kind,
            "model": origin.model,
            "notes": list(origin.notes),
            "source": source_files(origin.captured_from, progress) or {"weights": origin.source},
            "pipeline": ",".join(origin.passes),
            **{name: value for name, value in origin.record.items() if name != "captured"},
            "signatures": program_signatures(self.program),
            "sizes": {
                "blocks": sizes.blocks,
                "parameters": sizes.parameters,
                "weight_bytes": sizes.bytes,
                "bits_per_weight": round(sizes.bits_per_weight, 4),
                **({"captured": dict(captured)} if captured else {}),
            },
        }


def source_files(folder: Path | str | None, progress: Progress) -> dict[str, str]:
    """Return name and SHA-256 of the weight files that a program was captured from, if any."""
    if not isinstance(folder, Path) or not folder.is_dir():
        return {}
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    table = file_table(folder, [path.name for path in paths], progress)
    return {name: entry["sha256"] for name, entry in table.items()}
