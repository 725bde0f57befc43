"""The demo: what it shows of the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelathe.cli import demo

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
