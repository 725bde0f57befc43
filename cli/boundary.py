"""Where every error of the command line ends: one line of cause, one of remedy, an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import IO

FAILED = 1  # the input or the model: the message says what to change
UNEXPECTED = 2  # a mistake in the command line, or one of ours
INTERRUPTED = 130

_REPORT = "run it again with --debug and report what it prints"
_OS_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another output folder with -o",
    errno.EDQUOT: "free some of your quota, or choose another output folder with -o",
    errno.EACCES: "check who may read and write there, or choose another folder",
    errno.EPERM: "check who may read and write there, or choose another folder",
    errno.EROFS: "it is read-only; choose another folder",
    errno.ENOENT: "check the path",
    errno.EISDIR: "give a file, not a folder",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.ENOMEM: "close other programs, or use a machine with more memory",
}


def report(error: BaseException, *, debug: bool, stream: IO[str] | None = None) -> int:
    """Print what went wrong to ``stream`` (stderr) and return the exit code."""
    stream = stream or sys.stderr
    if debug and not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error, file=stream)
    cause, remedy, code = explain(error)
    if cause:
        stream.write(f"error: {cause}\n")
    if remedy:
        stream.write(f"remedy: {remedy}\n")
    stream.flush()
    return code


def explain(error: BaseException) -> tuple[str, str, int]:
    """Return cause, remedy and exit code of an error."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing was left half-written", "", INTERRUPTED
    if usage := _usage(error):
        return usage
    # A library error can only be one if its module was loaded; loading it here would import torch.
    errors = sys.modules.get(f"{__package__.rpartition('.')[0]}.ir.errors")
    if errors is not None and isinstance(error, errors.ModelatheError):
        return _with_notes(error), error.remedy or _more_about(error), FAILED
    if isinstance(error, OSError):
        return _os_cause(error), _OS_REMEDIES.get(error.errno or 0, "check the path"), FAILED
    if isinstance(error, MemoryError) or "not enough memory" in str(error).lower():
        return f"not enough memory{_where(error)}", _OS_REMEDIES[errno.ENOMEM], FAILED
    if isinstance(error, ImportError) and not (error.name or "").startswith("modelathe"):
        missing = f": pip install {error.name.partition('.')[0]}" if error.name else ""
        return str(error), f"install what is missing{missing}", FAILED
    first = str(error).partition("\n")[0]
    return f"unexpected {type(error).__name__}: {first}{_where(error)}", _REPORT, UNEXPECTED


def _usage(error: BaseException) -> tuple[str, str, int] | None:
    """Explain a mistake in the command line itself, as typer raises it."""
    import typer

    usage, base = typer.BadParameter.__mro__[1:3]  # UsageError, ClickException: not exported
    if not isinstance(error, base):
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "modelathe"
    message = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
    message = message or "no command was given"  # the help has been shown then
    code = UNEXPECTED if isinstance(error, usage) else FAILED
    return message.rstrip("."), f"see the options: {command} --help", code


def _with_notes(error: BaseException) -> str:
    """Return the message and the pass it came from."""
    return "\n".join([str(error), *(f"  {note}" for note in _pass_notes(error))])


def _pass_notes(error: BaseException) -> list[str]:
    """Return what the pipeline added: ``in pass 2 of 3: prune-blocks{count=9}``."""
    return [note for note in getattr(error, "__notes__", []) if note.startswith("in pass ")]


def _more_about(error: BaseException) -> str:
    """Return where the options are listed that an error without a remedy is about."""
    from ..ir.errors import SpecSyntaxError
    from ..passes.spec import where_options_are

    if isinstance(error, SpecSyntaxError):
        return "a pipeline is name{option=value option=value},name: see modelathe passes"
    for note in _pass_notes(error):
        name = note.partition(": ")[2].partition("{")[0]
        if name and ":" not in name:  # a class given by its import path is not listed
            return where_options_are(name)
    return "see the options: modelathe --help"


def _os_cause(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.ENOSPC:
        reason = "no space left on the device"
    path = error.filename2 or error.filename
    return f"{os.fspath(path)}: {reason.lower()}" if isinstance(path, str | os.PathLike) else reason


def _where(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return f" ({notes[0]})" if notes else ""
