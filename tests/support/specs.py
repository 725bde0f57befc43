"""Small dataclasses with every kind of option, for the tests of the text syntax."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

DType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Fold nothing."""

    name: ClassVar[str] = "fold-norms"


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Remove blocks; give one of the two options.

    The text after the first line.

    Attributes:
        blocks: which blocks,
            counted from 0.
        count: how many.

    Source: a paper.
    """

    name: ClassVar[str] = "prune-blocks"
    blocks: tuple[int, ...] = ()
    count: int = 0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count is 0 or more, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """A parent with documented options.

    Attributes:
        only: globs of module paths.
    """

    only: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Quantize(Filtered):
    """Every kind of option.

    Attributes:
        bits: the width.
        head_bits: the width of the head.
    """

    name: ClassVar[str] = "quantize"
    bits: Literal[2, 3, 4, 8] = 4
    head_bits: Literal["bits", 2, 3, 4, 8] | None = "bits"
    clip: Literal["none", "weight"] = "weight"
    symmetric: bool = False
    ratio: float | None = 0.5
    label: str | None = "x"
    text: str = ""
    tile: str = "64x64"
    to: DType = "float32"
    keep: tuple[Literal["norms", "softmax"], ...] = ("norms",)
    shape: tuple[int, int] = (1, 2)
    limits: tuple[float, ...] | None = None
    words: tuple[str | None, ...] = ("a",)
    mixed: int | str = 1
    flag: bool | int = 1
    modes: tuple[Literal["none", "all"], ...] = ("all",)
    made: tuple[int, ...] = field(default_factory=lambda: (1, 2))


@dataclass(frozen=True, kw_only=True)
class Needy:
    """Has options without a default."""

    name: ClassVar[str] = "needy"
    first_one: int
    second: str


REGISTRY: dict[str, type] = {kind.name: kind for kind in (Fold, Prune, Quantize, Needy)}
