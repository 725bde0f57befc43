"""Text form of frozen dataclasses: the one syntax of passes, of recipes and of backends.

Grammar::

    specs  ::= [spec] (("," | NEWLINE) [spec])*          "#" starts a comment
    spec   ::= (NAME | MODULE ":" CLASS) ["{" option* "}"]
    option ::= NAME "=" [value ("," value)*]             separated by spaces or new lines
    value  ::= WORD | STRING                             a WORD may be a number, true, false or none

What the values of an option may be is in `fields.py`.  A class that is in no table is named by its
import path, `package.module:Class{...}`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, TypeVar

from ..ir.errors import ModelatheError, SpecSyntaxError, did_you_mean
from .fields import WORD, RefusedValueError, Word, options_of

_TOKEN = re.compile(
    rf"""(?P<skip>[ \t\r]+|\#[^\n]*)
       | (?P<newline>\n)
       | (?P<punct>[,{{}}=])
       | (?P<string>"(?:[^"\\\n]|\\.)*"|'[^'\n]*')
       | (?P<word>{WORD.pattern})""",
    re.VERBOSE,
)


class Named(Protocol):
    """A frozen dataclass with a name: a pass or a backend."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=Named)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    position: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One spec as written: its name, and each option's key with its values."""

    name: Word
    options: tuple[tuple[Word, tuple[Word, ...]], ...]


def parse(text: str, registry: Mapping[str, type[T]], base: type[object] = object) -> tuple[T, ...]:
    """Build the objects that `text` describes, in its order; empty text gives none.

    Args:
        text: one or more specs; a recipe file's content is one too.
        registry: the classes that have a short name.
        base: what a class named by its import path must derive from.  Its name is also what error
            messages call a spec: `unknown pass 'fold-norm'`.

    Raises:
        SpecSyntaxError: the text breaks the grammar, names something that does not exist, gives an
            option that the class does not take, or a value that the class refuses.
    """
    return tuple(_build(text, entry, registry, base) for entry in _Parser(text).entries())


def class_called(
    name: str, registry: Mapping[str, type[T]], base: type[object] = object
) -> type[T]:
    """Return the class that a spec of this name is of: a short name, or an import path.

    Raises:
        SpecSyntaxError: there is none.
    """
    return _find(name, Word(name, 0), registry, base)


def with_installed(
    ours: Mapping[str, type[T]], group: str, base: type[object], error: type[ModelatheError]
) -> dict[str, type[T]]:
    """Return our classes and those that installed packages offer, by name.

    Args:
        ours: the classes of this package.
        group: the entry-point group that others use.
        base: what an installed class must derive from.
        error: raised where one has a name that is taken, or is no such class.
    """
    found = dict(ours)
    for point in entry_points(group=group):
        loaded = point.load()
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            raise error(f"entry point {point.name} ({point.value}) is no {base.__name__.lower()}")
        kind: Any = loaded
        if found.setdefault(kind.name, kind) is not kind:
            raise error(
                f"two classes are called {kind.name}: {found[kind.name].__module__} and "
                f"{kind.__module__}",
                remedy="uninstall one of the packages, or write module:Class",
            )
    return found


def to_spec(value: Named, registry: Mapping[str, type[Any]] | None = None) -> str:
    """Return the text that `parse` turns into `value`; defaults are left out.

    A class from outside this package is written by its import path, unless `registry` has it.
    """
    kind = type(value)
    name = value.name
    if (registry or {}).get(name) is not kind and not _is_ours(kind):
        name = _import_path(kind) or name
    written = [
        f"{option.name}={option.type.write(current)}"
        for option in options_of(kind).values()
        if not option.is_default(current := getattr(value, option.attribute))
    ]
    return name + (f"{{{' '.join(written)}}}" if written else "")


