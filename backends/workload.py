"""The work that is timed: a prompt and some new tokens, or one call of another model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .generate import SpecialTokens
from .session import Array, Session
from .signatures import TensorSpec

PROMPT_TOKENS = 128
NEW_TOKENS = 32
_OTHER_SIZE = 16  # of a symbolic size that is neither a batch nor a text length
_LENGTHS = ("sequence", "source", "target")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much text one round of work has; both within what the model has positions for."""

    prompt: int
    new: int

    @classmethod
    def of(cls, session: Session) -> Sizes:
        """Return the usual sizes, or smaller ones where the model has fewer positions."""
        limit = session.max_length or PROMPT_TOKENS + NEW_TOKENS
        prompt = max(1, min(PROMPT_TOKENS, limit // 2))
        return cls(prompt, max(1, min(NEW_TOKENS, limit - prompt)))


def run_once(session: Session) -> dict[str, float]:
    """Do one round of work and return the figures of the session's kind.

    The batch is 1; a user's own module is given the sizes that it was captured with.

    Returns:
        ``prefill`` and ``decode`` in tokens per second, or ``latency`` in seconds.
    """
    if session.kind not in ("decoder", "encoder-decoder"):
        (graph,) = session.graphs
        known = session.graphs[graph].sizes
        feeds = {spec.name: _feed(session, spec, known) for spec in session.graphs[graph].inputs}
        start = time.perf_counter()
        session.run(feeds, graph)
        return {"latency": time.perf_counter() - start}
    sizes = Sizes.of(session)
    start = time.perf_counter()
    cache, length = None, sizes.prompt
    tokens = _tokens(session, sizes.prompt)
    if session.kind == "encoder-decoder":
        feeds = {spec.name: _feed(session, spec, {}) for spec in session.graphs["encoder"].inputs}
        cache, length = session.encode(feeds), 1
        tokens = np.full((1, 1), SpecialTokens.of(session).start or 0, dtype=np.int64)
    logits, cache = session.decode(tokens, np.ones((1, length), dtype=np.int64), cache)
    prefilled = time.perf_counter()
    for step in range(sizes.new):
        tokens = logits[:, -1:].argmax(axis=-1)
        mask = np.ones((1, length + step + 1), dtype=np.int64)
        logits, cache = session.decode(tokens, mask, cache)
    done = time.perf_counter()
    return {
        "prefill": sizes.prompt / (prefilled - start),
        "decode": sizes.new / (done - prefilled),
    }


def _tokens(session: Session, length: int) -> Array:
    """Return ``[1, length]`` token ids, different ones and always the same."""
    vocabulary = session.vocab_size or 32
    return (np.arange(length, dtype=np.int64) * 7 % max(1, vocabulary))[None]


def _feed(session: Session, spec: TensorSpec, known: Mapping[str, int]) -> Array:
    """Return a value for an input: ids, ones for a mask, zeros or noise for anything else.

    Its sizes are those that are known, else a batch of 1; the session casts it.
    """
    shape = spec.known_sizes(known) or tuple(
        _extent(session, dim, axis) for axis, dim in enumerate(spec.shape)
    )
    if spec.name == "input_ids":
        return _tokens(session, shape[-1])
    if spec.name.endswith("mask"):
        return np.ones(shape, dtype=bool)
    if not spec.dtype.startswith(("float", "bfloat")):
        return np.zeros(shape, dtype=bool)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _extent(session: Session, dim: int | str, axis: int) -> int:
    if isinstance(dim, int):
        return dim
    if dim == "batch" or (axis == 0 and dim not in _LENGTHS):
        return 1
    return Sizes.of(session).prompt if dim in _LENGTHS else _OTHER_SIZE
