"""Which calls an ``only=`` or ``ignore=`` glob means."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from ..ir import PassError


def matches(path: str, pattern: str) -> bool:
    """Whether a glob matches any run of whole components of a dotted module path.

    >>> matches("transformer.h.3.mlp.c_fc", "h.*.mlp")
    True
    >>> matches("transformer.h.3.mlp.c_fc", "h.*.ml")
    False
    """
    parts, wanted = path.split("."), pattern.split(".")
    return any(
        all(map(fnmatchcase, parts[start:], wanted))
        for start in range(len(parts) - len(wanted) + 1)
    )


def check_globs(option: str, globs: object) -> None:
    """Check the value of an ``only`` or ``ignore`` field.

    Raises:
        ValueError: it is not a tuple of texts; one text alone would be read letter by letter.
    """
    if not isinstance(globs, tuple) or not all(isinstance(g, str) and g for g in globs):
        raise ValueError(f"{option} is a tuple of globs, got {globs!r}")


def check_matches(paths: Iterable[str], globs: Iterable[str], option: str) -> None:
    """Check that every glob matches something.

    Raises:
        PassError: one does not.
    """
    known = sorted(set(paths))
    for glob in globs:
        if not any(matches(path, glob) for path in known):
            example = f"; one is {known[len(known) // 2]}" if known else ""
            raise PassError(
                f'{option}="{glob}" matches none of the {len(known)} modules that the pass looks at'
                f"{example}",
                remedy="write whole components of a module path, such as h.*.mlp",
            )


def chosen(paths: Iterable[str], only: tuple[str, ...], ignore: tuple[str, ...]) -> bool:
    """Whether a thing that is read at ``paths`` is meant.

    Any of its readers may be named by ``only`` (none given: all are), and none by ``ignore``.
    """
    known = tuple(paths)
    wanted = not only or any(matches(path, glob) for path in known for glob in only)
    return wanted and not any(matches(path, glob) for path in known for glob in ignore)
