"""The main job from the command line: what is written, what is shown, what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
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


def test_a_recipe_file_is_the_same_text(
    llama: Path, cli: Cli, tmp_path: Path, options: list[object]
) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("fold-norms          # exact\nprune-blocks{blocks=1}\n")
    for name, passes in (("a", f"@{recipe}"), ("b", "fold-norms,prune-blocks{blocks=1}")):
        words = ["-p", passes, "-o", tmp_path / name, "--no-check", *options]
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


def test_artifacts_are_compared_by_what_is_stored(plain: Path, small: Path, cli: Cli) -> None:
    found = cli("diff", plain, small, "--json").json
    assert found["changed"]
    assert "pipeline" in found["manifest"]
    assert "model.onnx" in found["files"]
    assert found["initializers"]


def test_a_budget_that_is_broken_stops_the_run(
    llama: Path, cli: Cli, tmp_path: Path, options: list[object]
) -> None:
    words = ["-p", "quantize-weights{bits=2}", "-o", tmp_path / "out", "--max-kl", "1e-6"]
    done = cli("run", llama, *words, *options)
    assert (done.status, done.out) == (1, "")
    assert "KL" in done.err
    assert "at most 1e-06" in done.err
    assert "\nremedy: " in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_with_force(
    llama: Path, cli: Cli, tmp_path: Path, options: list[object]
) -> None:
    out = tmp_path / "out"
    words = ["run", llama, "--no-check", "-o", out, *options]
    assert cli(*words).status == 0
    (out / "notes.txt").write_text("mine")
    before = (out / "manifest.json").read_bytes()
    refused = cli(*words)
    assert refused.status == 1
    assert "--force" in refused.err
    assert (out / "manifest.json").read_bytes() == before
    assert cli(*words, "-p", "prune-blocks{blocks=0}", "--force").status == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "manifest.json").read_bytes() != before


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("prune-blocks{count=3}", "block"),
        ("prune-blocks{blocks=9}", "9"),
        ("quantize-weights{group-size=48}", "48"),
        ("quantize-weights{bits=5}", "5"),
        ("quantize-weights{bit=4}", "bits"),
        ("quantise-weights", "quantize-weights"),
        ('quantize-weights{only="nothing.here"}', "nothing.here"),
    ],
)
def test_a_pipeline_that_cannot_run_is_refused(
    llama: Path, cli: Cli, tmp_path: Path, options: list[object], passes: str, message: str
) -> None:
    done = cli("run", llama, "-p", passes, "-o", tmp_path / "out", *options)
    assert (done.status, done.out) == (1, "")
    assert message in done.err
    assert done.err.startswith("error: ")
    assert "\nremedy: " in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def corrupt(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def wrong_shapes(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 64}))


def with_nan(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remote_code(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}
    path.write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "folder"),
        (lambda folder: (folder / "config.json").unlink(), "config"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (corrupt, "safetensors"),
        (wrong_shapes, "in the file and"),
        (with_nan, "nan"),
        (pickled, "pickle"),
        (remote_code, "code"),
    ],
)
def test_a_damaged_model_is_refused_with_a_reason(
    llama: Path,
    cli: Cli,
    tmp_path: Path,
    options: list[object],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    damage(model)
    done = cli("run", model, "-p", "quantize-weights", "-o", tmp_path / "out", *options)
    assert (done.status, done.out) == (1, "")
    assert message in done.err.lower()
    assert done.err.startswith("error: ")
    assert "\nremedy: " in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a b"], ids=["empty", "latin", "tiny"])
def test_bad_calibration_text_is_refused(
    llama: Path, cli: Cli, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    words = ["-p", "prune-blocks{count=1}", "--calibration", tmp_path / "text.txt"]
    done = cli("run", llama, *words, "-o", tmp_path / "out")
    assert done.status == 1
    assert "text" in done.err
    assert "\nremedy: " in done.err
    assert not (tmp_path / "out").exists()


def test_no_space_left_is_said_and_leaves_nothing(
    llama: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr("modelathe.backends.base.write_manifest", full)
    done = cli("run", llama, "-o", tmp_path / "out", *options)
    assert done.status == 1
    assert "no space left on the device" in done.err
    assert "remedy: free some space" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_said_before_the_work(llama: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    done = cli("run", llama, "-o", tmp_path / "locked" / "out")
    assert done.status == 1
    assert "permission denied" in done.err


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_an_interrupted_run_leaves_nothing_that_looks_finished(
    program: Path, cli: Cli, tmp_path: Path, number: int, status: int, options: list[object]
) -> None:
    out = tmp_path / "out"
    # A process with the default handlers: a child of a shell job may ignore Ctrl-C.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    code += "from modelathe.cli import main; sys.exit(main())"
    words = ["run", program, "-p", "quantize-weights", "--no-check", "-o", out, *options]
    command = [sys.executable, "-P", "-c", code, *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        # check_writable makes and removes the partial folder; after it the work begins.
        while not process.poll() and not (tmp_path / "out.partial" / "new").exists():
            assert time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(number)
        process.wait(timeout=60)
    assert process.returncode in (status, 0)  # it may have been faster than the signal
    if process.returncode:
        assert not out.exists()
    assert cli(*words, "--force").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_encoder_is_measured_by_cosine(bert: Path, cli: Cli, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    done = cli("run", bert, "-p", "quantize-weights{bits=8}", "-o", out, "--check-text", text)
    assert done.status == 0, done.err
    found = cli("eval", out, "--text", text, "--against", bert, "--json").json
    assert list(found) == ["lines", "cosine", "cosine_min"]
    assert found["lines"] == 60
    assert found["cosine_min"] > 0.99
    assert "--against" in cli("eval", out, "--text", text).err
    bench = cli("bench", out, "--json").json
    assert bench["latency"] > 0


def test_an_encoder_decoder_has_two_graphs_and_is_measured_on_pairs(
    t5: Path, cli: Cli, tmp_path: Path
) -> None:
    out, pairs = tmp_path / "out", tmp_path / "pairs.jsonl"
    done = cli("run", t5, "-o", out)
    assert done.status == 0, done.err
    assert {path.name for path in out.glob("*.onnx")} == {"encoder.onnx", "decoder.onnx"}
    pairs.write_text('{"source": "a b c", "target": "d e f g"}\n{"source": "d", "target": "a"}\n')
    found = cli("eval", out, "--text", pairs, "--against", t5, "--json").json
    assert found["tokens"] == 5
    assert found["kl"] < 1e-9
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(t5)
    expected = model.generate(torch.tensor([[0, 1, 2]]), max_new_tokens=6, do_sample=False)
    tokens = cli("generate", out, "a b c", "--max-new-tokens", 6, "--json").json["tokens"]
    assert tokens == expected[0, 1:].tolist()


def test_an_artifact_of_a_module_is_measured_on_arrays(cli: Cli, tmp_path: Path) -> None:
    factory = tmp_path / "own_model.py"
    factory.write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU()).eval()\n"
        "    batch = torch.export.Dim.DYNAMIC\n"
        "    return model, (torch.ones(2, 8),), ({0: batch},)\n"
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1));"
        "from modelathe.cli import main; sys.exit(main())"
    )
    out = tmp_path / "out"

    def command(*words: object) -> str:
        whole = [sys.executable, "-P", "-c", code, tmp_path, *words]
        done = subprocess.run(list(map(str, whole)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("run", "own_model:make", "-o", out)
    assert "own code" in json.dumps(json.loads((out / "manifest.json").read_text())["notes"])
    onnx.checker.check_model(str(out / "model.onnx"))
    name = json.loads((out / "manifest.json").read_text())["signatures"]["main"]["inputs"][0][
        "name"
    ]
    np.savez(tmp_path / "data.npz", **{name: np.random.default_rng(0).random((5, 8), np.float32)})
    found = json.loads(
        command(
            "eval", out, "--data", tmp_path / "data.npz", "--against", "own_model:make", "--json"
        )
    )
    assert found["items"] == 5
    assert found["cosine_min"] == pytest.approx(1.0, abs=1e-6)
