"""Calibration and evaluation data: text or token ids in, windows of tokens out.

The last tenth of a text is kept for checks and never used to calibrate: `Text.split`.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..ir.errors import DataError

HELD_OUT = 0.1  # the share of a text, its end, that checks may use and calibration may not
USUAL_SAMPLES = 128  # windows to calibrate on where nobody says how many
_PLAIN = (".txt", ".md", ".rst", "")
_JSON_LINE = 'write {"text": "..."} on each line'


class Encoder(Protocol):
    """A tokenizer: transformers' own, or one of the `tokenizers` package with truncation off."""

    def encode(self, text: str, /, *, add_special_tokens: bool) -> Any:
        """Return the token ids of `text`, or an object whose `ids` they are."""


Tokenizer = Encoder | Callable[[str], Sequence[int]]


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Token ids in windows of equal length.

    Attributes:
        tokens: int64 [samples, length].
        source: where they come from, for remarks and the manifest.
        sha256: hash of the data they were taken from (of the file's bytes, where it is a file);
            with the seed it says which tokens these are.
    """

    tokens: Tensor
    source: str
    sha256: str

    @classmethod
    def of(cls, tokens: Tensor, source: str) -> TokenWindows:
        """Return windows that were made and not read; the hash is of the ids themselves."""
        tokens = tokens.to(device="cpu", dtype=torch.int64).contiguous()
        return cls(tokens, source, _sha256(tokens.numpy().astype("<i8").tobytes()))


@dataclass(frozen=True, eq=False)
class Text:
    """What `read_text` found.

    Attributes:
        documents: texts, or arrays of token ids (int64, one dimension); none of them is empty.
        source: the file, or what else it is.
        sha256: hash of the file's bytes, or of the documents.
    """

    documents: tuple[str, ...] | tuple[np.ndarray, ...]
    source: str
    sha256: str

    def split(self, held_out: float = HELD_OUT) -> tuple[Text, Text]:
        """Return the text without its last `held_out` share, and that share.

        Measured in characters, or in tokens.  A document that lies across the border is cut, at
        the next white space if there is any.  Either part may be empty.
        """
        border = round(sum(map(len, self.documents)) * (1 - held_out))
        first: list[Any] = []
        last: list[Any] = []
        start = 0
        for document in self.documents:
            cut = _word_end(document, min(max(border - start, 0), len(document)))
            first.append(document[:cut])
            last.append(document[cut:])
            start += len(document)
        share = f"{held_out:.0%}".replace("%", " %")
        return (
            Text(_filled(first), f"{self.source} without its last {share}", self.sha256),
            Text(_filled(last), f"the last {share} of {self.source}", self.sha256),
        )


TextSource = Text | str | Path | Iterable[str]


def read_text(source: TextSource) -> Text:
    """Return the text of `source`: a file, by its ending, or an iterable of documents.

    `.txt`, `.md`, `.rst` and files without an ending are one document of UTF-8 text; `.jsonl` has
    one JSON object with a `text` on each line; `.npy` holds token ids, one document per row.

    Raises:
        DataError: there is no such file, it is not what its ending says, or it holds no text.
    """
    if isinstance(source, Text):
        return source
    if isinstance(source, str | Path):
        return _read_file(Path(source))
    documents = tuple(source)
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            kind = type(document).__name__
            raise DataError(f"text {index} of the calibration texts is a {kind}, not a str")
    # The length in front tells ("ab", "c") from ("a", "bc").
    content = b"".join(b"%d\n%s" % (len(d.encode()), d.encode()) for d in documents)
    return _checked(Text(_filled(documents), f"{len(documents)} texts", _sha256(content)))


def tokenize(text: Text, tokenizer: Tokenizer | None, vocab_size: int | None = None) -> Tensor:
    """Return all tokens of `text` in a row: int64 [tokens].

    No special tokens are added, except the tokenizer's end-of-text token between documents.

    Args:
        text: texts, or token ids, which need no tokenizer.
        tokenizer: the model's own.
        vocab_size: the model's; an id at or above it is an error.

    Raises:
        DataError: there are texts and no tokenizer, or ids that the model does not have.
    """
    separator = [] if (end := getattr(tokenizer, "eos_token_id", None)) is None else [int(end)]
    pieces: list[np.ndarray] = []
    for document in text.documents:
        ids = _encode(document, tokenizer, text.source) if isinstance(document, str) else document
        pieces += [np.asarray(separator, np.int64)] * bool(pieces)
        pieces.append(np.asarray(ids, np.int64))
    tokens = torch.from_numpy(np.concatenate([*pieces, np.zeros(0, np.int64)]))
    if vocab_size is not None and len(tokens) and int(tokens.max()) >= vocab_size:
        found = f"token id {int(tokens.max())}, and the model knows ids below {vocab_size}"
        remedy = "use ids made by this model's own tokenizer"
        raise DataError(f"{text.source} holds {found}", remedy)
    return tokens


def choose_windows(tokens: Tensor, samples: int, length: int, seed: int) -> Tensor:
    """Return `samples` windows of `length` tokens that do not overlap, in their order in the text.

    Which ones depends on `seed` only: the row is cut into windows at a random offset, and
    `samples` of them are drawn.

    Args:
        tokens: int64 [tokens].
        samples: at least 1.
        length: at least 1.
        seed: any integer.

    Returns:
        int64 [samples, length].

    Raises:
        DataError: there are fewer than samples * length tokens.
    """
    slots = len(tokens) // length
    if slots < samples:
        needed = f"{samples} windows of {length} need {samples * length}"
        shorter = len(tokens) // samples
        other = f", or pass --calibration-length {shorter}" if shorter > 1 else ""
        other = f", or pass --calibration-samples {slots}" if slots else other
        remedy = f"give more text{other}"
        raise DataError(f"too little text: {len(tokens)} tokens, and {needed}", remedy)
    # Not torch's generator: Python documents that `random()` stays the same between releases.
    draw = random.Random(seed)
    offset = int(draw.random() * (len(tokens) - slots * length + 1))
    rest = tokens[offset : offset + slots * length].view(slots, length)
    ranked = sorted(range(slots), key=[draw.random() for _ in range(slots)].__getitem__)
    return rest[sorted(ranked[:samples])]


def leading_windows(tokens: Tensor, length: int, limit: int | None = None) -> Tensor:
    """Return windows of `length` tokens from the beginning, at most `limit` tokens in all.

    A text shorter than `length` is one shorter window; otherwise what is left over at the end,
    less than a window, is dropped.

    Returns:
        int64 [windows, length].

    Raises:
        DataError: there are fewer than 2 tokens, so nothing can be predicted.
    """
    if len(tokens) < 2:
        found = f"{len(tokens)} token{'s' * (len(tokens) != 1)}"
        raise DataError(
            f"too little text: {found}, and a check needs at least 2",
            "give more text, or another one to check with: --check-text FILE",
        )
    if length < 2:
        raise DataError(
            f"windows of {length} token predict nothing",
            "the model must have at least 2 positions: check max_position_embeddings",
        )
    length = min(length, len(tokens))
    windows = len(tokens) // length
    if limit is not None:
        windows = max(1, min(windows, limit // length))
    return tokens[: windows * length].view(windows, length)


def random_tokens(vocab_size: int, samples: int, length: int, seed: int) -> TokenWindows:
    """Return seeded random token ids below `vocab_size`, int64 [samples, length]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (samples, length), generator=generator)
    return TokenWindows.of(tokens, f"random tokens, seed {seed}")


