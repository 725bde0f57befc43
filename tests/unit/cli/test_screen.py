"""What the user sees: units, tables, progress."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from modelathe.cli import screen as screen_module
from modelathe.cli.screen import BarProgress, Screen, count_text, figure, size_text
from modelathe.passes.progress import Advance, SilentProgress, share_task


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (999_999, "1 MB"),
        (26_700_000, "26.7 MB"),
        (123_456_789, "123 MB"),
        (13.5e9, "13.5 GB"),
        (None, "unknown"),
    ],
)
def test_sizes(count: float | None, text: str) -> None:
    assert size_text(count) == text


def test_counts_and_figures() -> None:
    assert [count_text(n) for n in (12, 3541, 3_541_200, 6_700_000_000)] == [
        "12",
        "3.54 k",
        "3.54 M",
        "6.7 B",
    ]
    assert [figure(v) for v in (0.000123456, 12.3456, 155_612.3, 7, None, "x")] == [
        "0.0001235",
        "12.35",
        "155,612",
        "7",
        "-",
        "x",
    ]


def test_a_report_may_hold_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.say("x [b, 2] [bold]")
    screen.table(["a", "b"], [["[red]", None]])
    screen.facts({"one": "[1]", "none": None})
    out = capsys.readouterr().out
    assert "x [b, 2] [bold]\n" in out
    assert "[red]" in out
    assert "  one  [1]\n" in out
    assert "none" not in out


def test_json_silences_every_report(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(as_json=True)
    screen.say("x")
    screen.table(["a"], [["b"]])
    screen.facts({"a": "b"}, "title")
    screen.progress.note("a note")
    screen.emit({"ü": 1})
    out, err = capsys.readouterr()
    assert out == '{\n  "ü": 1\n}\n'
    assert err == "a note\n"


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(as_json=True).emit({"perplexity": float("inf"), "rows": [float("nan"), 1.5]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "perplexity": None,
        "rows": [None, 1.5],
    }


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_bars_appear_only_when_work_takes_long(
    monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    monkeypatch.setattr(screen_module, "_PATIENCE", patience)
    stream = io.StringIO()
    progress = BarProgress(Console(file=stream, force_terminal=True, width=100))
    with progress.task("calibrating", total=2) as advance, progress.task("inner"):
        import time

        time.sleep(0.2)
        advance(1)
        time.sleep(0.2)
    assert ("calibrating" in stream.getvalue()) == (patience == 0.0)


def test_logs_get_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen_module, "_LOG_EVERY", 0.0)
    stream = io.StringIO()
    progress = BarProgress(Console(file=stream, force_terminal=False))
    with progress.task("calibrating", total=4) as advance:
        advance(1)
    assert stream.getvalue().startswith("calibrating: 25%, about ")


def test_warnings_of_libraries_are_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen().quiet_libraries(debug=False):
        warnings.warn("noise", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr() == ("", "")


def test_a_share_moves_a_bar() -> None:
    advanced: list[int] = []

    class Listener(SilentProgress):
        @contextmanager
        def task(self, title: str, total: int | None = None) -> Iterator[Advance]:
            assert (title, total) == ("capturing", 1000)
            yield advanced.append

    with share_task(Listener(), "capturing") as report:
        for share in (0.0, 0.25, 0.25, 0.2504, 1.0):
            report(share)
    assert advanced == [250, 750]
