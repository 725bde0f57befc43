"""Sizes as texts: numbers, names, and sums of products of those, such as ``past + 2*sequence``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Dims = tuple[int | str, ...]
Limits = tuple[int, int | None]  # the smallest and the largest value of a size; None: no largest


def evaluate(dim: int | str, value_of: Callable[[str], Any]) -> Any:
    """Return what a size is worth.

    Args:
        dim: a number, or a text of names and numbers.
        value_of: gives the value of a name, a number or a symbolic size.

    Returns:
        an ``int``, or what sums and products of the names' values are.
    """
    if isinstance(dim, int):
        return dim
    total: Any = 0
    for term in dim.split("+"):
        product: Any = 1
        for factor in term.split("*"):
            word = factor.strip()
            product = product * (int(word) if word.isdigit() else value_of(word))
        total = total + product
    return total
