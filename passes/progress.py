"""How long work says how far it is, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]

_PARTS = 1000  # of work whose progress is a share


class Progress(Protocol):
    """A listener for long work.

    ``with progress.task("calibrating", total=8) as advance: advance(1)``.

    ``total`` counts the units that ``advance`` adds; None means that the end is not known.
    """

    def task(self, title: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Announce a piece of work; the context's value is called with each finished amount."""

    def note(self, message: str) -> None:
        """Tell the user one line, now: a choice that was made for them, a warning."""


@contextmanager
def share_task(progress: Progress, title: str) -> Iterator[Callable[[float], None]]:
    """Announce work that tells which share of it, 0 to 1, is done; the value takes such a share.

    ``with share_task(progress, "capturing") as report: capture(model, report=report)``.
    """
    with progress.task(title, total=_PARTS) as advance:
        told = 0

        def report(share: float) -> None:
            nonlocal told
            if (parts := int(share * _PARTS)) > told:
                advance(parts - told)
                told = parts

        yield report


class SilentProgress:
    """Nobody listens; what a library call uses unless it is given something else."""

    @contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Announce a piece of work to nobody."""
        yield _ignore

    def note(self, message: str) -> None:
        """Tell nobody."""


def _ignore(amount: int) -> None:
    """Take an amount and do nothing with it."""
