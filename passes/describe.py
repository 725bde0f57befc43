"""What a pass or a backend says about itself, for `modelathe passes NAME`.

The convention: each option has an entry in the `Attributes:` section of the class docstring
(Google style); a class inherits the entries of its parents.  Nothing is written twice.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from .fields import Option, options_of

_ENTRY = re.compile(r"(?P<name>\w+)(?: \([^)]*\))?:\s*(?P<text>.*)")


@dataclass(frozen=True, slots=True)
class OptionText:
    """One option as a user reads it.

    Attributes:
        name: as it is written in text, `group-size`.
        type: what may be written, `bits|2|3|4|8|none`.
        default: the default in the same syntax; None where the option must be given.
        doc: its entry in the docstring, on one line; empty if there is none.
    """

    name: str
    type: str
    default: str | None
    doc: str


@dataclass(frozen=True, slots=True)
class Description:
    """A class as a user reads it.

    Attributes:
        name: its name in text.
        summary: the docstring's first line.
        details: the rest of the docstring without the options, paragraphs as written.
        options: in the order of the fields.
    """

    name: str
    summary: str
    details: str
    options: tuple[OptionText, ...]


def describe(kind: type[Any]) -> Description:
    """Return what `kind`, a dataclass with a `name`, says about itself."""
    body, _ = _split(inspect.cleandoc(kind.__doc__ or ""))
    summary, _, details = body.partition("\n")
    docs: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        docs |= _split(inspect.cleandoc(vars(parent).get("__doc__") or ""))[1]
    options = tuple(_option_text(option, docs) for option in options_of(kind).values())
    return Description(kind.name, summary.strip(), details.strip(), options)


def undocumented(kind: type[Any]) -> tuple[str, ...]:
    """Return the names of the options that have no entry in an `Attributes:` section."""
    return tuple(option.name for option in describe(kind).options if not option.doc)


def _option_text(option: Option, docs: dict[str, str]) -> OptionText:
    default = None if option.required else option.type.write(option.default)
    return OptionText(option.name, option.type.describe(), default, docs.get(option.attribute, ""))


def _split(docstring: str) -> tuple[str, dict[str, str]]:
    """Return the docstring without its `Attributes:` section, and the entries of that section."""
    body: list[str] = []
    entries: dict[str, str] = {}
    inside, name = False, ""
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            inside = line == "Attributes:"
            if inside:
                continue
        if not inside:
            body.append(line)
        elif match := _ENTRY.fullmatch(line.removeprefix("    ")):
            name = match["name"]
            entries[name] = match["text"]
        elif line.strip() and name:
            entries[name] += " " + line.strip()
    return "\n".join(body), entries
