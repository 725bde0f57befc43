"""Text generation with any session: greedy by default, or sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.config import end_tokens
from ..ir.errors import DataError
from .session import Array, Cache, Session, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: choose among that many most likely tokens; 0 for all.
        top_p: choose among the fewest tokens whose probabilities reach this sum; 1 for all.
        seed: equal seeds give equal texts.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top-k is at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is above 0 and at most 1, got {self.top_p}")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The ids that begin, end and fill a text; one behind an encoder begins with ``start``."""

    stop: frozenset[int]
    padding: int
    begin: int | None
    start: int | None
    forced_first: int | None

    @classmethod
    def of(cls, session: Session) -> SpecialTokens:
        """Read them from generation_config.json, and from config.json what that does not say."""
        generation = session.generation

        def value(key: str) -> Any:
            found = generation.get(key)
            return session.config.get(key) if found is None else found

        ends = frozenset(end_tokens(generation) or end_tokens(session.config))
        padding, begin = value("pad_token_id"), value("bos_token_id")
        start = value("decoder_start_token_id")
        return cls(
            ends,
            padding if isinstance(padding, int) and padding >= 0 else min(ends, default=0),
            begin,
            begin if start is None else start,
            value("forced_bos_token_id"),
        )


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the new token ids of each prompt, the end-of-text token included where it came.

    Args:
        session: a decoder, or an encoder-decoder, whose encoder reads the prompts.
        prompts: token ids; shorter ones are padded on the left.
        max_new_tokens: at most this many, and never more than the model has positions for.
        sampling: how tokens are chosen.
        on_token: called with (number of the prompt, token id) as tokens come.

    Raises:
        DataError: the session cannot generate, or a prompt is empty or too long.
    """
    special = SpecialTokens.of(session)
    tokens, mask, cache = _begin(session, prompts, special)
    limit = session.max_length
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - tokens.shape[1] + 1)
    if room < min(1, max_new_tokens):
        raise _too_long(tokens, limit)
    random = np.random.default_rng(sampling.seed)
    results: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for step in range(room):
        logits, cache = session.decode(tokens, mask, cache)
        chosen = choose(logits[:, -1], sampling, random)
        if step == 0 and session.kind == "encoder-decoder" and special.forced_first is not None:
            chosen[:] = special.forced_first
        for row in sorted(open_rows):
            token = int(chosen[row])
            results[row].append(token)
            if on_token is not None:
                on_token(row, token)
            if token in special.stop:
                open_rows.discard(row)
        if not open_rows:
            break
        tokens = chosen[:, None]
        mask = np.concatenate([mask, np.ones((len(prompts), 1), dtype=np.int64)], axis=1)
    return results


def choose(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> Tokens:
    """Return one token id per row of ``logits [b, vocab]``."""
    if sampling.temperature == 0:
        return np.asarray(logits.argmax(axis=-1), dtype=np.int64)
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, axis=-1, kind="stable")
    ranked = np.take_along_axis(scaled, order, axis=-1)
    probability = np.exp(ranked - ranked[:, :1])
    if sampling.top_k:
        probability[:, sampling.top_k :] = 0.0
    probability /= probability.sum(axis=-1, keepdims=True)
    # A token stays while those before it have not reached top_p; the first one always stays.
    before = probability.cumsum(axis=-1) - probability
    probability[before >= sampling.top_p] = 0.0
    edges = probability.cumsum(axis=-1)
    draw = random.random((len(logits), 1)) * edges[:, -1:]
    picked = np.minimum((edges <= draw).sum(axis=-1, keepdims=True), logits.shape[-1] - 1)
    return np.take_along_axis(order, picked, axis=-1)[:, 0].astype(np.int64)


def pad(
    prompts: Sequence[Sequence[int]], padding: int, *, left: bool = True
) -> tuple[Tokens, Tokens]:
    """Return tokens and mask, both ``[b, longest]``, of prompts of any lengths.

    Decoders are padded on the left, so that each row ends with its last token; encoders on the
    right, where learned positions begin at the first token.

    Raises:
        DataError: there is no prompt, or an empty one.
    """
    if not prompts or not all(prompts):
        raise DataError("the prompt is empty", remedy="give at least one word to continue")
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), padding, dtype=np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if left else slice(len(prompt))
        tokens[row, place] = prompt
        mask[row, place] = 1
    return tokens, mask


def _begin(
    session: Session, prompts: Sequence[Sequence[int]], special: SpecialTokens
) -> tuple[Tokens, Tokens, Cache | None]:
    """Return the first tokens, their mask and cache of a decoder."""
    _ = session.plan  # refuses what cannot generate, before anything else is said
    if session.kind == "decoder":
        begin = [] if special.begin is None else [special.begin]
        return *pad([list(prompt) or begin for prompt in prompts], special.padding), None
    tokens, mask = pad(prompts, special.padding, left=False)
    if session.max_length is not None and tokens.shape[1] > session.max_length:
        raise _too_long(tokens, session.max_length)
    cache = session.encode(encoder_feeds(session, tokens, mask))
    first = np.full((len(prompts), 1), first_token(session), dtype=np.int64)
    return first, np.ones_like(first), cache


def first_token(session: Session) -> int:
    """Return the id that the decoder of an encoder-decoder begins with.

    Raises:
        DataError: the configuration names none.
    """
    start = SpecialTokens.of(session).start
    if start is None:
        raise DataError(
            f"{session.name}: its configuration names no decoder_start_token_id",
            remedy="add it to generation_config.json",
        )
    return start


def _too_long(tokens: Tokens, limit: int | None) -> DataError:
    return DataError(
        f"the prompt has {tokens.shape[1]} tokens, the model has {limit} positions",
        remedy="shorten the prompt",
    )


def encoder_feeds(session: Session, tokens: Tokens, mask: Tokens) -> Mapping[str, Array]:
    """Return what the encoder of an encoder-decoder is given for padded texts.

    Raises:
        DataError: it reads something else than text.
    """
    names = [spec.name for spec in session.graphs["encoder"].inputs]
    known = {"input_ids": tokens, "attention_mask": mask}
    if unknown := [name for name in names if name not in known]:
        raise DataError(
            f"{session.name}: its encoder reads {', '.join(unknown)}, not text",
            remedy="call Session.encode and Session.decode from Python with such inputs",
        )
    return {name: known[name] for name in names}
