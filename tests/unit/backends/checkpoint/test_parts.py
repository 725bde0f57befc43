"""Switches of the configuration, names in files, parts of files, rules undone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modelathe.backends import Checkpoint
from modelathe.backends.checkpoint import files
from modelathe.backends.checkpoint.architecture import empty_model
from modelathe.backends.checkpoint.assign import undo
from modelathe.backends.checkpoint.files import file_entries, write_weights
from modelathe.ir import ComputedWeight, LoweringError, Program, TensorWeight, capture, save_program
from modelathe.passes import FoldNorms
from support.checkpoints import linear_at, parameters, round_trip
from support.feeds import decoder_outputs, feed
from support.folders import tiny_bert, tiny_seq2seq, write_folder
from support.models import _LLAMA, Transformer, canonical, perturb
from support.numeric import rounding, worst_error


def _with_bias(program: Program, path: str) -> Tensor:
    """Give the linear of a module a bias."""
    from modelathe.ir import Linear

    linear = Linear.match(linear_at(program.graph, path))
    assert linear is not None
    value = torch.linspace(-1, 1, program.weight(linear.weight).shape[0])
    name = program.add_weight(f"{path}.bias", TensorWeight(value))
    node = program.weight_node(program.graph, name, before=linear.node)
    linear.set_weights(linear.weight, node)
    return value


def test_new_biases_switch_on_the_keys_that_give_place_to_them(tmp_path: Path) -> None:
    program = canonical("llama").editable()
    program.config["architectures"] = ["LlamaForCausalLM"]
    paths = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj")
    values = {f"{path}.bias": _with_bias(program, path) for path in paths}
    trip = round_trip(program, tmp_path / "out")
    config = json.loads((trip.folder / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, True)
    notes = json.loads((trip.folder / "manifest.json").read_text())["notes"]
    assert notes == [f"config.json: {key} is True now" for key in ("attention_bias", "mlp_bias")]
    assert not {key: value for key, value in trip.told.items() if value}
    biases = {n: v.detach() for n, v in parameters(trip.loaded).items() if n.endswith("bias")}
    assert len(biases) == 2 * 7
    for name, bias in biases.items():
        assert torch.equal(bias, values.get(name, torch.zeros_like(bias))), name
    inputs = feed(program, past=2)
    error = worst_error(decoder_outputs(trip.loaded, inputs), program.run(inputs))
    assert error <= rounding(torch.float32)


def test_a_head_with_weights_of_its_own_unties_the_configuration(tmp_path: Path) -> None:
    program = FoldNorms(untie=True)(canonical("llama")).program
    program.config["architectures"] = ["LlamaForCausalLM"]
    trip = round_trip(program, tmp_path / "out")
    assert trip.loaded.config.tie_word_embeddings is False
    values = parameters(trip.loaded)
    (folded,) = [
        n for n in program.weights if n.startswith(("lm_head", "model.embed")) and "fold" in n
    ]
    assert torch.equal(values["lm_head.weight"], program.weights[folded].load())
    table = program.weights["model.embed_tokens.weight"].load()
    assert torch.equal(values["model.embed_tokens.weight"], table)


def test_large_models_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART", 2000)
    source = capture(write_folder(tiny_bert(), tmp_path / "model"))
    Checkpoint().lower(source, check=False).save(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == names
    held = {name: load_file(tmp_path / "out" / name) for name in names}
    written = {key: tensor for part in held.values() for key, tensor in part.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    assert all(key in held[name] for key, name in index["weight_map"].items())
    for part in held.values():
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 2000
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert before.keys() == written.keys()
    assert all(torch.equal(tensor, written[key]) for key, tensor in before.items())


def test_files_name_experts_as_transformers_does(tmp_path: Path) -> None:
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    build = Transformer(
        "AutoModelForCausalLM", "qwen3_moe", {**_LLAMA, **experts, "tie_word_embeddings": True}
    )
    model: Any = build()
    perturb(model)
    write_folder(model, tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    weights = {name: TensorWeight(tensor) for name, tensor in model.state_dict().items()}
    config = json.loads((tmp_path / "config.json").read_text())
    found = dict(file_entries(empty_model(config), weights))
    assert found.keys() == expected.keys()
    assert any(".experts.2.gate_proj." in name for name in found)
    assert all(torch.equal(tensor, found[name].load()) for name, tensor in expected.items())


def test_sinusoids_are_left_out_of_files_unless_a_pass_changed_them(tmp_path: Path) -> None:
    model = tiny_seq2seq("marian")
    expected = load_file(write_folder(model, tmp_path) / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    held = {name: TensorWeight(tensor) for name, tensor in model.state_dict().items()}
    assert dict(file_entries(empty_model(config), held)).keys() == expected.keys()
    name = "model.decoder.embed_positions.weight"
    held[name] = TensorWeight(held[name].load() + 1)
    entries = dict(file_entries(empty_model(config), held))
    assert entries.keys() - expected.keys() == {name}
    write_weights(entries.items(), tmp_path, lambda *_: None)
    loaded = type(model).from_pretrained(tmp_path).get_parameter(name)
    assert torch.equal(loaded, held[name].load())


_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "mlp_ratio": 2,
}


def test_a_parameter_that_no_call_reads_comes_from_the_folder(tmp_path: Path) -> None:
    model: Any = Transformer("AutoModel", "dinov2", _VISION)().eval()
    perturb(model)
    trip = round_trip(capture(write_folder(model, tmp_path / "model")), tmp_path / "out")
    assert "embeddings.mask_token" not in trip.program.weights
    assert not {key: value for key, value in trip.told.items() if value}
    kept = parameters(trip.loaded)["embeddings.mask_token"]
    assert torch.equal(kept, model.embeddings.mask_token)
    with pytest.raises(LoweringError, match="mask_token: no call reads it") as caught:
        Checkpoint().lower(capture(model))
    assert "run the pipeline on the model's folder" in caught.value.remedy


@pytest.mark.parametrize("saved", [False, True])
def test_so_it_does_where_that_is_a_trusted_pickle(tmp_path: Path, saved: bool) -> None:
    model: Any = Transformer("AutoModel", "dinov2", _VISION)().eval()
    perturb(model)
    folder = write_folder(model, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = capture(folder, allow_pickle=True)
    if saved:
        (tmp_path / "saved").mkdir()
        save_program(found, tmp_path / "saved")
        found = capture(tmp_path / "saved", allow_pickle=True)
    Checkpoint().lower(found, check=False).save(tmp_path / "out")
    kept = load_file(tmp_path / "out" / "model.safetensors")["embeddings.mask_token"]
    assert torch.equal(kept, model.embeddings.mask_token)


@pytest.mark.parametrize(
    ("rule", "exact"),
    [
        (lambda t: t.t(), True),
        (lambda t: t.permute(1, 0), True),
        (lambda t: t.to(torch.float64), True),
        (lambda t: 1 + t, False),
        (lambda t: 0.5 * t - 3, False),
    ],
)
def test_a_rule_is_undone(rule: Callable[[Tensor], Tensor], exact: bool) -> None:
    value = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    made = ComputedWeight(
        "rule", (TensorWeight(value),), tuple(rule(value).shape), value.dtype, rule
    )
    undone = undo(made, TensorWeight(rule(value)))
    assert undone is not None
    error = (undone.load() - value).abs().max()
    assert error == 0 if exact else error <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("rule", [torch.exp, torch.abs, lambda t: t * t, lambda t: 0 * t])
def test_a_rule_that_is_neither_a_move_nor_a_line_is_not(rule: Callable[[Tensor], Tensor]) -> None:
    value = torch.ones(4, 6)
    made = ComputedWeight("rule", (TensorWeight(value),), (4, 6), value.dtype, rule)
    assert undo(made, TensorWeight(value)) is None


def test_three_dimensions_move_back_to_where_they_were() -> None:
    value = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    made = ComputedWeight(
        "rule", (TensorWeight(value),), (3, 4, 2), value.dtype, lambda t: t.permute(1, 2, 0)
    )
    undone = undo(made, TensorWeight(value.permute(1, 2, 0)))
    assert undone is not None
    assert torch.equal(undone.load(), value)
