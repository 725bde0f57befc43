"""The small files that an artifact takes along from its model's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from modelathe.backends.companions import companion_names, write_companions
from modelathe.ir import checkpoint
from modelathe.ir.capture import replace_origin
from support.models import program

TOKENIZERS = (
    *("LlamaTokenizer", "DebertaV2Tokenizer", "FSMTTokenizer", "PhobertTokenizer"),
    *("BertTokenizer", "LukeTokenizer", "MBart50Tokenizer", "ProphetNetTokenizer"),
    *("RemBertTokenizer", "RoCBertTokenizer", "T5Tokenizer", "WhisperTokenizer"),
)


# Its class is there only where sentencepiece is.
MARIAN = {"source.spm", "target.spm", "vocab.json", "target_vocab.json", "tokenizer_config.json"}


@pytest.mark.parametrize("kind", ["MarianTokenizer", *TOKENIZERS])
def test_all_files_of_a_tokenizer_are_copied(kind: str, tmp_path: Path) -> None:
    marian = kind == "MarianTokenizer"
    names = MARIAN if marian else set(getattr(transformers, kind).vocab_files_names.values())
    source, out = tmp_path / "m", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    for name in (*names, "model.safetensors"):
        (source / name).write_text(name)
    found = replace_origin(program("norm-mlp"), folder=source)
    assert set(write_companions(found, out)) == set(companion_names(found)) == names
    assert {path.name: path.read_text() for path in out.iterdir()} == {n: n for n in names}


def test_the_configuration_is_the_programs_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("of the source")
    found = replace_origin(program("norm-mlp"), folder=tmp_path)
    assert companion_names(found) == []
    found.config = {"hidden_size": 3}
    (tmp_path / "out").mkdir()
    assert write_companions(found, tmp_path / "out") == companion_names(found) == ["config.json"]
    assert "hidden_size" in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("name", ["source.spm", "chat_template.jinja", "bpe.codes", "spm.model"])
def test_files_of_a_tokenizer_are_fetched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(text: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return "folder"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint.fetch("somebody/model", None, False)
    assert any(Path(name).match(pattern) for pattern in asked)
    assert not any(Path("model.bin").match(pattern) for pattern in asked)
