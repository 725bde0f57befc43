"""The tokenizer of an artifact or model folder: text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..ir.errors import StorageError

_SLOW_FILES = (
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
)


class Tokenizer(Protocol):
    """Text to ids and back."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, limit: int | None = None
    ) -> list[int]:
        """Return the ids of ``text``, with the special tokens that the model expects around it.

        With ``limit``, a longer text is cut so that the special tokens still fit.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""


def open_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer in ``folder``.

    Raises:
        StorageError: there is none, or it cannot be read.
    """
    if (folder / "tokenizer.json").is_file():
        return _Fast(folder / "tokenizer.json")
    if any((folder / name).is_file() for name in _SLOW_FILES):
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
        except (ValueError, OSError) as error:
            raise StorageError(f"{folder}: its tokenizer cannot be opened ({error})") from error

    def encode(
        self, text: str, *, add_special_tokens: bool = True, limit: int | None = None
    ) -> list[int]:
        options = {"truncation": limit is not None, "max_length": limit, "verbose": False}
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens, **options))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
