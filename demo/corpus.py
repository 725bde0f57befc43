"""The English of CPython's own standard library, split into training and held-out text."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HELD_OUT_MODULES = (
    "argparse",
    "collections",
    "configparser",
    "functools",
    "heapq",
    "ipaddress",
    "json",
    "pathlib",
    "statistics",
    "textwrap",
    "threading",
    "typing",
)
"""Modules that the model never sees: no docstring, comment, test or accelerator of theirs."""

SEPARATOR = "\n\n"
"""Between two docstrings (or comments) of one module."""

_SHORTEST_LEAK = 60
"""Shorter paragraphs, such as "Return a copy.", may stand in both halves."""

_SKIPPED_FOLDERS = frozenset({"site-packages", "__pycache__", "pydoc_data"})


@dataclass(frozen=True, slots=True)
class Document:
    """All docstrings, or all comments in prose, of one module.

    Attributes:
        name: The module's path in the standard library (`json/decoder.py`), or a topic's title.
        passages: The texts in source order.
    """

    name: str
    passages: tuple[str, ...]

    @property
    def text(self) -> str:
        """The passages, a blank line between two."""
        return SEPARATOR.join(self.passages)


@dataclass(frozen=True, slots=True)
class Corpus:
    """What the model is trained on, and what it is measured on."""

    training: tuple[Document, ...]
    held_out: tuple[Document, ...]


def collect(
    stdlib: Path | None = None, held_out_modules: Iterable[str] = HELD_OUT_MODULES
) -> Corpus:
    """Read the docstrings and the comments in prose below `stdlib`, the same on every call.

    Args:
        stdlib: A folder of Python modules.  Default: the running interpreter's standard library;
            then the topics of `pydoc` and the docstrings of compiled modules are added.
        held_out_modules: Names of modules whose docstrings become the held-out text.

    Returns:
        The corpus.  No passage occurs twice, and no passage of the training half holds a
        paragraph of `_SHORTEST_LEAK` characters or more that the held-out half holds too.
    """
    names = tuple(held_out_modules)
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    prose: list[Document] = []
    remarks: list[Document] = []
    held_out: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        source = path.read_bytes()
        name = relative.as_posix()
        if relative.parts[0].removesuffix(".py") in names:
            held_out.append(Document(name, tuple(docstrings(source))))
        elif not _belongs_to(relative.parts, names):
            prose.append(Document(name, tuple(docstrings(source))))
            remarks.append(Document(f"{name}#comments", tuple(comments(source))))
    if stdlib is None:
        prose = _topics() + prose + [d for d in _compiled() if not _belongs_to((d.name,), names)]
    seen: set[str] = set()
    kept = tuple(_without_repeats(held_out, seen, leaks=frozenset()))
    leaks = frozenset(p for d in kept for text in d.passages for p in _paragraphs(text))
    return Corpus(tuple(_without_repeats(prose + remarks, seen, leaks)), kept)


def docstrings(source: bytes) -> Iterator[str]:
    """Yield the cleaned docstrings of one file in source order; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the test suite has invalid escapes on purpose
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # some test files are broken on purpose
            return
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree) if isinstance(node, holders)]
    for node in sorted(found, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node):
            yield _tidy(text)


def comments(source: bytes) -> Iterator[str]:
    """Yield each run of whole-line comments that reads as prose: 12 words, few symbols."""
    run: list[str] = []
    last_line = -1
    try:
        tokens = list(tokenize.tokenize(io.BytesIO(source).readline))
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
        return
    for token in tokens:
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
            continue
        if token.start[0] != last_line + 1 and run:
            yield from _prose(run)
            run = []
        run.append(token.string)
        last_line = token.start[0]
    yield from _prose(run)


def _prose(lines: list[str]) -> Iterator[str]:
    """Yield the comment without its marks when it is a sentence and not code or a ruler."""
    text = _tidy("\n".join(re.sub(r"^#+:? ?", "", line) for line in lines))
    letters = sum(character.isalpha() or character in " ,.\n" for character in text)
    if len(re.findall(r"\b[a-z]{2,}\b", text)) >= 12 and letters >= 0.9 * len(text):
        yield text


def _topics() -> list[Document]:
    """Return the chapters of the language reference that `help("for")` shows."""
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    return [Document(f"topic {title}", (_tidy(topics[title]),)) for title in sorted(topics)]


def _compiled() -> Iterator[Document]:
    """Yield the docstrings of modules written in C, which no source file here holds."""
    folder = Path(sysconfig.get_paths()["platstdlib"], "lib-dynload")
    extensions = {path.name.partition(".")[0] for path in folder.glob("*.so")}
    for name in sorted(extensions | set(sys.builtin_module_names)):
        if name.startswith(("_test", "xx", "_xx")):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # built without the system library that it needs
            continue
        yield Document(name, tuple(_members(module)))


def _members(module: ModuleType) -> Iterator[str]:
    """Yield the docstrings of a compiled module, its functions, its classes and their methods."""
    if module.__doc__:
        yield _tidy(module.__doc__)
    for _, value in sorted(vars(module).items()):
        if not (inspect.isbuiltin(value) or inspect.isclass(value)):
            continue
        members = [m for _, m in sorted(vars(value).items())] if inspect.isclass(value) else []
        for item in [value, *members]:
            text = getattr(item, "__doc__", None)
            if isinstance(text, str) and (callable(item) or inspect.isdatadescriptor(item)):
                yield _tidy(text)


def _belongs_to(parts: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Tell whether a file is an accelerator, a variant or a test of one of the modules."""
    stems = (part.removesuffix(".py").lstrip("_") for part in parts)
    stems = (stem.removeprefix("test_").removeprefix("c_").lstrip("_") for stem in stems)
    return any(stem == name or stem.startswith(f"{name}_") for stem in stems for name in names)


def _without_repeats(
    documents: Iterable[Document], seen: set[str], leaks: frozenset[str]
) -> Iterator[Document]:
    """Yield the documents without passages seen before or holding a paragraph of `leaks`."""
    for document in documents:
        kept: list[str] = []
        for passage in document.passages:
            key = " ".join(passage.split())
            if key and key not in seen and leaks.isdisjoint(_paragraphs(passage)):
                seen.add(key)
                kept.append(passage)
        if kept:
            yield Document(document.name, tuple(kept))


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the long paragraphs of a text, spaces and line breaks evened out."""
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if len(key) >= _SHORTEST_LEAK:
            yield key


def _tidy(text: str) -> str:
    """Remove the indentation, blanks at line ends, runs of blank lines and odd characters."""
    lines = (line.rstrip() for line in inspect.cleandoc(text).splitlines())
    plain = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return plain.encode("utf-8", "ignore").decode("utf-8")  # no lone surrogates
