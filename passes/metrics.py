"""How far two models are apart: pure functions of their outputs, and tallies that add them up.

Rows are positions: ``[n, vocab]`` logits, ``[n, width]`` embeddings.  Every sum is taken in
float64, over slices of rows, so that no float64 copy of a whole window is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_SLICE_ELEMENTS = 1 << 21  # 16 MiB of float64 per temporary


@dataclass(frozen=True, slots=True)
class TokenMetrics:
    """Mean figures over ``tokens`` predicted tokens; None where there was no reference.

    ``perplexity`` is exp(mean nats); ``kl`` the mean of KL(reference || model) in nats per token;
    ``top1_agreement`` the share of tokens (0 to 1) where both rank the same token first.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True, slots=True)
class CosineMetrics:
    """Mean and smallest cosine similarity over ``count`` rows."""

    count: int
    cosine: float
    cosine_min: float


@dataclass(slots=True)
class TokenTally:
    """Sums of per-token figures over any number of windows."""

    tokens: int = 0
    nats: float = 0.0
    reference_nats: float = 0.0
    kl: float = 0.0
    matches: int = 0
    compared: int = 0

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Add positions: ``logits [n, vocab]`` predict ``targets [n]``, as ``reference`` does."""
        for rows in _slices(logits.shape[0], logits.shape[-1]):
            mine = log_probabilities(logits[rows])
            self.nats += _nats(mine, targets[rows])
            self.tokens += mine.shape[0]
            if reference is None:
                continue
            theirs = log_probabilities(reference[rows])
            self.reference_nats += _nats(theirs, targets[rows])
            self.kl += float(kl_rows(theirs, mine).sum())
            self.matches += int((theirs.argmax(-1) == mine.argmax(-1)).sum())
            self.compared += mine.shape[0]

    def metrics(self) -> TokenMetrics:
        """Return the means.

        Raises:
            ValueError: nothing was added, or a reference was given for some windows only.
        """
        if not self.tokens:
            raise ValueError("no token was predicted")
        perplexity = _exp(self.nats / self.tokens)
        if not self.compared:
            return TokenMetrics(self.tokens, perplexity)
        if self.compared != self.tokens:
            raise ValueError(f"{self.compared} of {self.tokens} tokens had a reference")
        return TokenMetrics(
            self.tokens,
            perplexity,
            _exp(self.reference_nats / self.tokens),
            self.kl / self.tokens,
            self.matches / self.tokens,
        )


@dataclass(slots=True)
class CosineTally:
    """Cosine similarities of pairs of rows."""

    values: list[float] = field(default_factory=list)

    def add(self, rows: Tensor, reference: Tensor) -> None:
        """Add pairs: ``rows [n, width]`` against ``reference [n, width]``."""
        self.values += cosine_rows(rows, reference).tolist()

    def metrics(self) -> CosineMetrics:
        """Return mean and minimum.

        Raises:
            ValueError: nothing was added.
        """
        if not self.values:
            raise ValueError("no row was compared")
        mean = math.fsum(self.values) / len(self.values)
        return CosineMetrics(len(self.values), mean, min(self.values))


def log_probabilities(logits: Tensor) -> Tensor:
    """Return ``log_softmax`` of ``[n, vocab]`` logits in float64."""
    return torch.log_softmax(logits.double(), dim=-1)


def kl_rows(reference: Tensor, model: Tensor) -> Tensor:
    """Return KL(reference || model) in nats of each row of two ``[..., vocab]`` log-probabilities.

    A token that the reference gives no probability adds nothing (masked logits are -inf), neither
    to the value nor to the gradient.
    """
    probability = reference.exp()
    gap = torch.where(probability > 0, reference - model, 0.0)
    # Rounding may leave a sum of equal rows a hair below zero, where no divergence is.
    return (probability * gap).sum(-1).clamp_min(0.0)


def cosine_rows(rows: Tensor, reference: Tensor) -> Tensor:
    """Return the cosine similarity of each pair of rows, float64, at most 1.

    Two zero rows agree (1.0); a zero row and another one do not (0.0).
    """
    a, b = rows.double(), reference.double()
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    both_zero = (a == 0).all(-1) & (b == 0).all(-1)
    cosine = (a * b).sum(-1) / torch.where(norms > 0, norms, 1.0)
    return torch.where(both_zero, 1.0, cosine.clamp(-1.0, 1.0))


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the positions where ``mask [b, s]`` is 1: ``[b, s, d] -> [b, d]``."""
    weight = mask.to(torch.float64).unsqueeze(-1)
    return (hidden.double() * weight).sum(1) / weight.sum(1).clamp_min(1.0)


def _nats(log_probability: Tensor, targets: Tensor) -> float:
    picked = log_probability.gather(-1, targets.long().unsqueeze(-1))
    return -float(picked.sum())


def _exp(nats: float) -> float:
    return math.inf if nats >= 700.0 else math.exp(nats)


def _slices(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _SLICE_ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, start + step)
