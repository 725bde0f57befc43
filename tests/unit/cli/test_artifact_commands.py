"""generate, eval, bench, inspect and diff on artifacts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from support.artifacts import WORDS

Cli = Callable[..., Any]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a b c d e f g h i j " * 4)
    return path


def test_generate_prints_the_prompt_and_what_follows(cli: Cli, toy: Path) -> None:
    done = cli("generate", toy, "a b c", "--max-new-tokens", 4)
    found = cli("generate", toy, "a b c", "--max-new-tokens", 4, "--json").json
    assert len(found["tokens"]) == 4
    assert found["text"] == " ".join(WORDS[token] for token in found["tokens"])
    assert (done.status, done.err) == (0, "")
    assert done.out == f"a b c {found['text']}\n"


def test_generate_samples_by_option(cli: Cli, toy: Path) -> None:
    def tokens(*options: object) -> list[int]:
        found: list[int] = cli("generate", toy, "a", "--json", *options).json["tokens"]
        return found

    assert tokens() == tokens("--temperature", 0) == tokens("--top-k", 1)
    assert tokens("--temperature", 9, "--seed", 1) == tokens("--temperature", 9, "--seed", 1)
    assert len({str(tokens("--temperature", 9, "--seed", seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    "options", [("--temperature", 0, "--seed", 1), ("--top-p", 0), ("--top-k", 0)]
)
def test_generate_ignores_no_option(cli: Cli, toy: Path, options: tuple[object, ...]) -> None:
    done = cli("generate", toy, "a", *options)
    assert (done.status, done.out) == (2, "")
    assert str(options[-2]) in done.err


def test_eval_has_exactly_the_documented_keys(cli: Cli, toy: Path, other: Path, text: Path) -> None:
    found = cli("eval", toy, "--text", text, "--against", other, "--json").json
    assert list(found) == ["tokens", "perplexity", "reference_perplexity", "kl", "top1_agreement"]
    assert found["tokens"] == 40 - 2  # two windows, each of which predicts all but its first
    assert found["kl"] > 0


def test_eval_for_people_says_what_the_figures_are(cli: Cli, toy: Path, text: Path) -> None:
    done = cli("eval", toy, "--text", text, "--against", toy)
    assert "KL (nats per token)   0" in done.out
    assert "top-1 agreement       100.00%" in done.out


def test_bench_has_the_documented_keys(
    cli: Cli, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelathe.backends.bench.ROUND_SECONDS", 0.0)
    monkeypatch.setattr("modelathe.backends.bench.peak_memory", lambda session: 2_500_000)
    found = cli("bench", toy, "--against", toy, "--json").json
    assert {"prefill", "decode", "bytes", "peak_memory", "ratio"} <= set(found)
    assert set(found["ratio"]) == {"prefill", "decode", "bytes", "peak_memory"}
    shown = cli("bench", toy).out
    assert "prefill (tokens/s)" in shown
    assert "2.5 MB" in shown


def test_inspect_says_how_the_artifact_was_made(cli: Cli, toy: Path) -> None:
    found = cli("inspect", toy, "--json").json
    assert found["kind"] == "decoder"
    assert found["bytes"] == (toy / "model.onnx").stat().st_size
    assert found["operators"]["model.onnx"]["MatMul"] == 1
    shown = cli("inspect", toy, "--graph").out
    assert "none: a plain export" in shown
    assert "%logits = MatMul(%hidden, @W)" in shown


def test_diff_of_an_artifact_with_itself(cli: Cli, toy: Path) -> None:
    assert cli("diff", toy, toy).out == "no difference\n"
    assert cli("diff", toy, toy, "--json").json["changed"] is False


def test_diff_names_the_initialisers_that_changed(cli: Cli, toy: Path, other: Path) -> None:
    found = cli("diff", toy, other, "--json").json
    assert set(found["initializers"]) == {"model:E", "model:P", "model:W"}
    assert found["equal_initializers"] == 5
    assert "model:W" in cli("diff", toy, other).out


def test_diff_names_what_the_manifests_say_differently(cli: Cli, toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "seed": 7, "sizes": {"blocks": 3}}))
    found = cli("diff", toy, tmp_path / "copy", "--json").json
    assert found["manifest"] == {"seed": [0, 7], "sizes.blocks": [None, 3]}


@pytest.mark.parametrize("command", ["inspect", "eval", "generate", "bench", "diff"])
@pytest.mark.parametrize("manifest", [True, False], ids=["artifact", "plain folder"])
def test_data_outside_the_folder_is_refused_by(
    cli: Cli, toy: Path, tmp_path: Path, text: Path, command: str, manifest: bool
) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(toy, folder)
    model = onnx.load(str(folder / "model.onnx"))
    (tensor,) = [t for t in model.graph.initializer if t.name == "W"]
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    tensor.external_data.add(key="location", value="../text.txt")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    if not manifest:
        (folder / "manifest.json").unlink()
    more = {"eval": ["--text", text], "generate": ["a"], "diff": [toy]}.get(command, [])
    done = cli(command, folder, *more)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 2
    if manifest or command == "inspect":
        assert "'../text.txt', which lies outside the folder" in done.err
