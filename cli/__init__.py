"""The command line.

Modules of this folder import nothing heavy at their top: ``modelathe --help`` must not wait for
torch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from . import boundary

_received: list[int] = []  # signals that asked this process to end

COMMANDS = ("run", "inspect", "eval", "bench", "generate", "diff", "passes", "backends", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return the exit status.

    Returns:
        0; 1 for bad input; 2 for a mistake in the command line or an unexpected error; 130 after
        Ctrl-C, 143 after a request to end.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    _quiet_libraries()
    if argv is None:  # a process of ours, whose signals and paths are ours too
        _end_politely()
        # Where `my_module:MyPass` and `my_module:factory` lie; last, so that it hides nothing.
        sys.path.append(os.getcwd())
    try:
        return _invoke(words)
    except BrokenPipeError:
        # Who reads our output has gone (`| head`); there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the one place that reports all
        # A library may have made an error of its own of what the signal raised in it.
        if signal.SIGTERM in _received:
            return 128 + signal.SIGTERM
        return boundary.report(KeyboardInterrupt() if _received else error, debug=debug)


def app() -> typer.Typer:
    """Return the application with every sub-command."""
    import importlib

    application = typer.Typer(
        name="modelathe",
        epilog="Begin with `modelathe demo`, then `modelathe run MODEL -o out/`.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    application.callback()(_options)
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        application.command(name)(module.command)
    return application


def _invoke(words: list[str]) -> int:
    try:
        status = app()(args=words, prog_name="modelathe", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except typer.Exit as done:
        status = done.exit_code
    if status == boundary.INTERRUPTED:  # what typer makes of Ctrl-C
        raise KeyboardInterrupt
    sys.stdout.flush()
    return status if isinstance(status, int) else 0


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(f"modelathe {importlib.metadata.version('modelathe')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Reshape a trained model in passes and lower it to files that deploy."""


def _quiet_libraries() -> None:
    """Keep libraries from writing to the terminal; what they say is in --debug tracebacks."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def _end_politely() -> None:
    """Let a request to end (SIGTERM) run the clean-up that Ctrl-C runs, and remember both."""

    def end(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is for a shell's job
        signal.signal(signal.SIGINT, end)
