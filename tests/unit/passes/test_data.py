from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelathe.ir.errors import DataError
from modelathe.passes.data import (
    TokenWindows,
    calibration_windows,
    check_windows,
    choose_windows,
    leading_windows,
    random_tokens,
    read_text,
    tokenize,
)


class Letters:
    """A tokenizer: one token per character."""

    eos_token_id = 0

    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]


def letters(text: str) -> Sequence[int]:
    return [ord(character) for character in text]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_is_one_document_with_the_hash_of_its_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffone\r\ntwo\n")
    text = read_text(path)
    assert text.documents == ("one\ntwo\n",)
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert text.source == str(path)
    assert read_text(text) is text


def test_jsonl_is_one_document_per_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a\u2028b"}\n\n{"text": " "}\n{"text": "c"}\n')
    assert read_text(path).documents == ("a\u2028b", "c")


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_npy_is_token_ids(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.uint16).reshape(shape))
    found = tokenize(read_text(tmp_path / "a.npy"), None)
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 1, 2, 3, 4, 5]


def test_an_iterable_is_read_once_and_its_hash_tells_documents_apart() -> None:
    assert read_text(iter(["ab", "c"])).documents == ("ab", "c")
    assert read_text(["ab", "c"]).sha256 == read_text(("ab", "c")).sha256
    assert read_text(["ab", "c"]).sha256 != read_text(["a", "bc"]).sha256


def npy(array: np.ndarray[Any, Any], *, pickled: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=pickled)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", "is not UTF-8: byte 0xff at offset 3"),
        ("a.txt", b"\xff\xfea\x00", "is not UTF-8: byte 0xff at offset 0"),
        ("a.txt", b"", "there is no text in it"),
        ("a.txt", b" \n\t", "there is no text in it"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"texts": "a"}\n', "line 3: expected an object"),
        ("a.jsonl", b"[1]", "line 1: expected an object"),
        ("a.jsonl", b'{"text": "\xff"}', "is not UTF-8"),
        ("a.npy", npy(np.array([1.5])), "holds float64 [1]; token ids are integers"),
        ("a.npy", npy(np.zeros((1, 1, 1), int)), "holds int64 [1, 1, 1]"),
        ("a.npy", npy(np.array([3, -1])), "holds the negative token id -1"),
        (
            "a.npy",
            npy(np.array([3, 2**64 - 1], np.uint64)),
            "holds the token id 18446744073709551615",
        ),
        ("a.npy", npy(np.array([{}]), pickled=True), "is no .npy file of numbers"),
        ("a.npy", npy(np.arange(9))[:-8], "is no .npy file of numbers"),
        ("a.npy", b"", "is no .npy file of numbers"),
        ("a.npy", npy(np.zeros(0, int)), "there is no text in it"),
        ("a.parquet", b"a", "cannot read .parquet files as text"),
    ],
)
def test_a_bad_file_is_an_error_that_says_where(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_text(write(tmp_path / name, content))
    assert caught.value.remedy


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*missing\.txt: No such file"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="Is a directory"):
        read_text(tmp_path)


def test_an_iterable_of_anything_but_texts_is_an_error() -> None:
    with pytest.raises(DataError, match="text 1 of the calibration texts is a int"):
        read_text(["a", 1])  # type: ignore[list-item]
    with pytest.raises(DataError, match="there is no text in it"):
        read_text([])


def test_the_last_tenth_is_split_off_between_words() -> None:
    words = " ".join(f"word{number:03}" for number in range(97))  # 10 % end inside word 87
    first, last = read_text([words]).split()
    assert first.documents[0] + last.documents[0] == words
    assert first.documents[0].endswith(" word087")
    assert last.documents[0].startswith(" word088")
    assert first.source == "1 texts without its last 10 %"
    assert last.source == "the last 10 % of 1 texts"


def test_the_split_is_measured_over_all_documents() -> None:
    first, last = read_text(["a" * 50, "b " * 20, "c" * 10]).split(0.1)
    assert first.documents == ("a" * 50, "b " * 20)
    assert last.documents == ("c" * 10,)


def test_token_ids_are_split_at_the_exact_token(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100))
    first, last = read_text(tmp_path / "a.npy").split()
    assert tokenize(first, None).tolist() == list(range(90))
    assert tokenize(last, None).tolist() == list(range(90, 100))


def test_documents_are_joined_by_the_end_of_text_token() -> None:
    text = read_text(["ab", "c"])
    assert tokenize(text, Letters()).tolist() == [97, 98, 0, 99]
    assert tokenize(text, letters).tolist() == [97, 98, 99]


