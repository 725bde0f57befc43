"""`run --to checkpoint`, and every command on what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Cli = Callable[..., Any]

PIPELINE = "fold-norms,prune-blocks{count=1},heal{steps=2 batch=64 length=16 mix=0}"


@pytest.fixture(scope="module")
def out(llama: Path, work: Path, options: list[object], cli: Cli) -> Path:
    """The tiny decoder, folded, pruned and healed, as a model folder."""
    folder = work / "checkpoint"
    done = cli("run", llama, "-p", PIPELINE, "--to", "checkpoint", "-o", folder, *options)
    assert done.status == 0, done.err
    return folder


def test_transformers_loads_model_and_tokenizer(out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not {key: value for key, value in told.items() if value}
    assert len(model.model.layers) == 2
    assert AutoTokenizer.from_pretrained(out)("a c").input_ids


def test_the_manifest_says_how_it_was_made(out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["backend"], manifest["kind"]) == ("checkpoint", "decoder")
    names = {path.name for path in out.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert manifest["lowering"]["float64_error"] < 1e-9
    assert manifest["fidelity"]["kl"] > 0


def test_generate_gives_the_tokens_of_transformers(out: Path, cli: Cli) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[0, 4, 2, 9]])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, 4:].tolist()
    found = cli("generate", out, "a e c j", "--max-new-tokens", 12, "--json").json
    assert found["tokens"] == expected


def test_eval_measures_it_against_itself_and_the_source(
    out: Path, llama: Path, text: Path, cli: Cli
) -> None:
    same = cli("eval", out, "--text", text, "--against", out, "--json").json
    assert (same["kl"], same["top1_agreement"]) == (0, 1)
    other = cli("eval", out, "--text", text, "--against", llama, "--json").json
    assert other["kl"] > 1e-6


def test_inspect_shows_manifest_and_graph(out: Path, cli: Cli) -> None:
    found = cli("inspect", out, "--graph", "--json").json
    assert (found["backend"], found["blocks"]) == ("checkpoint", 2)
    assert "weight @model.layers.1.mlp.up_proj.weight" in found["graph"]


def test_diff_compares_it_as_a_model(out: Path, llama: Path, cli: Cli) -> None:
    assert not cli("diff", out, out, "--json").json["changed"]
    found = cli("diff", llama, out, "--json").json
    assert "-weight @model.layers.2.mlp.up_proj.weight" in found["diff"]


def test_run_takes_it_as_a_model(
    out: Path, cli: Cli, tmp_path: Path, unchecked: list[object]
) -> None:
    from transformers import AutoModelForCausalLM

    words = ["-p", "convert-dtype{to=bfloat16}", "--to", "checkpoint", *unchecked]
    manifest = cli("run", out, *words, "-o", tmp_path / "next", "--json").json
    assert (manifest["sizes"]["blocks"], manifest["model"]) == (2, str(out))
    narrow, wide = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "next", out))
    for name, value in wide.named_parameters():
        assert torch.equal(narrow.get_parameter(name), value.to(torch.bfloat16))


def test_a_refusal_names_the_reason_and_leaves_no_folder(
    llama: Path, cli: Cli, tmp_path: Path, unchecked: list[object]
) -> None:
    words = ["-p", "quantize-weights{bits=8}", "--to", "checkpoint", *unchecked]
    done = cli("run", llama, *words, "-o", tmp_path / "out")
    assert done.status == 1
    assert "reads quantised weights, and a checkpoint holds plain ones" in done.err
    assert list(tmp_path.iterdir()) == []
