"""What is trained on: windows of text and of what the model wrote itself, in a fixed order."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...ir import DataError, Program
from ..context import PassContext
from ..data import TokenWindows

HELD_OUT = 0.05
_HELD_OUT_TOKENS = 4096  # of each source, at most: what early stop judges


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of one source.  Which ones step i reads depends on the seed and i only.

    Attributes:
        tokens: int64 [1, tokens], a row that is cut anew for every epoch, or int64
            [windows, length].
        length: tokens in a window.
        seed: of the order.
    """

    tokens: Tensor
    length: int
    seed: int
    _epochs: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def per_epoch(self) -> int:
        """How many windows are read before one is read again."""
        rows, width = self.tokens.shape
        # One window less than fit into a row leaves room for every offset.
        return rows if width == self.length else max(1, width // self.length - 1)

    def take(self, first: int, count: int) -> Tensor:
        """Return the windows ``first`` to ``first + count``, int64 [count, length]."""
        size = self.per_epoch
        rows = [self._epoch(index // size)[index % size] for index in range(first, first + count)]
        return torch.stack(rows) if rows else self.tokens.new_empty((0, self.length))

    def _epoch(self, number: int) -> Tensor:
        if number not in self._epochs:
            self._epochs.clear()  # one epoch is read at a time
            draw = random.Random(f"{self.seed}/{number}")
            rows = self.tokens
            if rows.shape[1] != self.length:
                offset = draw.randrange(rows.shape[1] - self.per_epoch * self.length + 1)
                end = offset + self.per_epoch * self.length
                rows = rows[0, offset:end].view(self.per_epoch, self.length)
            order = list(range(len(rows)))
            draw.shuffle(order)
            self._epochs[number] = rows[order]
        return self._epochs[number]


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a run.

    Attributes:
        sources: what is read, by name: ``text``, ``generated``.
        rows: windows of each source in a batch.
        held_out: windows that are never trained on, by name; int64 [windows, length].
    """

    sources: dict[str, Windows]
    rows: dict[str, int]
    held_out: dict[str, Tensor]

    def at(self, step: int) -> Tensor:
        """Return the windows of a step, int64 [rows, length]."""
        parts = [
            windows.take(step * self.rows[name], self.rows[name])
            for name, windows in self.sources.items()
        ]
        return torch.cat(parts)

    @property
    def tokens(self) -> int:
        """How many tokens a batch has."""
        return sum(self.rows[name] * windows.length for name, windows in self.sources.items())


def make_batches(
    text: TokenWindows | None,
    generated: TokenWindows | None,
    *,
    length: int,
    rows: int,
    mix: float,
    seed: int,
) -> Batches:
    """Divide each source into what is trained on and what is held out.

    Args:
        text: int64 [1, tokens], or windows of ``length``.
        generated: int64 [windows, length].
        length: tokens in a window.
        rows: windows in a batch.
        mix: share of them that is ``generated``.
        seed: of the order.

    Raises:
        DataError: there is too little to train on.
    """
    share = 1.0 if text is None else mix
    own = round(rows * share)
    if 0 < share < 1:
        if rows < 2:
            raise DataError(
                f"a batch of one window of {length} tokens is text or generated, not mix={mix:g}",
                remedy="use more tokens= and a larger batch=, a smaller length=, or mix=0.0",
            )
        own = min(max(own, 1), rows - 1)
    counts = {"text": rows - own, "generated": own}
    sources: dict[str, Windows] = {}
    held_out: dict[str, Tensor] = {}
    for name, given in (("text", text), ("generated", generated)):
        if given is None or not counts[name]:
            continue
        train, kept = _divided(given.tokens, length, given.source)
        sources[name] = Windows(train, length, seed)
        held_out[name] = kept[: max(1, _HELD_OUT_TOKENS // length)]
    return Batches(sources, {name: counts[name] for name in sources}, held_out)


def _divided(tokens: Tensor, length: int, source: str) -> tuple[Tensor, Tensor]:
    """Return what is trained on, and the last windows, which are not."""
    if tokens.shape[1] == length and len(tokens) > 1:
        kept = max(1, round(HELD_OUT * len(tokens)))
        return tokens[:-kept], tokens[-kept:]
    row = tokens.reshape(1, -1)
    kept = max(1, round(HELD_OUT * row.shape[1] / length)) * length
    if row.shape[1] < kept + 2 * length:
        raise DataError(
            f"too little text: {source} has {row.shape[1]} tokens, and windows of {length} to "
            f"train and to judge on need {kept + 2 * length}",
            remedy="give more text, or a smaller length=",
        )
    return row[:, :-kept], row[:, -kept:].view(-1, length)


def training_batches(
    program: Program,
    context: PassContext,
    *,
    tokens: int,
    batch: int,
    length: int,
    mix: float,
) -> Batches:
    """Make the batches that healing ``program`` reads.

    Args:
        program: whose origin writes the generated share.
        context: holds the text.
        tokens: of the whole run; the share ``mix`` of them is generated, all where there is no
            text, and at most 300 000, which are then read more than once.
        batch: tokens in a step, about.
        length: tokens in a window.
        mix: share of every batch that is generated where there is text; 0 unless the model is a
            decoder.

    Raises:
        DataError: there is no text, or too little.
    """
    text = context.training_text(program)
    alone = text is None
    if alone and program.kind != "decoder":
        raise DataError(
            f"{program.origin.model} ({program.kind}) writes no text to train on",
            remedy="pass a text: --calibration FILE",
        )
    if text is not None and text.tokens.shape[1] != length:
        text = TokenWindows(text.tokens.reshape(1, -1), text.source, text.sha256)
    share = 1.0 if alone else mix
    rows = max(1, batch // length)
    generated = None
    if share == 1 or (share > 0 and rows > 1):
        wanted = min(_POOL_TOKENS, max(1, round(share * tokens)))
        samples = max(2, -(-wanted // length))
        generated = context.generated_text(program, samples, length)
    return make_batches(text, generated, length=length, rows=rows, mix=share, seed=context.seed)


_POOL_TOKENS = 300_000
