"""Tokenizers of model folders, and the token that they end a text with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelathe.ir import StorageError
from modelathe.ir.capture import replace_origin
from modelathe.passes import PassContext
from modelathe.passes.context import tokenizer_of
from modelathe.passes.data import read_text, tokenize
from modelathe.passes.tokenizer import open_tokenizer
from support.artifacts import STOP, WORDS, write_text_files
from support.models import program


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Hold a tokenizer of whole words; the configuration ends texts with the word ``end``."""
    write_text_files(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({}, STOP),  # of generation_config.json
        ({"config.json": {"eos_token_id": 4}}, 4),
        ({"config.json": {"eos_token_id": [5, 4]}}, 5),
        ({"tokenizer_config.json": {"eos_token": "c"}, "config.json": {"eos_token_id": 4}}, 2),
        ({"tokenizer_config.json": {"eos_token": {"content": "d"}}}, 3),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "b"}}, 1),
    ],
)
def test_the_end_of_a_text_is_what_the_folder_says(
    folder: Path, files: dict[str, dict[str, Any]], end: int
) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert open_tokenizer(folder).eos_token_id == end


def test_a_folder_that_names_no_end_has_none(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert open_tokenizer(folder).eos_token_id is None


def test_settings_that_cannot_be_read_are_an_error(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{oops")
    with pytest.raises(StorageError, match=r"tokenizer_config.json: cannot be read"):
        _ = open_tokenizer(folder).eos_token_id


def test_texts_of_calibration_end_with_it(folder: Path) -> None:
    found = replace_origin(program("llama"), folder=folder)
    context = PassContext(calibration=iter(["a b"] * 20), calibration_samples=1)
    row = context.calibration_tokens(found).tokens[0].tolist()
    assert [WORDS[token] for token in row[:6]] in (
        ["a", "b", "end"] * 2,
        ["b", "end", "a"] * 2,
        ["end", "a", "b"] * 2,
    )


def test_one_tokenizer_reads_for_passes_and_for_evaluation(folder: Path) -> None:
    text = read_text(["a b", "c"])
    own = tokenizer_of(replace_origin(program("llama"), folder=folder))
    assert tokenize(text, own).tolist() == [0, 1, STOP, 2]
    assert tokenize(text, open_tokenizer(folder)).tolist() == [0, 1, STOP, 2]
