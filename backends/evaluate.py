"""How good an artifact is, and how far from a reference, measured in its own runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..ir.errors import DataError
from ..passes.data import Text, read_text, tokenize
from ..passes.metrics import CosineTally, TokenTally, mean_pool
from ..passes.progress import Progress, SilentProgress
from ..passes.tokenizer import Tokenizer, open_tokenizer
from .evaluation_data import item_chunks, read_arrays, read_pairs
from .generate import encoder_feeds, first_token
from .session import Array, Session, Tokens, check_kinds

DECODER_CONTEXT = 2048
ENCODER_CONTEXT = 256
_SILENT = SilentProgress()
# What is read of `evaluate`'s arguments for each kind of model; for all kinds with arrays alone.
_READ = {
    "decoder": ("text", "context", "tokens"),
    "encoder-decoder": ("text", "context", "tokens"),
    "encoder": ("text", "context"),
    "arrays": ("data",),
}


def evaluate(
    session: Session,
    *,
    text: Path | None = None,
    data: Path | None = None,
    against: Session | None = None,
    context: int | None = None,
    tokens: int | None = None,
    progress: Progress = _SILENT,
) -> dict[str, Any]:
    """Measure ``session`` on a file, as its kind asks, and return the figures by name.

    Decoders: ``tokens, perplexity, reference_perplexity, kl, top1_agreement``; encoder-decoders the
    same, on the targets of a ``.jsonl`` file.  Encoders: ``lines, cosine, cosine_min``.  Everything
    else: ``items, cosine, cosine_min`` on the arrays of an ``.npz`` file.

    Args:
        session: what is measured.
        text: UTF-8 text; for an encoder-decoder a ``.jsonl`` with ``source`` and ``target``.
        data: an ``.npz`` with one array per input, items along the first axis.
        against: the reference; decoders and encoder-decoders do without.
        context: tokens of a window or line at most (decoders 2048, encoders 256).
        tokens: use at most that many tokens of the text.
        progress: hears how far it is.

    Raises:
        DataError: the wrong kind of file, or one that holds too little; no reference where the
            figures are distances from one; an argument that says nothing to this kind of model.
    """
    check_kinds(session, against)
    by_arrays = session.kind in ("vision", "module") or (data is not None and text is None)
    way = "arrays" if by_arrays else session.kind
    _refuse_unread(way, {"text": text, "data": data, "context": context, "tokens": tokens})
    if by_arrays:
        arrays = read_arrays(_given(data, "--data", "an .npz file with one array per input"))
        return evaluate_arrays(session, arrays, _reference(against), progress)
    path = _given(text, "--text", "a text file")
    if session.kind == "encoder-decoder":
        return evaluate_pairs(session, read_pairs(path), against, context, tokens, progress)
    words = read_text(path)
    # Rows of token ids need no tokenizer.
    tokenizer = open_tokenizer(session.folder) if isinstance(words.documents[0], str) else None
    if session.kind == "encoder":
        lines = lines_of(words, tokenizer, _window(session, context, ENCODER_CONTEXT))
        return evaluate_lines(session, lines, _reference(against), progress)
    ids = tokenize(words, tokenizer, session.vocab_size)
    return evaluate_tokens(session, ids[:tokens].tolist(), against, context, progress)


def evaluate_tokens(
    session: Session,
    tokens: Sequence[int],
    against: Session | None = None,
    context: int | None = None,
    progress: Progress = _SILENT,
) -> dict[str, Any]:
    """Measure a decoder on ``tokens``, cut into windows that do not overlap.

    The window is the smaller of the model's maximum and ``context`` (2048).  Each window predicts
    all of its tokens but the first; the figures are means over these predictions, whose number is
    ``tokens`` of the result.

    Raises:
        DataError: fewer than two tokens.
    """
    window = _window(session, context, DECODER_CONTEXT)
    tally = TokenTally()
    with progress.task("evaluating", total=len(tokens)) as advance:
        for ids in windows(tokens, window):
            logits = _next_token_logits(session, ids)
            reference = None if against is None else _next_token_logits(against, ids)
            _add(tally, logits, ids[0, 1:], reference)
            advance(ids.shape[1])
    if not tally.tokens:
        raise DataError(
            f"the text has {len(tokens)} tokens, at least 2 are needed",
            remedy="give a longer text",
        )
    return asdict(tally.metrics())


def evaluate_lines(
    session: Session,
    lines: Sequence[Sequence[int]],
    against: Session,
    progress: Progress = _SILENT,
) -> dict[str, Any]:
    """Compare an encoder's mean-pooled embedding of each line (token ids) with the reference's."""
    tally = CosineTally()
    with progress.task("evaluating", total=len(lines)) as advance:
        for ids in lines:
            tokens = np.asarray([ids], dtype=np.int64)
            pair = (embedding(session, tokens), embedding(against, tokens))
            tally.add(*map(torch.from_numpy, pair))
            advance(1)
    if not tally.values:
        raise DataError("the text has no line that is not empty", remedy="give a longer text")
    metrics = tally.metrics()
    return {"lines": metrics.count, "cosine": metrics.cosine, "cosine_min": metrics.cosine_min}


def evaluate_pairs(
    session: Session,
    pairs: Sequence[tuple[str, str]],
    against: Session | None = None,
    context: int | None = None,
    tokens: int | None = None,
    progress: Progress = _SILENT,
) -> dict[str, Any]:
    """Measure an encoder-decoder on (source, target) texts; the decoder is given the true target.

    Raises:
        DataError: no pairs, or a configuration that does not say how a target begins.
    """
    tokenizer = open_tokenizer(session.folder)
    window = _window(session, context, DECODER_CONTEXT)
    tally = TokenTally()
    with progress.task("evaluating", total=len(pairs)) as advance:
        for source, target in pairs:
            left = None if tokens is None else tokens - tally.tokens
            if left is not None and left <= 0:
                break
            ids = tokenizer.encode(target, limit=window)[:left]
            if not ids:
                continue
            source_ids = tokenizer.encode(source, limit=window)
            logits = _forced_logits(session, source_ids, ids)
            reference = None if against is None else _forced_logits(against, source_ids, ids)
            _add(tally, logits, np.asarray(ids, dtype=np.int64), reference)
            advance(1)
    if not tally.tokens:
        raise DataError("no target has any token", remedy="give pairs of source and target")
    return asdict(tally.metrics())


def evaluate_arrays(
    session: Session,
    arrays: Mapping[str, Array],
    against: Session,
    progress: Progress = _SILENT,
) -> dict[str, Any]:
    """Compare all floating-point outputs, joined into one row per item, with the reference's."""
    tally = CosineTally()
    graph = next(iter(session.graphs))  # of an encoder-decoder that reads no text, the encoder
    chunks = list(item_chunks(session, graph, arrays))
    with progress.task("evaluating", total=len(chunks)) as advance:
        for feeds, items in chunks:
            rows = [_rows(one.run(feeds, graph), items) for one in (session, against)]
            tally.add(*map(torch.from_numpy, rows))
            advance(1)
    if not tally.values:
        raise DataError("the arrays hold no item", remedy="give arrays with items on axis 0")
    metrics = tally.metrics()
    return {"items": metrics.count, "cosine": metrics.cosine, "cosine_min": metrics.cosine_min}


