"""Every exception this package raises on purpose.

A message says what was found, where (a name as the text form prints it) and what would be right.
`remedy` is one further line: what the user can do.  The command line prints both, and no traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ModelatheError(Exception):
    """Root of the tree, so that a caller can catch everything with one name.

    Attributes:
        remedy: one line that says what to do about it; empty where the message says it already.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class CaptureError(ModelatheError):
    """The model could not be turned into a program."""


class VerifyError(ModelatheError):
    """A program breaks an invariant of the IR.

    Attributes:
        invariant: the rule's name, as in `INVARIANTS`.
        where: the node or weight, as the text form prints it.
    """

    def __init__(self, invariant: str, where: str, detail: str, remedy: str = "") -> None:
        super().__init__(f"{where}: {detail} [{invariant}]", remedy)
        self.invariant = invariant
        self.where = where


class PassError(ModelatheError):
    """A pass refused its program or its options, or broke its contract."""


class FidelityError(ModelatheError):
    """Outputs moved further than a pass promises, or than a budget allows."""


class LoweringError(ModelatheError):
    """A program could not be lowered, or the artifact does not compute what the program does."""


class StorageError(ModelatheError):
    """A file or folder could not be read or written as it should."""


class DataError(ModelatheError):
    """Calibration or evaluation data is missing, malformed or too short."""


class SpecSyntaxError(ModelatheError):
    """The text of a pass, a pipeline or a backend does not follow the grammar.

    The message is the problem, the line of text and a caret below the offending place.

    Attributes:
        position: index into the text of the character that the caret points at.
    """

    def __init__(self, text: str, position: int, problem: str, remedy: str = "") -> None:
        start = text.rfind("\n", 0, position) + 1
        end = text.find("\n", position)
        source = text[start : end if end >= 0 else len(text)]
        # A tab in the source stays a tab in front of the caret, or the two would not line up.
        margin = "".join("\t" if c == "\t" else " " for c in text[start:position])
        number = text.count("\n", 0, position) + 1
        where = f"line {number}: " if "\n" in text.rstrip("\n") else ""
        super().__init__(f"{where}{problem}\n  {source}\n  {margin}^", remedy)
        self.position = position


def did_you_mean(word: str, legal: Iterable[str]) -> str:
    """Return `; did you mean 'spelling'?` for the nearest legal spelling, or nothing."""
    known = {name.lower(): name for name in legal}
    typed = word.lower().replace("_", "-")
    begins = [name for low, name in known.items() if typed and low.startswith(typed)]
    near = [known[low] for low in difflib.get_close_matches(typed, known, n=1, cutoff=0.6)]
    best = begins if len(begins) == 1 else near
    return f"; did you mean {best[0]!r}?" if best else ""
