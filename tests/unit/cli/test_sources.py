"""What opens a word of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modelathe.backends import Eager
from modelathe.cli import sources
from modelathe.cli.screen import Screen
from modelathe.ir import Program
from support.models import program


def test_an_artifact_called_demo_is_not_compared_with_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Eager().lower(program("norm-linears"), check=False).save(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    captured: list[str] = []

    def capture(word: str, *_: Any, **__: Any) -> Program:
        captured.append(word)
        return program("norm-mlp")

    monkeypatch.setattr(sources, "open_program", capture)
    artifact, model = (
        sources.open_session(word, Screen(as_json=True)) for word in ("./demo", "demo")
    )
    assert captured == ["demo"]
    assert artifact.manifest["model"] == program("norm-linears").origin.model
    assert model.manifest["model"] == program("norm-mlp").origin.model


def test_threads_count_for_a_model_that_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "open_program", lambda *_, **__: program("norm-mlp"))
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    sources.open_session("package:factory", Screen(as_json=True))
    assert asked == []
    sources.open_session("package:factory", Screen(as_json=True), threads=3)
    assert asked == [3]