def windows(tokens: Sequence[int], window: int) -> Iterator[Tokens]:
    """Cut tokens into windows ``[1, n]``, n at most ``window``; a last one of 1 is dropped."""
    for start in range(0, len(tokens), window):
        ids = np.asarray([tokens[start : start + window]], dtype=np.int64)
        if ids.shape[1] > 1:
            yield ids


def lines_of(text: Text, tokenizer: Tokenizer | None, limit: int) -> list[list[int]]:
    """Return the token ids of each line that is not empty, at most ``limit`` of them.

    Rows of token ids need no tokenizer.
    """
    lines: list[list[int]] = []
    for document in text.documents:
        if isinstance(document, str):
            assert tokenizer is not None
            full = (line for line in document.splitlines() if line.strip())
            lines += [tokenizer.encode(line, limit=limit) for line in full]
        else:
            lines.append(document[:limit].tolist())
    return lines


def embedding(session: Session, tokens: Tokens) -> Array:
    """Return the mean-pooled embedding ``[b, width]`` of ``tokens [b, s]``, without padding."""
    mask = np.ones_like(tokens)
    spec = session.graphs["main"]
    known = {
        "input_ids": tokens,
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(tokens),
    }
    names = [one.name for one in spec.inputs]
    if unknown := [name for name in names if name not in known]:
        raise DataError(
            f"{session.name}: reads {', '.join(unknown)}, not only text",
            remedy="give the inputs as arrays: --data inputs.npz",
        )
    results = session.run({name: known[name] for name in names})
    hidden = results.get("last_hidden_state", results[spec.outputs[0].name])
    if hidden.ndim == 2:
        return hidden
    pooled = mean_pool(torch.from_numpy(hidden), torch.from_numpy(mask))
    array: Array = pooled.numpy()
    return array


