"""The ONNX backend's folder: files, weights inside and outside, metadata, genai's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from modelathe.backends import Onnx, open_artifact
from modelathe.backends.onnx.exact import exact_session
from modelathe.backends.onnx.files import ALIGNMENT, save_model
from modelathe.backends.onnx.genai import genai_config, genai_obstacle
from modelathe.ir import Program
from modelathe.passes import PassContext, QuantizeWeights
from support.feeds import feed
from support.models import canonical, module, program
from support.numeric import relative_error
from support.onnx_models import emitted


def _saved(made: Program, folder: Path, **options: Any) -> Path:
    Onnx(**options).lower(made, check=False).save(folder)
    return folder


def _run(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return open_artifact(folder).run({name: value.numpy() for name, value in inputs.items()})


@pytest.mark.parametrize("place", ["auto", "always"])
def test_a_folder_runs_wherever_its_weights_are(place: str, tmp_path: Path) -> None:
    made = canonical("llama")
    folder = _saved(made, tmp_path / "out", external_data=place)
    assert (folder / "model.onnx.data").exists() == (place == "always")
    inputs = feed(made, past=3)
    found = _run(folder, inputs)
    for name, value in made.run(inputs).items():
        assert relative_error(value, torch.from_numpy(found[name])) < 2e-5


def test_every_graph_is_a_file(tmp_path: Path) -> None:
    folder = _saved(canonical("t5"), tmp_path / "out")
    assert {path.name for path in folder.glob("*.onnx")} == {"encoder.onnx", "decoder.onnx"}
    assert not (folder / "genai_config.json").exists()


@pytest.mark.parametrize("external", [False, True])
def test_both_ways_of_writing_make_valid_files(external: bool, tmp_path: Path) -> None:
    path, seen = tmp_path / "model.onnx", []
    save_model(emitted(canonical("gpt2")), path, external=external, advance=seen.append)
    onnx.checker.check_model(path)
    model = onnx.load(path)
    plain = {name: canonical("gpt2").weights[name] for name in canonical("gpt2").weights}
    large = [t for t in model.graph.initializer if t.name in plain and t.ByteSize() > 1024]
    assert len(large) == len(seen) > 5
    for tensor in large:
        expected = plain[tensor.name].load().numpy()
        found = onnx.numpy_helper.to_array(tensor)
        same = found if found.shape == expected.shape else found.T
        assert any(np.array_equal(one, expected) for one in (found, found.T, same))


def test_external_tensors_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_model(emitted(canonical("gpt2")), path, external=True, advance=lambda count: None)
    model = onnx.load(path, load_external_data=False)
    places = [
        int(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    ]
    assert len(places) > 5
    assert all(place % ALIGNMENT == 0 for place in places)


def test_a_program_that_comes_from_no_pipeline_is_made_canonical(tmp_path: Path) -> None:
    kinds = []
    for number, made in enumerate((program("llama"), canonical("llama"))):
        folder = tmp_path / str(number)
        Onnx().lower(made).save(folder)
        model = onnx.load(folder / "model.onnx")
        kinds.append(sorted(node.op_type for node in model.graph.node))
    assert kinds[0] == kinds[1]
    assert kinds[0].count("RotaryEmbedding") == 4


def test_metadata_says_how_the_file_was_made(tmp_path: Path) -> None:
    folder = _saved(canonical("llama").after("prune-blocks{count=1}"), tmp_path / "out")
    model = onnx.load(folder / "model.onnx")
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert props["tool"].startswith("modelathe ")
    assert props["pipeline"] == "prune-blocks{count=1}"
    assert model.opset_import[0].version == 23


def test_the_exact_session_computes_in_float32_and_leaves_nothing_behind(tmp_path: Path) -> None:
    made = QuantizeWeights(bits=4, group_size=16)(canonical("llama"), PassContext()).program
    folder = _saved(made, tmp_path / "out", external_data="always")
    before = sorted(path.name for path in folder.rglob("*"))
    inputs = feed(made, sequence=8)
    expected = made.run(inputs)["logits"]
    with exact_session(folder) as session:
        exact = session.run({name: value.numpy() for name, value in inputs.items()})["logits"]
    shipped = _run(folder, inputs)["logits"]
    assert relative_error(expected, torch.from_numpy(exact)) < 2e-5
    assert relative_error(expected, torch.from_numpy(shipped)) > 1e-4
    assert sorted(path.name for path in folder.rglob("*")) == before


# 24 and 500 roundings of a few parts in 2**11 and 2**8
@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-2), ("bfloat16", 5e-2)])
def test_a_narrow_artifact_is_half_as_large(dtype: str, limit: float, tmp_path: Path) -> None:
    made = canonical("llama")
    narrow = _saved(made, tmp_path / "narrow", dtype=dtype, external_data="always")
    wide = _saved(made, tmp_path / "wide", external_data="always")
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (narrow, wide)]
    assert sizes[0] < 0.7 * sizes[1]
    tokens = np.array([[3, 1, 4, 1, 5]])
    logits, _ = open_artifact(narrow).decode(tokens, np.ones_like(tokens))
    plain, _ = open_artifact(wide).decode(tokens, np.ones_like(tokens))
    assert relative_error(torch.from_numpy(plain), torch.from_numpy(logits)) < limit


@pytest.mark.parametrize(
    ("options", "message"),
    [({"opset": 17}, "opset is 18 to 23"), ({"accuracy_level": 5}, "accuracy_level is 0 to 4")],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Onnx(**options)


def test_genai_is_told_heads_blocks_and_ends() -> None:
    made = canonical("llama")
    settings = genai_config(made.signature, made.config, {"eos_token_id": [2, 5]})
    decoder = settings["model"]["decoder"]
    assert settings["model"]["type"] == "decoder"
    assert settings["model"]["eos_token_id"] == [2, 5]
    assert settings["model"]["context_length"] == 32
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"]) == (2, 2)
    assert (decoder["num_attention_heads"], decoder["head_size"]) == (4, 8)
    assert settings["search"]["past_present_share_buffer"] is False


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_seq_len": 64}, 64),
        ({"max_position_embeddings": 64, "n_positions": 16}, 16),
        ({}, 2048),
    ],
)
def test_genai_is_told_as_many_positions_as_the_model_has(
    config: dict[str, int], longest: int
) -> None:
    made = canonical("llama")
    settings = genai_config(made.signature, {"vocab_size": 40, **config}, {})
    assert settings["model"]["context_length"] == settings["search"]["max_length"] == longest


def test_genai_takes_no_decoder_without_a_cache() -> None:
    made = canonical("tied-blocks")
    assert "no cache" in genai_obstacle(made.signature, made.config)


def test_genai_decodes_what_transformers_does(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    folder = _saved(canonical("gpt2"), tmp_path / "out")
    assert json.loads((folder / "genai_config.json").read_text())["model"]["type"] == "decoder"
    prompt = [5, 17, 33, 8]
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=16, min_length=16, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    plain: Any = module("gpt2")
    expected = plain.generate(
        torch.tensor([prompt]), max_length=16, min_length=16, do_sample=False, pad_token_id=0
    )
    assert list(generator.get_sequence(0)) == expected[0].tolist()
