"""The main job from the command line: what is written, what is shown, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

Cli = Callable[..., Any]


def test_the_folder_has_everything_and_the_manifest_says_how(small: Path, llama: Path) -> None:
    manifest = json.loads((small / "manifest.json").read_text())
    names = {path.name for path in small.iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "generation_config.json"} <= names
    assert {"genai_config.json", "manifest.json"} <= names
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert manifest["kind"] == "decoder"
    assert manifest["tool"].startswith("modelathe ")
    assert manifest["model"] == str(llama)
    passes = [step["pass"].partition("{")[0] for step in manifest["steps"]]
    assert passes == ["canonicalize", "fold-norms", "prune-blocks", "quantize-weights"]
    assert manifest["sizes"]["blocks"] == 2
    assert json.loads((small / "config.json").read_text())["num_hidden_layers"] == 2
    assert set(manifest["fidelity"]) >= {"kl", "top1_agreement", "perplexity", "tokens"}


def test_the_artifact_runs_without_us(small: Path) -> None:
    session = onnxruntime.InferenceSession(str(small / "model.onnx"))
    feeds: dict[str, Any] = {}
    for one in session.get_inputs():
        shape = [
            d if isinstance(d, int) else {"batch": 1, "sequence": 3}.get(d, 0) for d in one.shape
        ]
        if one.name == "attention_mask":
            shape = [1, 3]
        dtype = np.int64 if "int64" in one.type else np.float32
        feeds[one.name] = np.ones(shape, dtype=dtype)
    assert session.run(["logits"], feeds)[0].shape == (1, 3, 11)


def test_a_plain_export_is_the_model(plain: Path, llama: Path, text: Path, cli: Cli) -> None:
    found = cli("eval", plain, "--text", text, "--against", llama, "--json").json
    assert found["kl"] < 1e-9
    assert found["top1_agreement"] == 1.0


def test_generate_gives_the_tokens_of_transformers(plain: Path, llama: Path, cli: Cli) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.tensor([[0, 4, 2, 9]])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, 4:].tolist()
    found = cli("generate", plain, "a e c j", "--max-new-tokens", 12, "--json").json
    assert found["tokens"] == expected


def test_json_is_the_manifest_and_nothing_else(
    llama: Path, cli: Cli, tmp_path: Path, options: list[object]
) -> None:
    done = cli("run", llama, "-p", "fold-norms", "-o", tmp_path / "out", "--json", *options)
    assert done.json == json.loads((tmp_path / "out" / "manifest.json").read_text())


def test_the_report_says_what_was_measured_and_what_comes_next(
    llama: Path, cli: Cli, tmp_path: Path, options: list[object]
) -> None:
    done = cli("run", llama, "-p", "quantize-weights{bits=8}", "-o", tmp_path / "out", *options)
    assert "quantize-weights" in done.out
    assert "KL" in done.out
    assert f"modelathe generate {tmp_path / 'out'}" in done.out


def test_widths_that_were_chosen_are_printed_and_written_as_a_recipe(
    program: Path, cli: Cli, tmp_path: Path
) -> None:
    text = "assign-bits{score=zd low=2},quantize-weights{group-size=16}"
    done = cli("run", program, "-p", text, "--to", "program", "--no-check", "-o", tmp_path / "out")
    assert "assign-bits chose" in done.out
    rows = [line.split() for line in done.out.splitlines() if line.strip().startswith("model.lay")]
    steps = json.loads((tmp_path / "out" / "manifest.json").read_text())["steps"]
    (step,) = [step for step in steps if step["pass"].startswith("assign-bits")]
    blocks = {name: str(one["bits"]) for name, one in step["details"]["blocks"].items()}
    assert blocks == {row[0]: row[1] for row in rows}
    assert set(blocks.values()) == {"2", "8"}
    recipe = step["details"]["recipe"]
    assert recipe.count("quantize-weights{bits=") == 3  # two widths, and the head's
    assert f"assign-bits, as a recipe: {recipe}" in done.out


def test_a_recipe_file_is_the_same_text(
    llama: Path, cli: Cli, tmp_path: Path, unchecked: list[object]
) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("fold-norms          # exact\nprune-blocks{blocks=1}\n")
    for name, passes in (("a", f"@{recipe}"), ("b", "fold-norms,prune-blocks{blocks=1}")):
        words = ["-p", passes, "-o", tmp_path / name, *unchecked]
        assert cli("run", llama, *words).status == 0
    contents = [
        {
            path.name: path.read_bytes()
            for path in (tmp_path / n).iterdir()
            if "manifest" not in path.name
        }
        for n in "ab"
    ]
    assert contents[0] == contents[1]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    llama: Path, cli: Cli, tmp_path: Path, pipeline: str
) -> None:
    words = ["run", llama, "-p", pipeline, "-o", tmp_path / "out", "--dry-run"]
    found = cli(*words, "--json").json
    assert found["blocks"] == 3
    assert found["estimated_blocks"] == 2
    assert found["estimated_bytes"] < found["bytes"] / 2
    assert [step["pass"] for step in found["passes"]] == [
        "fold-norms",
        "prune-blocks{count=1}",
        "quantize-weights{bits=4}",
    ]
    shown = cli(*words)
    assert "nothing was written" in shown.out
    assert "group-size=32" in shown.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["eager", "program"])
def test_every_backend_writes_what_eval_bench_generate_and_run_take(
    llama: Path, cli: Cli, tmp_path: Path, options: list[object], text: Path, backend: str
) -> None:
    out = tmp_path / "out"
    words = ["-p", "quantize-weights{bits=8}", "--to", backend, "-o", out, *options]
    done = cli("run", llama, *words)
    assert done.status == 0, done.err
    assert cli("eval", out, "--text", text, "--against", llama, "--json").json["kl"] < 0.1
    assert len(cli("generate", out, "a b", "--max-new-tokens", 3, "--json").json["tokens"]) <= 3
    assert cli("inspect", out, "--json").json["sizes"]["blocks"] == 3
    more = cli("run", out, "-p", "prune-blocks{blocks=0}", "-o", tmp_path / "more", *options)
    assert more.status == 0, more.err
    manifest = json.loads((tmp_path / "more" / "manifest.json").read_text())
    assert manifest["pipeline"].endswith("quantize-weights{bits=8},prune-blocks{blocks=0}")


def test_inspect_and_diff_of_a_model(llama: Path, cli: Cli) -> None:
    found = cli("inspect", llama, "--json").json
    assert (found["kind"], found["blocks"]) == ("decoder", 3)
    assert found["bits_per_weight"] == 32
    shown = cli("diff", llama, "-p", "fold-norms").out
    assert "+weight @" in shown
    assert cli("diff", llama, llama).out == "no difference\n"


def test_a_model_equals_the_program_that_a_plain_run_writes(
    llama: Path, cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("run", llama, "--no-check", "--to", "program", "-o", out).status == 0
    assert cli("diff", llama, out).out == "no difference\n"
    found = cli("diff", llama, "-p", "canonicalize", "--json").json
    assert found["changed"]  # a pipeline that begins with it shows what it does


def test_other_numbers_in_the_same_graph_are_a_difference(
    llama: Path, cli: Cli, work: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = work / "other-numbers"
    shutil.copytree(llama, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    stat = (llama / "model.safetensors").stat()  # the file is alike in name, size and time
    os.utime(other / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = cli("diff", llama, other, "--json").json
    assert found == {"changed": True, "diff": "", "values": ["model.norm.weight"]}
    assert cli("diff", llama, other).out == "other numbers: @model.norm.weight\n"


def test_artifacts_are_compared_by_what_is_stored(plain: Path, small: Path, cli: Cli) -> None:
    found = cli("diff", plain, small, "--json").json
    assert found["changed"]
    assert "pipeline" in found["manifest"]
    assert "model.onnx" in found["files"]
    assert found["initializers"]


def test_text_that_the_model_writes_is_kept_for_the_next_run(
    program: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELATHE_CACHE", str(tmp_path / "cache"))
    words = ["run", program, "-p", "prune-blocks{count=1}", "--to", "program", "--no-check"]
    words += ["--calibration-samples", 2, "--calibration-length", 4, "--json", "-o"]
    first, again = (cli(*words, tmp_path / name) for name in ("first", "again"))
    (kept,) = (tmp_path / "cache").iterdir()
    assert "is taken from" not in first.err
    assert f"is taken from {kept}" in again.err
    assert first.json["data"] == again.json["data"]
    weights = [found.json["files"]["weights.safetensors"] for found in (first, again)]
    assert weights[0] == weights[1]


def test_a_dry_run_refuses_what_the_run_would(cli: Any, program: Path) -> None:
    done = cli("run", program, "-p", "fold-norms,prune-blocks{count=3}", "--dry-run")
    done.assert_refused()
    assert "that removes all 3 blocks" in done.err
    later = "prune-blocks{count=1},prune-blocks{count=2},tie-blocks{unique=5}"
    assert cli("run", program, "-p", later, "--dry-run").status == 0
