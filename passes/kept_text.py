"""Text that a model wrote, kept from one run to the next; nothing depends on finding it.

A file holds token ids and their SHA-256.  What is damaged, or is not what was asked for, is
written anew.  A folder keeps 256 MB, what was used last: a hundred texts or more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..ir import SafetensorsFile, StorageError
from .data import TokenWindows
from .progress import Progress
from .state import write_whole

_LIMIT = 256_000_000  # bytes
_PREFIX = "text-"


def kept_text(
    folders: Sequence[Path],
    key: str,
    fits: Callable[[TokenWindows], bool],
    make: Callable[[], TokenWindows],
    progress: Progress,
) -> TokenWindows:
    """Return the text called ``key`` from a folder that has it, else as ``make`` makes it.

    It is then kept in the first folder that takes it.

    Args:
        folders: where to look, in order.
        key: differs where the text does.
        fits: tells whether a text can be the one that is meant.
        make: makes it.
        progress: is told where the text comes from, and what is wrong with a file.
    """
    paths = [folder / f"{_PREFIX}{key}.safetensors" for folder in folders]
    for path in paths:
        try:
            if not path.exists():
                continue
            found = _read(path)
            if not fits(found):
                raise StorageError("it holds another text")
        except (StorageError, OSError) as error:
            progress.note(f"warning: {path} is of no use and not read: {error}")
            continue
        progress.note(f"the text that the model writes is taken from {path}")
        with contextlib.suppress(OSError):  # in a folder that may only be read
            os.utime(path)
        return found
    made = make()
    for path in paths:
        if _write(path, made, progress):
            break
    return made


def _read(path: Path) -> TokenWindows:
    """Return what a file holds.

    Raises:
        StorageError: it is damaged, or no file of ours.
    """
    file = SafetensorsFile(path)
    if "tokens" not in file.keys or file.spec("tokens")[1] != torch.int64:
        raise StorageError("it holds no token ids")
    # A copy, for the file may go while the text is in use.
    found = TokenWindows.of(file.load("tokens").clone(), file.metadata.get("source", ""))
    if found.sha256 != file.metadata.get("sha256"):
        raise StorageError("its SHA-256 is another one, so it is damaged")
    return found


def _write(path: Path, text: TokenWindows, progress: Progress) -> bool:
    """Keep a text; tell whether that was possible."""
    from safetensors import SafetensorError

    about = {"source": text.source, "sha256": text.sha256}
    try:
        write_whole(path, {"tokens": text.tokens}, about)
    except (OSError, SafetensorError) as error:  # the latter where the disk is full
        progress.note(
            f"warning: {path} cannot be written, so the next run makes its text again: {error}"
        )
        return False
    with contextlib.suppress(OSError):  # another run may be deleting them, too
        _forget(path.parent)
    return True


def _forget(folder: Path) -> None:
    """Delete texts, those first that were not used for longest, until the rest is small enough."""
    files = [(path, path.stat()) for path in folder.glob(f"{_PREFIX}*")]
    total = 0
    for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns, reverse=True):
        total += stat.st_size
        if total > _LIMIT:
            path.unlink(missing_ok=True)
