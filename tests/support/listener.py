"""A listener to long work that remembers what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from modelathe.passes.progress import Advance


@dataclass
class Listener:
    """Remembers what it is told."""

    notes: list[str] = field(default_factory=list)
    tasks: dict[str, int] = field(default_factory=dict)

    def note(self, message: str) -> None:
        """Keep a line."""
        self.notes.append(message)

    @contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Count down to 0 what is announced."""

        def advance(amount: int) -> None:
            self.tasks[title] += amount

        self.tasks[title] = -(total or 0)
        yield advance