def test_a_tokenizer_of_the_tokenizers_package_is_taken() -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"a": 7}, unk_token="a"))
    assert tokenize(read_text(["a"]), tokenizer).tolist() == [7]


def test_text_without_a_tokenizer_is_an_error() -> None:
    with pytest.raises(DataError, match="is text, and the model has no tokenizer"):
        tokenize(read_text(["a"]), None)


def test_an_id_that_the_model_does_not_have_is_an_error() -> None:
    with pytest.raises(DataError, match="token id 98, and the model knows ids below 98"):
        tokenize(read_text(["ab"]), letters, vocab_size=98)
    assert tokenize(read_text(["ab"]), letters, vocab_size=99).tolist() == [97, 98]


@pytest.mark.parametrize(("tokens", "samples", "length"), [(100, 3, 7), (21, 3, 7), (25, 3, 7)])
def test_windows_do_not_overlap_and_depend_on_the_seed_only(
    tokens: int, samples: int, length: int
) -> None:
    row = torch.arange(tokens)
    found = choose_windows(row, samples, length, seed=1)
    assert found.shape == (samples, length)
    assert torch.equal(found, choose_windows(row, samples, length, seed=1))
    assert (found.diff(dim=1) == 1).all()
    assert (found[:, 0].diff() >= length).all()


def test_another_seed_gives_other_windows_and_every_token_can_be_chosen() -> None:
    row = torch.arange(25)
    drawn = [choose_windows(row, 2, 7, seed=seed) for seed in range(60)]
    assert len({tuple(windows.flatten().tolist()) for windows in drawn}) > 10
    assert {int(token) for windows in drawn for token in windows.flatten()} == set(range(25))


def test_the_choice_stays_the_same_between_releases() -> None:
    assert choose_windows(torch.arange(104), 3, 10, seed=0)[:, 0].tolist() == [24, 44, 64]


def test_too_little_text_says_how_much_there_is_and_is_needed() -> None:
    message = "too little text: 20 tokens, and 3 windows of 7 need 21"
    with pytest.raises(DataError, match=message) as caught:
        choose_windows(torch.arange(20), 3, 7, seed=0)
    assert caught.value.remedy == "give more text, or pass --calibration-samples 2"
    with pytest.raises(DataError, match="6 tokens") as caught:
        choose_windows(torch.arange(6), 3, 7, seed=0)
    assert caught.value.remedy == "give more text, or pass --calibration-length 2"


def test_leading_windows_start_at_the_beginning() -> None:
    assert leading_windows(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert leading_windows(torch.arange(7), 3, limit=5).tolist() == [[0, 1, 2]]
    assert leading_windows(torch.arange(7), 3, limit=1).tolist() == [[0, 1, 2]]
    assert leading_windows(torch.arange(2), 3).tolist() == [[0, 1]]
    with pytest.raises(DataError, match="1 token, and a check needs at least 2"):
        leading_windows(torch.arange(1), 3)
    with pytest.raises(DataError, match="windows of 1 token predict nothing"):
        leading_windows(torch.arange(9), 1)


def test_checks_and_calibration_share_no_token(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(1000))
    path = str(tmp_path / "a.npy")
    used = calibration_windows(path, None, samples=90, length=10, seed=0)
    checked = check_windows(path, None, length=8, limit=1000)
    assert used.tokens.max() < 900 <= checked.tokens.min()
    assert used.sha256 == checked.sha256 == read_text(path).sha256
    assert checked.tokens.shape == (12, 8)
    assert checked.source == f"the last 10 % of {path}"
    assert check_windows(path, None, length=8, limit=None, whole=True).tokens.min() == 0


def test_random_tokens_depend_on_the_seed_only() -> None:
    found = random_tokens(50, samples=4, length=30, seed=3)
    again = random_tokens(50, samples=4, length=30, seed=3)
    other = random_tokens(50, samples=4, length=30, seed=4)
    assert found.tokens.shape == (4, 30)
    assert found.tokens.dtype == torch.int64
    assert 0 <= found.tokens.min() <= found.tokens.max() < 50
    assert torch.equal(found.tokens, again.tokens)
    assert found.sha256 == again.sha256 != other.sha256
    assert found.source == "random tokens, seed 3"


def test_the_hash_of_made_tokens_is_of_the_ids() -> None:
    tokens = torch.tensor([[1, 2]])
    assert TokenWindows.of(tokens, "x").sha256 == TokenWindows.of(tokens.int(), "y").sha256


def test_a_long_text_prints_no_warning_of_the_tokenizer(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=8)
    assert len(tokenize(read_text(["a " * 100]), tokenizer)) == 100
    assert not caplog.records
    assert capsys.readouterr().err == ""
