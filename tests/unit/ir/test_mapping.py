"""Every tensor of a folder's files has a place in the model, or a reason to have none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelathe.ir import CaptureError, capture
from modelathe.ir.checkpoint import fake_model, read_config, stored_tensors
from modelathe.ir.mapping import Mapped, map_weights
from support.folders import tiny_seq2seq, write_folder

_COMMON = {"vocab_size": 16, "max_position_embeddings": 16}
_BERT = {
    **_COMMON,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_GPT_NEO = {
    **_COMMON,
    "hidden_size": 16,
    "num_layers": 1,
    "attention_types": [[["global"], 1]],
    "num_heads": 2,
}


def model_of(name: str, **settings: Any) -> Any:
    """Return a random model of a transformers class."""
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**settings)).eval()


def folder_of(
    path: Path, model: Any, *, architecture: str | None = None, extra: dict[str, Tensor]
) -> Path:
    """Write a model, further tensors beside it, and perhaps another class into its config."""
    write_folder(model, path)
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, **extra}, path / "model.safetensors", {"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    settings["architectures"] = [architecture or type(model).__name__]
    (path / "config.json").write_text(json.dumps(settings))
    return path


def mapped(folder: Path) -> Mapped:
    model, _ = fake_model(folder, read_config(folder))
    return map_weights(model, stored_tensors(folder), folder)


NORM = {"bert.encoder.layer.0.attention.self.q_norm.weight": torch.ones(8)}
LAYER = {"bert.encoder.layer.1.output.dense.weight": torch.ones(16, 16)}
HEAD = {"other.weight": torch.ones(8)}


@pytest.mark.parametrize("extra", [NORM, LAYER, HEAD], ids=["norm", "layer", "head"])
def test_a_tensor_without_a_place_is_an_error(tmp_path: Path, extra: dict[str, Tensor]) -> None:
    folder = folder_of(tmp_path, model_of("BertForMaskedLM", **_BERT), extra=extra)
    (name,) = extra
    message = f"{folder}: 1 tensors of its files have no place in BertForMaskedLM, such as {name}"
    with pytest.raises(CaptureError) as caught:
        capture(folder)
    assert str(caught.value) == message
    assert "architectures" in caught.value.remedy


def test_heads_of_other_classes_are_left_out_and_noted(tmp_path: Path) -> None:
    model = model_of("BertForPreTraining", **_BERT)
    found = capture(folder_of(tmp_path, model, architecture="BertForMaskedLM", extra={}))
    (note,) = found.origin.notes
    assert note.startswith("left out: 4 tensors of other models' heads, not of BertForMaskedLM: ")
    assert "bert.pooler.dense.bias" in note


def test_parameters_that_no_graph_reads_are_noted() -> None:
    model = model_of("BertForMaskedLM", **_BERT)
    model.tower = torch.nn.Linear(2, 2)
    (note,) = capture(model).origin.notes
    assert note == "not captured: 2 parameters that no graph reads, such as tower.bias"


def test_so_they_are_where_a_factory_makes_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("BertForMaskedLM", **_BERT)
    model.tower = torch.nn.Linear(2, 2)
    monkeypatch.setitem(sys.modules, "my_towers", SimpleNamespace(model=lambda: model))
    own, note = capture("my_towers:model").origin.notes
    assert own == "runs the user's own code: my_towers:model"
    assert note == "not captured: 2 parameters that no graph reads, such as tower.bias"


def test_a_base_model_leaves_out_what_its_prefix_does_not_cover(tmp_path: Path) -> None:
    model = model_of("BertForPreTraining", **_BERT)
    folder = folder_of(tmp_path, model, architecture="BertModel", extra=HEAD)
    found = mapped(folder)
    assert {name.partition(".")[0] for name in found.left_out} == {"cls", "other"}
    assert "pooler.dense.weight" in found.weights


def test_a_base_model_s_own_tensors_need_a_place(tmp_path: Path) -> None:
    model = model_of("BertForPreTraining", **_BERT)
    folder = folder_of(tmp_path, model, architecture="BertModel", extra=NORM)
    with pytest.raises(CaptureError, match="q_norm"):
        mapped(folder)


ATTENTION = "transformer.h.0.attn.attention"
STALE = {
    "a table of positions": (
        ("BertForMaskedLM", _BERT),
        {"bert.embeddings.position_ids": torch.arange(16)[None]},
    ),
    "masks of old releases": (
        ("GPTNeoForCausalLM", _GPT_NEO),
        {f"{ATTENTION}.bias": torch.ones(1, 1, 16, 16), f"{ATTENTION}.masked_bias": torch.ones(())},
    ),
    "what transformers names": (
        ("GPT2LMHeadModel", {"vocab_size": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}),
        {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)},
    ),
    "frequencies that have moved": (
        ("LlamaForCausalLM", _BERT),
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    ),
}


@pytest.mark.parametrize("case", STALE)
def test_what_the_model_computes_is_not_missed(tmp_path: Path, case: str) -> None:
    (name, settings), extra = STALE[case]
    found = mapped(folder_of(tmp_path, model_of(name, **settings), extra=extra))
    assert found.left_out == ()
    assert not set(extra) & set(found.weights)


def test_a_bias_is_not_taken_for_a_mask(tmp_path: Path) -> None:
    extra = {f"{ATTENTION}.out.bias": torch.ones(16)}
    folder = folder_of(tmp_path, model_of("GPTNeoForCausalLM", **_GPT_NEO), extra=extra)
    with pytest.raises(CaptureError, match=r"attention\.out\.bias"):
        mapped(folder)


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A translation model, whose sinusoidal positions transformers does not save."""
    return write_folder(tiny_seq2seq("marian"), tmp_path_factory.mktemp("marian"))


POSITIONS = "model.{}.embed_positions.weight"


def test_positions_that_are_never_saved_are_made_as_transformers_makes_them(marian: Path) -> None:
    from transformers import MarianMTModel

    names = [POSITIONS.format(part) for part in ("encoder", "decoder")]
    assert not set(names) & set(stored_tensors(marian))
    loaded = MarianMTModel.from_pretrained(marian)
    found = capture(marian)
    for name in names:
        assert torch.equal(found.weight(name).load(), loaded.get_parameter(name))


def test_a_decoder_is_taken_out_of_a_full_model_when_its_embedding_is_there(tmp_path: Path) -> None:
    """transformers itself draws that embedding at random: the files call it the shared one."""
    stored = stored_tensors(write_folder(tiny_seq2seq("bart"), tmp_path))
    model, _ = fake_model(tmp_path, {**read_config(tmp_path), "architectures": ["BartForCausalLM"]})
    with pytest.raises(CaptureError, match=r"decoder\.embed_tokens\.weight") as caught:
        map_weights(model, stored, tmp_path)
    assert "if model.shared.weight is that weight, write it under this name" in caught.value.remedy
    stored["model.decoder.embed_tokens.weight"] = stored["model.shared.weight"]
    found = map_weights(model, stored, tmp_path)
    assert "model.decoder.layers.0.fc1.weight" in found.weights
    assert "model.encoder.layers.0.fc1.weight" in found.left_out


def test_what_would_be_drawn_at_random_is_missing(marian: Path) -> None:
    model, _ = fake_model(marian, read_config(marian))
    stored = stored_tensors(marian)
    name = "model.encoder.layers.0.fc1.weight"
    del stored[name]
    model._keys_to_ignore_on_load_missing.add(r"fc1\.weight")
    with pytest.raises(CaptureError, match=r"1 of the model's weights.*fc1\.weight"):
        map_weights(model, stored, marian)
