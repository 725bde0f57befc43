"""What a word on the command line stands for: an artifact folder, or a model to capture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .screen import Screen

if TYPE_CHECKING:
    from ..backends.session import Session
    from ..ir import Program


def is_artifact_word(word: str) -> bool:
    """Tell whether ``word`` names a folder with a manifest of ours."""
    from ..backends.manifest import is_artifact

    return not _is_demo(word) and is_artifact(Path(word))


def open_program(
    word: str | Path, screen: Screen, *, revision: str | None = None, allow_pickle: bool = False
) -> Program:
    """Capture a model, or load a Program folder.

    Raises:
        CaptureError: ``word`` names no model that can be captured.
    """
    from ..ir import capture
    from ..passes.progress import share_task

    with share_task(screen.progress, f"capturing {word}") as report:
        return capture(word, revision=revision, allow_pickle=allow_pickle, report=report)


def open_session(
    word: str, screen: Screen, *, threads: int = 0, allow_pickle: bool = False
) -> Session:
    """Open an artifact in its own runtime, or capture a model and run it with torch.

    Raises:
        StorageError: a folder that is neither.
    """
    if is_artifact_word(word) or not _may_be_model(word):
        return open_artifact_folder(word, screen, threads=threads)
    from ..backends.program_session import ProgramSession

    program = open_program(word, screen, allow_pickle=allow_pickle)
    return ProgramSession.of(program, threads=threads)


def open_artifact_folder(word: str, screen: Screen, *, threads: int = 0) -> Session:
    """Open an artifact in its own runtime.

    Raises:
        StorageError: the folder is no artifact.
    """
    from ..backends.session import open_artifact

    return open_artifact(word, threads=threads, progress=screen.progress)


def _may_be_model(word: str) -> bool:
    """Tell whether capture should be tried: anything but a folder without a configuration."""
    path = Path(word)
    return _is_demo(word) or not path.is_dir() or (path / "config.json").exists()


def _is_demo(word: str) -> bool:
    """Tell whether ``word`` is the embedded model, whatever folder has its name.

    It is so for ``capture``, and means the same everywhere; ``./demo`` is the folder.
    """
    from ..ir.capture import DEMO

    return word == DEMO


def is_model_folder(path: Path) -> bool:
    """Tell whether a folder holds weight files as transformers names them."""
    return any(path.glob("model*.safetensors"))


def is_plain_onnx(word: str) -> bool:
    """Tell whether ``word`` is a folder with ONNX files and nothing that capture reads."""
    path = Path(word)
    return (
        not _is_demo(word) and path.is_dir() and any(path.glob("*.onnx")) and not _has_weights(path)
    )


def _has_weights(path: Path) -> bool:
    return any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "program.json"))
