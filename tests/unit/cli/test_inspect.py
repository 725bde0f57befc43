"""``inspect`` of a program: where its norms stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelathe.backends import Eager
from modelathe.backends.program_session import ProgramSession
from modelathe.backends.session import open_artifact
from modelathe.cli.inspect import norms_text
from modelathe.cli.sources import is_artifact_word, is_plain_onnx
from modelathe.ir import save_program, to_text
from modelathe.passes import Canonicalize
from modelathe.passes.analysis.zd import zd
from support.models import program


def block(placement: str, kinds: list[str], special: list[str] | None = None) -> dict[str, Any]:
    return {"placement": placement, "kinds": kinds, "query_key": special or []}


PRE, BARE = block("pre", ["rms", "rms"]), block("none", [])
MIXED = block("sandwich", ["layer", "rms"], ["rms_norm"])


@pytest.mark.parametrize(
    ("graphs", "text"),
    [
        ({"main": [PRE, PRE]}, "pre (rms) in every block"),
        ({"main": [PRE, PRE, BARE]}, "pre (rms) in blocks 0-1; none in block 2"),
        (
            {"main": [MIXED]},
            "sandwich (layer and rms, with norms of queries and keys) in every block",
        ),
        (
            {"encoder": [PRE], "decoder": [BARE]},
            "encoder: pre (rms) in every block; decoder: none in every block",
        ),
        ({"main": []}, None),
    ],
)
def test_blocks_that_are_alike_are_one_phrase(graphs: dict[str, Any], text: str | None) -> None:
    assert norms_text({name: {"blocks": blocks} for name, blocks in graphs.items()}) == text


def test_inspect_shows_where_norms_stand(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """Also of a program that is as it was captured, with its norms written out by hand."""
    save_program(program("llama"), tmp_path)
    assert "pre (rms) in every block" in cli("inspect", tmp_path).out
    found = cli("inspect", tmp_path, "--json").json["norms"]["main"]
    assert [each["placement"] for each in found["blocks"]] == ["pre", "pre"]
    assert len(found["outside"]) == 1


def test_an_artifact_has_no_revision(toy: Path, cli: Callable[..., Any]) -> None:
    done = cli("inspect", toy, "--revision", "main")
    assert (done.status, done.out) == (2, "")
    assert f"--revision is of a hub id, and {toy} is an artifact" in done.err


def test_demo_is_the_embedded_model_and_a_path_the_artifact_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    Eager().lower(program("norm-mlp"), check=False).save(tmp_path / "demo")
    (tmp_path / "demo" / "other.onnx").touch()
    monkeypatch.chdir(tmp_path)
    assert not is_artifact_word("demo")
    assert not is_plain_onnx("demo")
    (tmp_path / "demo" / "other.onnx").unlink()
    graph = cli("inspect", "./demo", "--graph", "--json").json["graph"]
    opened = open_artifact("demo")
    assert isinstance(opened, ProgramSession)
    assert graph == to_text(opened.program) == to_text(program("norm-mlp"))


def test_inspect_scores_blocks(tmp_path: Path, cli: Callable[..., Any]) -> None:
    save_program(program("llama"), tmp_path)
    text = tmp_path / "text.npy"
    np.save(text, np.arange(400) % 40)
    canonical = Canonicalize()(program("llama")).program
    plain = cli("inspect", tmp_path, "--scores", "--json").json["scores"]
    keys = ["model.layers.0", "model.layers.1"]
    assert plain == [
        {"block": key, "zd": score} for key, score in zip(keys, zd(canonical).scores, strict=True)
    ]
    found = cli("inspect", tmp_path, "--scores", "--calibration", text, "--json")
    for row in found.json["scores"]:
        assert -1 <= row["lim"] <= 1
        assert 0 <= row["block_influence"] <= 2
    shown = cli("inspect", tmp_path, "--scores").out
    assert f"{plain[0]['zd']:.4g}" in shown


def test_scores_that_cannot_be_are_refused(
    tmp_path: Path, cli: Callable[..., Any], toy: Path
) -> None:
    found = cli("inspect", toy, "--scores")
    assert found.status != 0
    assert "holds no program" in found.err
    assert cli("inspect", toy, "--calibration", "x.txt").status == 2
    save_program(program("llama"), tmp_path)
    missing = cli("inspect", tmp_path, "--scores", "--calibration", tmp_path / "none.txt")
    assert "no such file" in missing.err