class _Parser:
    """Recursive descent, one method per rule of the grammar."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(_tokens(text))
        self.index = 0

    @property
    def next(self) -> _Token:
        return self.tokens[self.index]

    def accept(self, kind: str, text: str | None = None) -> _Token | None:
        token = self.next
        if token.kind != kind or (text is not None and token.text != text):
            return None
        self.index += 1
        return token

    def error(self, problem: str, at: _Token | None = None) -> SpecSyntaxError:
        return SpecSyntaxError(self.text, (at or self.next).position, problem)

    def entries(self) -> Iterator[_Entry]:
        while not self.accept("eof"):
            if self.accept("punct", ",") or self.accept("newline"):
                continue
            yield self.entry()
            if self.next.kind not in ("newline", "eof") and self.next.text != ",":
                raise self.error("expected ',' or a new line before the next name")

    def entry(self) -> _Entry:
        name = self.accept("word")
        if name is None:
            raise self.error("expected a name")
        options = []
        if brace := self.accept("punct", "{"):
            while not self.accept("punct", "}"):
                options.append(self.option(brace))
        return _Entry(_word(name), tuple(options))

    def option(self, brace: _Token) -> tuple[Word, tuple[Word, ...]]:
        key = self.accept("word")
        if self.next.kind == "eof" or self.next.text == "{":
            raise self.error("this '{' is never closed", at=brace)
        if key is None:
            raise self.error("expected an option, key=value, or '}'")
        if not self.accept("punct", "="):
            if "\n" in self.text[brace.position : key.position]:
                raise self.error(f"this '{{' is not closed before {key.text!r}", at=brace)
            rule = "an option is written key=value, and several values key=a,b"
            raise self.error(f"expected '=' after {key.text!r}: {rule}")
        return _word(key), tuple(self.values())

    def values(self) -> Iterator[Word]:
        if self.next.text == "}" or self._at_key():
            return  # an empty tuple
        yield self.value()
        while comma := self.accept("punct", ","):
            if self._at_key():
                raise self.error("options are separated by spaces, not by commas", at=comma)
            yield self.value()

    def value(self) -> Word:
        token = self.accept("word") or self.accept("string")
        if token is None:
            raise self.error("expected a value")
        return _word(token) if token.kind == "word" else self.string(token)

    def string(self, token: _Token) -> Word:
        if token.text[0] == "'":
            return Word(token.text[1:-1], token.position, quoted=True)
        try:
            return Word(json.loads(token.text), token.position, quoted=True)
        except ValueError:
            problem = "a quoted string knows the escapes of JSON only; write a backslash as '\\\\'"
            raise self.error(problem, at=token) from None

    def _at_key(self) -> bool:
        # An index past the end cannot happen: the last token is eof, which is no word.
        return self.next.kind == "word" and self.tokens[self.index + 1].text == "="


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    depth = 0  # a new line inside braces is white space
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            quote = text[position] in "\"'"
            problem = "this quote is never closed" if quote else _unexpected(text[position])
            raise SpecSyntaxError(text, position, problem)
        kind = str(match.lastgroup)
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if kind != "skip" and not (kind == "newline" and depth > 0):
            yield _Token(kind, match.group(), position)
        position = match.end()
    yield _Token("eof", "", position)


def _unexpected(character: str) -> str:
    return f"unexpected {character!r}: a value that holds it is written in quotes"


def _word(token: _Token) -> Word:
    return Word(token.text, token.position)


def _build(text: str, entry: _Entry, registry: Mapping[str, type[T]], base: type[object]) -> T:
    kind = _find(text, entry.name, registry, base)
    remedy = _more_about(entry.name.text, registry, base)
    arguments = _arguments(text, entry, kind, remedy)
    required = [option for option in options_of(kind).values() if option.required]
    if missing := [option.name for option in required if option.attribute not in arguments]:
        needs = " and ".join(f"{name}=" for name in missing)
        problem = f"{entry.name.text} needs {needs}"
        raise SpecSyntaxError(text, entry.name.position, problem, remedy)
    try:
        return kind(**arguments)
    except ValueError as error:
        problem = f"{entry.name.text}: {error}"
        raise SpecSyntaxError(text, entry.name.position, problem, remedy) from error


def _more_about(name: str, registry: Mapping[str, type[Any]], base: type[object]) -> str:
    """Return where the options of a registered pass or backend are listed; "" for another."""
    command = {"Pass": "passes", "Backend": "backends"}.get(base.__name__)
    return where_options_are(name, command) if command and name in registry else ""


def where_options_are(name: str, command: str = "passes") -> str:
    """Return the remedy that names the command which lists the options of a pass or backend."""
    return f"see its options: modelathe {command} {name}"


def _arguments(text: str, entry: _Entry, kind: type[Any], more: str) -> dict[str, object]:
    options = options_of(kind)
    arguments: dict[str, object] = {}
    for key, values in entry.options:
        option = options.get(key.text)
        if option is None:
            problem = f"{entry.name.text} has no option {key.text!r}"
            problem += did_you_mean(key.text, options)
            remedy = _listed("its options", options) or "it has none"
            raise SpecSyntaxError(text, key.position, problem, remedy)
        if option.attribute in arguments:
            raise SpecSyntaxError(text, key.position, f"{key.text} is given twice")
        try:
            arguments[option.attribute] = option.type.read(values)
        except RefusedValueError as error:
            position = (error.word or key).position
            raise SpecSyntaxError(text, position, f"{key.text} {error}", more) from None
    return arguments


def _find(text: str, name: Word, registry: Mapping[str, type[T]], base: type[object]) -> type[T]:
    if name.text in registry:
        return registry[name.text]
    noun = "name" if base is object else base.__name__.lower()
    if ":" not in name.text:
        problem = f"unknown {noun} {name.text!r}{did_you_mean(name.text, registry)}"
        raise SpecSyntaxError(text, name.position, problem, _listed("known", sorted(registry)))
    try:
        found = _imported(name.text)
    except Exception as error:  # the user's own module may fail in any way
        remedy = "the module must be installed, or its folder must be on PYTHONPATH"
        problem = f"cannot import {name.text}: {type(error).__name__}: {error}"
        raise SpecSyntaxError(text, name.position, problem, remedy) from error
    if not _is_spec_class(found, base):
        problem = f"{name.text} is not a {noun}: it must be a frozen dataclass"
        problem += "" if base is object else f" that derives from {base.__name__}"
        raise SpecSyntaxError(text, name.position, problem)
    return found  # type: ignore[no-any-return]  # checked in the line above


def _listed(label: str, names: Sequence[str] | Mapping[str, object]) -> str:
    return f"{label}: {', '.join(names)}" if names else ""


def _imported(path: str) -> Any:
    module, _, qualified = path.partition(":")
    if not module or not qualified or module.startswith("."):
        raise ImportError("write package.module:Class")
    found: Any = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    return found


def _is_spec_class(found: object, base: type[object]) -> bool:
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        return False
    # A class that forgot its own @dataclass inherits the parent's and would lose its options.
    own = "__dataclass_fields__" in vars(found) or not inspect.get_annotations(found)
    frozen: bool = found.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return own and frozen and issubclass(found, base) and not inspect.isabstract(found)


def _is_ours(kind: type[object]) -> bool:
    return kind.__module__.split(".")[0] == __name__.split(".")[0]


def _import_path(kind: type[object]) -> str | None:
    """Return `package.module:Class`, or None for a class that cannot be reached that way."""
    found: object = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    return f"{kind.__module__}:{kind.__qualname__}" if found is kind else None
