"""The tokenizer of an artifact or model folder: text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..ir.errors import StorageError

_FAST_FILE = "tokenizer.json"
_SLOW_FILES = (
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "source.spm",
)


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None where the model has none."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, limit: int | None = None
    ) -> list[int]:
        """Return the ids of ``text``, with the special tokens that the model expects around it.

        With ``limit``, a longer text is cut so that the special tokens still fit.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds files of a tokenizer."""
    return any((folder / name).is_file() for name in (_FAST_FILE, *_SLOW_FILES))


def open_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer in ``folder``.

    Raises:
        StorageError: there is none, or it cannot be read.
    """
    if (folder / _FAST_FILE).is_file():
        return _Fast(folder / _FAST_FILE)
    if has_tokenizer(folder):
        return _Slow(folder)
    raise StorageError(
        f"{folder}: has no tokenizer",
        remedy="copy the model's tokenizer files (tokenizer.json) into the folder",
    )


class _Fast:
    """``tokenizer.json``, without the second that importing transformers takes."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError:
            raise
        except Exception as error:  # tokenizers raises plain Exception for a file it cannot read
            raise StorageError(f"{path}: is not a tokenizer ({error})") from error
        self._tokenizer.no_padding()
        self._folder = path.parent

    @property
    def eos_token_id(self) -> int | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _settings(self._folder / name).get("eos_token")
            text = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(text, str):
                found: int | None = self._tokenizer.token_to_id(text)
                return found
        return _configured_end(self._folder)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, limit: int | None = None
    ) -> list[int]:
        if limit is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(max_length=limit)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class _Slow:
    """Whatever transformers finds in the folder; the folder's own code is never run."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # a tokenizer's constructor raises nearly anything
            raise StorageError(f"{folder}: its tokenizer cannot be opened ({error})") from error
        self._folder = folder

    @property
    def eos_token_id(self) -> int | None:
        found: int | None = self._tokenizer.eos_token_id
        return _configured_end(self._folder) if found is None else found

    def encode(
        self, text: str, *, add_special_tokens: bool = True, limit: int | None = None
    ) -> list[int]:
        options = {"truncation": limit is not None, "max_length": limit, "verbose": False}
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens, **options))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def _configured_end(folder: Path) -> int | None:
    """Return the token that ends a text as the model's configuration says; the first of several."""
    for name in ("config.json", "generation_config.json"):
        found = _settings(folder / name).get("eos_token_id")
        first = found[0] if isinstance(found, list) and found else found
        if isinstance(first, int):
            return first
    return None


def _settings(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; nothing where there is no file.

    Raises:
        StorageError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read ({error})", remedy="fetch it again") from error
    if not isinstance(found, dict):
        raise StorageError(f"{path}: holds no JSON object", remedy="fetch it again")
    return found