def _next_token_logits(session: Session, ids: Tokens) -> Array:
    """Return ``[n - 1, vocab]``: what each token of a window but the last one predicts."""
    logits, _ = session.decode(ids, np.ones_like(ids))
    return logits[0, :-1]


def _forced_logits(session: Session, source: Sequence[int], target: Sequence[int]) -> Array:
    """Return ``[n, vocab]``: what an encoder-decoder gives for each token of ``target [n]``."""
    tokens = np.asarray([source], dtype=np.int64)
    cache = session.encode(encoder_feeds(session, tokens, np.ones_like(tokens)))
    given = np.asarray([[first_token(session), *target[:-1]]], dtype=np.int64)
    logits, _ = session.decode(given, np.ones_like(given), cache)
    rows: Array = logits[0]
    return rows


def _add(tally: TokenTally, logits: Array, targets: Tokens, reference: Array | None) -> None:
    if reference is not None and reference.shape != logits.shape:
        raise DataError(
            f"the artifact has {logits.shape[-1]} tokens, the reference {reference.shape[-1]}",
            remedy="compare with the model that the artifact was made from",
        )
    other = None if reference is None else torch.from_numpy(reference)
    tally.add(torch.from_numpy(logits), torch.from_numpy(targets), other)


def _rows(results: Mapping[str, Array], items: int) -> Array:
    """Join the floating-point outputs into ``[items, all]``."""
    floats = [value for value in results.values() if np.issubdtype(value.dtype, np.floating)]
    if not floats:
        raise DataError("the model gives no floating-point output to compare")
    return np.concatenate([value.reshape(items, -1).astype(np.float64) for value in floats], axis=1)


def _window(session: Session, context: int | None, default: int) -> int:
    asked = default if context is None else context
    if asked < 2:
        raise DataError(f"a context of {asked} tokens predicts nothing", remedy="give at least 2")
    return asked if session.max_length is None else min(asked, session.max_length)


def _refuse_unread(way: str, given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if value is not None and name not in _READ[way]:
            on = "arrays" if way == "arrays" else f"an artifact of kind {way}"
            raise DataError(
                f"--{name} says nothing to an eval on {on}",
                remedy=f"leave it out; what is read is {', '.join(f'--{n}' for n in _READ[way])}",
            )


def _given(path: Path | None, option: str, what: str) -> Path:
    if path is None:
        raise DataError("nothing to measure on", remedy=f"give {what} with {option}")
    return path


def _reference(against: Session | None) -> Session:
    if against is None:
        raise DataError(
            "the figures of this kind of model are distances from a reference",
            remedy="give the model that the artifact was made from: --against MODEL",
        )
    return against
