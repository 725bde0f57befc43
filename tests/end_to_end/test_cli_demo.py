"""The demo: what it shows of the embedded model."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelathe.cli import demo, run
from modelathe.ir import PassError
from modelathe.passes import Pipeline
from support.models import program

Cli = Callable[..., Any]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CALIBRATION_SAMPLES", 2)
    monkeypatch.setattr(demo, "CHECK_TOKENS", 512)
    monkeypatch.setattr(demo, "NEW_TOKENS", 8)
    monkeypatch.setattr("modelathe.backends.bench.ROUND_SECONDS", 0.0)


@pytest.mark.usefixtures("brief")
def test_the_demo_shows_each_pass_and_before_and_after(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    found = cli("demo", "--json", "-o", out).json
    names = [row["pass"].partition("{")[0] for row in found["passes"]]
    assert names == [
        "(as captured)",
        "canonicalize",
        "fold-norms",
        "prune-blocks",
        "quantize-weights",
    ]
    before, after = found["before"], found["after"]
    assert after["bytes"] < before["bytes"] / 5
    assert after["perplexity"] > before["perplexity"]
    assert 0 < after["kl"] < 0.5
    assert after["text"].startswith(demo.PROMPT)
    assert sorted(path.name for path in out.iterdir()) == ["after", "before"]
    done = cli("generate", out / "after", demo.PROMPT, "--max-new-tokens", 8, "--json")
    assert after["text"] == demo.PROMPT + done.json["text"]


@pytest.mark.usefixtures("brief")
def test_the_command_by_hand_asks_for_what_the_demo_does(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []

    def make(screen: Any, program: Any, pipeline: Pipeline, *_: Any, **__: Any) -> None:
        if pipeline.passes:
            told = {name: str(getattr(pipeline.context, name)) for name in vars(pipeline.context)}
            told = {name: told[name] for name in told if name not in ("progress", "state")}
            seen.append({"pipeline": str(pipeline), **told})
            raise PassError("seen")

    for command in (demo, run):
        monkeypatch.setattr(command, "make", make)
        monkeypatch.setattr(command, "open_program", lambda *_, **__: program("llama"))
    monkeypatch.setattr(demo._Steps, "__init__", lambda *_: None)
    _first, *words = shlex.split(demo.by_hand())
    assert cli("demo").status == cli(*words[:-1], tmp_path / "out").status == 1
    shown, typed = seen
    assert shown == typed


def test_a_place_that_is_taken_is_refused_before_the_work(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "after").mkdir()
    done = cli("demo", "-o", tmp_path)
    done.assert_refused()
    assert "after: exists already" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["after"]
