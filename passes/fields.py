"""What the options of a pass or a backend look like in text: one value, and one field.

An option is a field of a frozen dataclass, with `-` for `_`.  Its annotation says what may be
written: `bool`, `int`, `float`, `str`, `Literal[...]`, a tuple of those (`tuple[int, ...]` or
`tuple[int, int]`), or a union of them with or without None.  Anything else can be set from Python
only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

from ..ir.errors import did_you_mean

# Everything a bare word may hold; the rest needs quotes.  A word may start with a digit: `64x64`.
WORD = re.compile(r"[\w.*?:/\[\]!@~+-]+")
_INTEGER = re.compile(r"[-+]?\d+", re.ASCII)
_NUMBER = re.compile(r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|inf)", re.ASCII)
_RESERVED = {"true": True, "false": False, "none": None}
_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_NAMES = {bool: "true|false", int: "integer", float: "number", str: "text"}
_REFUSED = object()


@dataclass(frozen=True, slots=True)
class Word:
    """One value as it was written: its text without quotes, and where it starts."""

    text: str
    position: int = 0
    quoted: bool = False


class RefusedValueError(ValueError):
    """What was written is no value of the option; the message starts with `takes`.

    Attributes:
        word: the word that is wrong; None where there is none.
    """

    def __init__(self, problem: str, word: Word | None) -> None:
        super().__init__(problem)
        self.word = word


@dataclass(frozen=True, slots=True)
class OptionType:
    """What one option accepts; made from a type hint by `OptionType.of`.

    Attributes:
        choices: the members of a Literal, in its order.
        scalars: which of bool, int, float and str any value of is accepted.
        optional: whether `none` is a value.
        items: the type of each item where a tuple is accepted.
        length: how many items that tuple has; None for any number.
    """

    choices: tuple[bool | int | str, ...] = ()
    scalars: tuple[type, ...] = ()
    optional: bool = False
    items: OptionType | None = None
    length: int | None = None

    @classmethod
    def of(cls, hint: object) -> OptionType:
        """Return the type that `hint` stands for; one that accepts nothing if it has no text form.

        Raises:
            TypeError: one text would stand for two values, as in `int | tuple[int, ...]`.
        """
        members = _members(hint)
        choices = tuple(m for c in members if typing.get_origin(c) is Literal for m in c.__args__)
        tuples = [m for m in members if typing.get_origin(m) is tuple]
        items, length = _items(tuples[0]) if len(tuples) == 1 else (None, None)
        found = cls(
            choices=tuple(c for c in choices if c is not None),
            scalars=tuple(kind for kind in _NAMES if kind in members),
            optional=type(None) in members or None in choices,
            items=items,
            length=length,
        )
        if items is not None and (
            set(found.scalars) & set(items.scalars)
            or any(items._scalar(Word(_spelling(c))) is not _REFUSED for c in found.choices)
        ):
            raise TypeError(f"{hint}: one item could be read as a tuple or as itself")
        return found

    def read(self, words: Sequence[Word]) -> object:
        """Return the value that `words` stand for.

        Raises:
            RefusedValueError: they stand for none; the message says what is legal.
        """
        if len(words) == 1 and (value := self._scalar(words[0])) is not _REFUSED:
            return value
        if self.items is not None:
            bare = [word.text for word in words if not word.quoted]
            return self._tuple(() if bare == ["none"] and self._none_is_empty else words)
        written = ",".join(word.text for word in words)
        raise RefusedValueError(self._refusal(written), words[0] if words else None)

    def write(self, value: object) -> str:
        """Return the text that `read` turns into `value`, in its canonical spelling."""
        if isinstance(value, tuple | list):
            if not value:
                return "none" if self._none_is_empty else ""
            return ",".join((self.items or OptionType()).write(item) for item in value)
        bare = _spelling(value)
        plain = not isinstance(value, str) or self._scalar(Word(bare)) == value
        return bare if plain and WORD.fullmatch(bare) else json.dumps(bare)

    def describe(self) -> str:
        """Return what may be written, as `passes NAME` shows it: `bits|2|3|4|8|none`."""
        parts = [_spelling(choice) for choice in self.choices]
        parts += [_NAMES[kind] for kind in self.scalars]
        if self.items is not None:
            inner = self.items.describe()
            inner = f"({inner})" if "|" in inner else inner
            parts.append(",".join([inner] * self.length) if self.length else f"{inner},...")
        return "|".join([*parts, "none"] if self.optional else parts) or "(from Python only)"

    @property
    def _none_is_empty(self) -> bool:
        """Whether `none` is the empty tuple: it is nothing else, neither here nor as an item."""
        if self.items is None or self.length is not None or self.optional:
            return False
        return self.items._scalar(Word("none")) is _REFUSED

    def _tuple(self, words: Sequence[Word]) -> tuple[object, ...]:
        items = self.items or OptionType()
        if self.length is not None and len(words) != self.length:
            problem = f"takes {self.describe()}: {self.length} values, not {len(words)}"
            raise RefusedValueError(problem, words[0] if words else None)
        values = tuple(items._scalar(word) for word in words)
        for word, value in zip(words, values, strict=True):
            if value is _REFUSED:
                raise RefusedValueError(self._refusal(word.text), word)
        return values

    def _scalar(self, word: Word) -> object:
        if word.quoted:
            return word.text if word.text in self.choices or str in self.scalars else _REFUSED
        if word.text == "none" and self.optional:
            return None
        for choice in self.choices:
            if _spelling(choice) in (word.text, _ALIASES.get(word.text)):
                return choice
        return self._open_scalar(word.text)

    def _open_scalar(self, text: str) -> object:
        if text in _RESERVED:
            return _RESERVED[text] if bool in self.scalars and text != "none" else _REFUSED
        if int in self.scalars and _INTEGER.fullmatch(text):
            return int(text)
        if float in self.scalars and _NUMBER.fullmatch(text):
            return float(text)
        return text if str in self.scalars else _REFUSED

    def _refusal(self, written: str) -> str:
        if not written:
            return f"takes {self.describe()}, and got no value"
        if written in _RESERVED and str in (*self.scalars, *(self.items or self).scalars):
            return f'takes {self.describe()}; for the text, write "{written}" with its quotes'
        spellings = [_spelling(choice) for choice in (self.items or self).choices]
        spellings += list(_RESERVED) if bool in self.scalars else []
        return f"takes {self.describe()}, not {written!r}{did_you_mean(written, spellings)}"


def _members(hint: object) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(m for part in typing.get_args(hint) for m in _members(part))
    return (hint,)


def _items(hint: object) -> tuple[OptionType | None, int | None]:
    """Return the item type and length of a tuple hint; (None, None) if its items differ in type."""
    arguments = typing.get_args(hint)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return OptionType.of(arguments[0]), None
    if not arguments or any(a != arguments[0] for a in arguments):
        return None, None
    return OptionType.of(arguments[0]), len(arguments)


def _spelling(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a class.

    Attributes:
        name: as it is written in text, `group-size`.
        attribute: the field's name, `group_size`.
        type: what may be written.
        default: the field's default; `dataclasses.MISSING` where the option must be given.
    """

    name: str
    attribute: str
    type: OptionType
    default: object

    @property
    def required(self) -> bool:
        """Whether the option has no default."""
        return self.default is dataclasses.MISSING

    def is_default(self, value: object) -> bool:
        """Whether `value` is the default, also in type: True is not 1."""
        return type(value) is type(self.default) and value == self.default


def options_of(kind: type[object]) -> Mapping[str, Option]:
    """Return the options of a dataclass, by the name that text gives them.

    Raises:
        TypeError: `kind` is no dataclass, or one text would stand for two values of an option.
    """
    hashable: Any = kind  # a class is, but mypy does not find `type[...]` to be Hashable
    return _options_of(hashable)


@functools.cache
def _options_of(kind: Any) -> Mapping[str, Option]:
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        name = field.name.replace("_", "-")
        found[name] = Option(name, field.name, OptionType.of(hints[field.name]), default)
    return found