def calibration_windows(
    source: TextSource,
    tokenizer: Tokenizer | None,
    *,
    samples: int | None,
    length: int,
    seed: int,
    vocab_size: int | None = None,
) -> TokenWindows:
    """Return random windows of `source` without its last tenth, as calibration uses them.

    `samples` of them; None stands for `USUAL_SAMPLES`, or as many as there are.

    Raises:
        DataError: see `read_text`, `tokenize` and `choose_windows`.
    """
    text, _ = read_text(source).split()
    row = tokenize(text, tokenizer, vocab_size)
    count = samples or min(USUAL_SAMPLES, max(1, len(row) // length))
    tokens = choose_windows(row, count, length, seed)
    return TokenWindows(tokens, text.source, text.sha256)


def check_windows(
    source: TextSource,
    tokenizer: Tokenizer | None,
    *,
    length: int,
    limit: int | None,
    whole: bool = False,
    vocab_size: int | None = None,
) -> TokenWindows:
    """Return the windows of `source` that checks are measured on, at most `limit` tokens.

    Args:
        source: the calibration text, of which only the last tenth is used, or a text of its own.
        tokenizer: the model's own.
        length: tokens in a window.
        limit: tokens in all; None for no limit.
        whole: use all of the text: it is not the one that calibration reads.
        vocab_size: the model's.

    Raises:
        DataError: see `read_text`, `tokenize` and `leading_windows`.
    """
    text = read_text(source)
    if not whole:
        text = text.split()[1]
    tokens = leading_windows(tokenize(text, tokenizer, vocab_size), length, limit)
    return TokenWindows(tokens, text.source, text.sha256)


def _read_file(path: Path) -> Text:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path") from error
    documents: tuple[str, ...] | tuple[np.ndarray, ...]
    if path.suffix == ".npy":
        documents = _token_rows(path, content)
    elif path.suffix == ".jsonl":
        documents = _json_lines(path, _decoded(path, content))
    elif path.suffix in _PLAIN:
        documents = (_decoded(path, content),)
    else:
        legal = ".txt (UTF-8), .jsonl (objects with `text`) or .npy (token ids)"
        raise DataError(f"{path}: cannot read {path.suffix} files as text", f"give a {legal}")
    return _checked(Text(_filled(documents), str(path), _sha256(content)))


def _decoded(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise DataError(f"{path} is not UTF-8: {byte}", "save it as UTF-8") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _json_lines(path: Path, text: str) -> tuple[str, ...]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}", _JSON_LINE) from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise DataError(f"{where}: expected an object with a string `text`", _JSON_LINE)
        documents.append(entry["text"])
    return tuple(documents)


def _token_rows(path: Path, content: bytes) -> tuple[np.ndarray, ...]:
    try:
        ids = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        message = f"{path} is no .npy file of numbers: {error}"
        raise DataError(message, "write it with numpy.save") from error
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        found = f"{ids.dtype} {list(ids.shape)}"
        message = f"{path} holds {found}; token ids are integers, [tokens] or [rows, tokens]"
        raise DataError(message, "save it again with numpy.save")
    limits = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if odd := [limit for limit in limits if not 0 <= limit < 2**63]:
        sign = "negative " if odd[0] < 0 else ""
        message = f"{path} holds the {sign}token id {odd[0]}"
        raise DataError(message, "give ids that the model knows, from 0 on")
    return tuple(np.atleast_2d(ids).astype(np.int64))


def _checked(text: Text) -> Text:
    if not text.documents:
        raise DataError(f"{text.source}: there is no text in it", "give a file with text")
    return text


def _filled(documents: Iterable[Any]) -> tuple[Any, ...]:
    """Return the documents without those that are empty or white space."""
    return tuple(d for d in documents if (d.strip() if isinstance(d, str) else len(d)))


def _word_end(document: str | np.ndarray, cut: int) -> int:
    """Return the first place at or after `cut` where a text may be cut without cutting a word."""
    if isinstance(document, str) and 0 < cut < len(document):
        while cut < len(document) and not document[cut].isspace():
            cut += 1
    return cut


def _encode(document: str, tokenizer: Tokenizer | None, source: str) -> Sequence[int]:
    if tokenizer is None:
        remedy = "give token ids as .npy"
        raise DataError(f"{source} is text, and the model has no tokenizer", remedy)
    encode = getattr(tokenizer, "encode", None)
    if encode is None:
        return tokenizer(document)  # type: ignore[operator]  # the other half of the union
    # transformers prints a warning on a text longer than the model's maximum; it is cut later.
    quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
    encoded = encode(document, add_special_tokens=False, **quiet)
    ids: Sequence[int] = getattr(encoded, "ids", encoded)
    return ids


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
