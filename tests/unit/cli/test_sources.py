"""What opens a word of the command line."""

from __future__ import annotations

import pytest
import torch

from modelathe.cli import sources
from modelathe.cli.screen import Screen
from support.models import program


def test_threads_count_for_a_model_that_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "open_program", lambda *_, **__: program("norm-mlp"))
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    sources.open_session("package:factory", Screen(as_json=True))
    assert asked == []
    sources.open_session("package:factory", Screen(as_json=True), threads=3)
    assert asked == [3]
