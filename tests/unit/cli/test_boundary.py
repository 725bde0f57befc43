"""Errors: one line of cause, one of remedy, an exit code, and no traceback."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelathe.cli import COMMANDS
from modelathe.cli.boundary import explain, report
from modelathe.ir import PassError, StorageError

Cli = Callable[..., Any]


def with_note(error: Exception, note: str) -> Exception:
    error.add_note(note)
    return error


@pytest.mark.parametrize(
    ("error", "cause", "remedy", "code"),
    [
        (StorageError("out: exists", remedy="use --force"), "out: exists", "use --force", 1),
        (PassError("no"), "no", "see the options: modelathe --help", 1),
        (KeyboardInterrupt(), "interrupted; nothing was left half-written", "", 130),
        (OSError(errno.ENOSPC, "x", "/o/f"), "/o/f: no space left on the device", "free some", 1),
        (
            PermissionError(errno.EACCES, "Permission denied", "/o"),
            "/o: permission",
            "check who",
            1,
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "a.txt"),
            "a.txt: no such",
            "check the",
            1,
        ),
        (OSError("strange"), "strange", "check the path", 1),
        (MemoryError(), "not enough memory", "close other programs", 1),
        (ModuleNotFoundError("No module named 'x'", name="x"), "No module named 'x'", "install", 1),
        (KeyError("x"), "unexpected KeyError: 'x'", "run it again with --debug", 2),
    ],
)
def test_errors_are_explained(error: BaseException, cause: str, remedy: str, code: int) -> None:
    found = explain(error)
    assert found[0].startswith(cause)
    assert found[1].startswith(remedy)
    assert found[2] == code


def test_the_pass_that_failed_is_named() -> None:
    error = with_note(PassError("too many"), "in pass 2 of 3: prune-blocks{count=9}")
    assert explain(error)[0] == "too many\n  in pass 2 of 3: prune-blocks{count=9}"
    assert "in pass 1 of 1" in explain(with_note(ValueError("x"), "in pass 1 of 1: f"))[0]


@pytest.mark.parametrize(
    ("note", "remedy"),
    [
        ("in pass 2 of 3: prune-blocks{count=9}", "see its options: modelathe passes prune-blocks"),
        ("in pass 1 of 1: mine.passes:Own{a=1}", "see the options: modelathe --help"),
    ],
)
def test_the_options_of_the_pass_that_failed_are_pointed_to(note: str, remedy: str) -> None:
    assert explain(with_note(PassError("too many"), note))[1] == remedy


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("-p", "quantize-weights{bits=5}"), "see its options: modelathe passes quantize-weights"),
        (("-p", "tie-blocks"), "see its options: modelathe passes tie-blocks"),
        (("-p", "tie-blocks{unique=2"), "a pipeline is name{option=value option=value},name: see"),
        (("-p", "prune-blocks{count=x}"), "see its options: modelathe passes prune-blocks"),
        (("--to", "onnx{dtype=int8}"), "see its options: modelathe backends onnx"),
    ],
)
def test_a_bad_option_is_sent_to_its_list(
    cli: Cli, tmp_path: Path, words: Any, remedy: str
) -> None:
    done = cli("run", "demo", *words, "-o", tmp_path / "out")
    assert done.status == 1
    assert f"\nremedy: {remedy}" in done.err


def test_a_traceback_is_printed_only_when_asked_for() -> None:
    with pytest.raises(ValueError, match="x") as raised:
        raise ValueError("x")
    for debug in (False, True):
        stream = io.StringIO()
        report(raised.value, debug=debug, stream=stream)
        assert ("Traceback" in stream.getvalue()) == debug
        assert stream.getvalue().endswith(
            "remedy: run it again with --debug and report what it prints\n"
        )


def test_a_mistake_in_a_pipeline_is_pointed_at(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", "demo", "-p", "fold-norm", "-o", tmp_path / "out")
    assert (done.status, done.out) == (1, "")
    assert "did you mean 'fold-norms'?" in done.err
    assert "  fold-norm\n  ^" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("runn",), "No such command 'runn'"),
        (("run",), "Missing argument"),
        (("run", "demo"), "-o OUT"),
        (("run", "demo", "-o", "x", "--seed", "y"), "--seed"),
        (("run", "demo", "-o", "x", "--device", "tpu"), "--device"),
        (("run", "demo", "-o", "x", "--unknown"), "--unknown"),
        (("run", "demo", "-o", "x", "--max-kl", "-1"), "--max-kl"),
        (("run", "demo", "-o", "x", "--seed", "-1"), "--seed"),
        (("run", "demo", "-o", "x", "--no-check", "--max-kl", "1"), "drop it or --max-kl"),
        (("run", "demo", "-o", "x", "--no-check", "--check-text", "t"), "or --check-text"),
        (("run", "demo", "-o", "x", "--no-check", "--check-tokens", "9"), "or --check-tokens"),
        (("run", "demo", "--resume", "--dry-run"), "--resume goes on"),
        (("diff", "demo"), "give either"),
        (("diff", "demo", "b", "-p", "x"), "give either"),
        (("passes", "fold-nroms"), "did you mean 'fold-norms'?"),
        (("backends", "onx"), "did you mean 'onnx'?"),
    ],
)
def test_mistakes_in_the_command_line(cli: Cli, words: tuple[str, ...], message: str) -> None:
    done = cli(*words)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.startswith("error: ")
    assert "\nremedy: see the options: modelathe" in done.err
    assert done.err.count("\n") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "missing/folder"), "missing/folder"),
        (("generate", "{tmp}", "x"), "not a finished artifact"),
        (("bench", "{tmp}"), "not a finished artifact"),
        (("bench", "{tmp}/none"), "no such folder"),
        (("run", "demo", "-p", "@{tmp}/none.txt", "-o", "{tmp}/o"), "none.txt: no such file"),
        (("run", "demo", "-o", "{tmp}"), "exists already"),
        (("run", "demo", "-o", "/"), "/: cannot be replaced"),
        (("run", "demo", "-o", "/", "--force"), "/: cannot be replaced"),
        (("run", "demo", "--revision", "main", "-o", "{tmp}/o"), "no revision main of it"),
        (("run", "demo", "-o", "{tmp}/o", "--to", "onx"), "onnx"),
        (("run", "demo", "-o", "{tmp}/o", "--to", "onnx,eager"), "one backend"),
        (("eval", "{tmp}", "--text", "x"), "not a finished artifact"),
    ],
)
def test_bad_input_is_one_cause_and_one_remedy(
    cli: Cli, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    done = cli(*(word.format(tmp=tmp_path) for word in words))
    done.assert_refused()
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_no_command_shows_the_help_and_says_so(cli: Cli) -> None:
    done = cli()
    assert done.status == 2
    assert "Commands" in done.out
    assert done.err.startswith("error: no command was given\nremedy: ")


def test_help_imports_nothing_heavy() -> None:
    heavy = "torch", "transformers", "onnx", "onnxruntime", "numpy"
    code = f"""
import sys
from modelathe.cli import main
for words in [["--help"], *([name, "--help"] for name in {COMMANDS!r})]:
    assert main(words) == 0
assert not set({heavy!r}) & set(sys.modules), set({heavy!r}) & set(sys.modules)
"""
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--calibration-samples" in done.stdout


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [("SIGINT", 130, "error: interrupted; nothing was left half-written\n"), ("SIGTERM", 143, "")],
)
def test_a_library_may_make_an_error_of_its_own_of_a_signal(
    number: str, status: int, said: str
) -> None:
    code = f"""
import signal, sys
from modelathe.cli import main, passes
signal.signal(signal.SIGINT, signal.default_int_handler)
def library(*_, **__):
    try:
        signal.raise_signal(signal.{number})
    except BaseException:
        raise RuntimeError("of its own") from None
passes.list_or_show = library
sys.argv[1:] = ["passes"]
sys.exit(main())
"""
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, said)


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("modelathe 0.")


def test_output_into_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -P -m modelathe.cli passes --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
