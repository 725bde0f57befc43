"""A table with a row for each tiny random model of ``architectures.py``."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from architectures import ARCHITECTURES, Architecture


class Row(Protocol):
    """What was found out about one model."""

    def cells(self) -> list[str]:
        """Return the row as texts, one for each column."""
        ...


R = TypeVar("R", bound=Row)


def print_table(
    about: str | None, head: Sequence[str], measure: Callable[[Architecture], R]
) -> list[R]:
    """Measure the models that the command line names, or all, and print each row when it is there.

    Args:
        about: what ``--help`` says.
        head: titles of the columns.
        measure: makes the row of a model.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("names", nargs="*", help="rows to measure; all by default")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if unknown := set(arguments.names) - set(ARCHITECTURES):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    separator = " | " if arguments.markdown else "  "
    print(separator.join(head))
    if arguments.markdown:
        print(separator.join("---" for _ in head))
    rows = []
    for architecture in ARCHITECTURES.values():
        if not arguments.names or architecture.name in arguments.names:
            rows.append(measure(architecture))
            print(separator.join(rows[-1].cells()), flush=True)
    return rows
