"""Models that are no decoders, from the command line to their figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

Cli = Callable[..., Any]


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
