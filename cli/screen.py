"""What the user sees: reports on stdout, everything else (progress, notes) on stderr."""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

_PATIENCE = 1.0  # seconds of silence before a bar appears: quick work needs none
_LOG_EVERY = 30.0  # seconds between lines where stderr is no terminal
_UNITS = ("B", "kB", "MB", "GB", "TB")


class Screen:
    """Prints the results of one command.

    With ``as_json`` stdout gets exactly one JSON value, from ``emit``, and every report is silent.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        from rich.console import Console

        self.as_json = as_json
        self.out: Console = Console(highlight=False, soft_wrap=True)
        self.err: Console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.progress = BarProgress(self.err)

    def emit(self, value: Any) -> None:
        """Print the command's result as JSON; a figure that is nan or infinite is null."""
        from ..backends.manifest import json_numbers

        plain = json_numbers(value)
        json.dump(plain, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False, default=str)
        sys.stdout.write("\n")

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line of the report; brackets in it are brackets."""
        if not self.as_json:
            self.out.print(text, style=style, markup=False)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        title: str | None = None,
        right: Sequence[str] = (),
    ) -> None:
        """Print a table; the columns named in ``right`` are aligned to the right."""
        if self.as_json:
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left")
        for row in rows:
            table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
        self.out.print(table, soft_wrap=False)

    def facts(self, pairs: Mapping[str, object], title: str | None = None) -> None:
        """Print names and values, one pair a line; a value of None is left out."""
        if self.as_json:
            return
        if title:
            self.say(title, style="bold")
        width = max((len(name) for name, value in pairs.items() if value is not None), default=0)
        for name, value in pairs.items():
            if value is not None:
                self.say(f"  {name:<{width}}  {value}")

    @contextmanager
    def quiet_libraries(self, *, debug: bool) -> Iterator[None]:
        """Show warnings of this package as notes on stderr, and hide those of libraries."""
        if debug:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, module=r"modelathe\b")
            warnings.showwarning = self._show_warning
            yield

    def _show_warning(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self.progress.note(f"warning: {message}")


class BarProgress:
    """Progress as a bar with the time left on a terminal, as a line now and then in a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: RichProgress | None = None
        self._lock = threading.Lock()  # bars appear from timers' threads

    @contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show a bar, once the work has lasted a second, until the block ends."""
        live = self._console.is_terminal
        bar = _Bar(self, title, total) if live else _LogLines(self._console, title, total)
        try:
            yield bar.advance
        finally:
            bar.close()

    def note(self, message: str) -> None:
        """Print a line above the bars."""
        self._console.print(message, markup=False)

    def bars(self) -> RichProgress:
        """Return the display that holds all bars, started."""
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        with self._lock:
            if self._bars is None:
                self._bars = Progress(
                    SpinnerColumn(),
                    TextColumn("{task.description}", markup=False),
                    BarColumn(bar_width=30),
                    TaskProgressColumn(),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                    console=self._console,
                    transient=True,
                )
                self._bars.start()
            return self._bars

    def stop_when_idle(self) -> None:
        """Take the display down when no bar is left."""
        with self._lock:
            if self._bars is not None and not self._bars.tasks:
                self._bars.stop()
                self._bars = None


class _Bar:
    def __init__(self, owner: BarProgress, title: str, total: int | None) -> None:
        self._owner, self._title, self._total = owner, title, total
        self._done = 0
        self._task: Any = None
        self._lock = threading.Lock()
        # A timer, because work of one long step would otherwise show nothing until its end.
        self._timer = threading.Timer(_PATIENCE, self._show)
        self._timer.daemon = True
        self._timer.start()

    def _show(self) -> None:
        with self._lock:
            if self._task is None:
                bars = self._owner.bars()
                self._task = bars.add_task(self._title, total=self._total, completed=self._done)

    def advance(self, amount: int = 1) -> None:
        with self._lock:
            self._done += amount
            if self._task is not None:
                self._owner.bars().update(self._task, completed=self._done)

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._task is not None:
                self._owner.bars().remove_task(self._task)
                self._owner.stop_when_idle()
            self._task = -1  # a timer that has fired already must not show it again


class _LogLines:
    def __init__(self, console: Console, title: str, total: int | None) -> None:
        self._console, self._title, self._total = console, title, total
        self._done = 0
        self._start = self._last = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        now = time.monotonic()
        share = self._done / self._total if self._total else 1.0
        if not 0 < share < 1 or now - self._last < _LOG_EVERY:
            return
        self._last = now
        left = (now - self._start) * (1 - share) / share
        line = f"{self._title}: {share:.0%}, about {left:.0f} s left"
        self._console.print(line, markup=False)

    def close(self) -> None:
        """Nothing was put up that would have to be taken down."""


def size_text(count: float | None) -> str:
    """Return bytes as people read them, in powers of 1000.

    >>> size_text(26_700_000)
    '26.7 MB'
    """
    if count is None:
        return "unknown"
    value, unit = float(count), 0
    while abs(value) >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    number = f"{value:.0f}" if unit == 0 or value >= 100 else f"{value:.3g}"
    return f"{number} {_UNITS[unit]}"


def count_text(count: int) -> str:
    """Return a large number as people read it.

    >>> count_text(3_541_200)
    '3.54 M'
    """
    for limit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {name}"
    return str(count)


def figure(value: object, digits: int = 4) -> str:
    """Return a measured number with ``digits`` significant digits; a dash for None.

    >>> figure(0.123456), figure(23456.7), figure(None)
    ('0.1235', '23,457', '-')
    """
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e15 else f"{value:.{digits}g}"
