"""Timing and memory: which figures there are, and how they are put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelathe.backends import bench as bench_module
from modelathe.backends.bench import bench
from modelathe.backends.manifest import model_bytes
from modelathe.backends.peak import peak_memory
from modelathe.backends.program_session import ProgramSession
from modelathe.backends.session import open_artifact
from modelathe.backends.workload import Sizes, run_once
from modelathe.ir import DataError
from support.models import program


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(bench_module, "peak_memory", lambda session: 1000)


def test_a_decoder_is_timed_in_tokens_per_second(toy: Path) -> None:
    session = open_artifact(toy)
    assert Sizes.of(session) == Sizes(prompt=12, new=12)
    figures = run_once(session)
    assert list(figures) == ["prefill", "decode"]
    assert min(figures.values()) > 0


@pytest.mark.usefixtures("quick")
def test_alone_there_is_no_ratio(toy: Path) -> None:
    session = open_artifact(toy)
    found = bench(session)
    assert found["bytes"] == model_bytes(session.manifest) == (toy / "model.onnx").stat().st_size
    assert (found["against"], found["ratio"], found["peak_memory"]) == (None, None, 1000)


@pytest.mark.usefixtures("quick")
def test_ratios_are_medians_of_the_rounds_and_the_two_take_turns(
    toy: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = open_artifact(toy), open_artifact(other)
    order: list[str] = []
    pace = iter([9, 9, 1, 2, 20, 2, 30, 3, 4, 8, 50, 5])  # the first round warms up

    def timed(session: Any) -> dict[str, float]:
        order.append("mine" if session is mine else "theirs")
        return {"latency": float(next(pace))}

    monkeypatch.setattr(bench_module, "run_once", timed)
    found = bench(mine, theirs)
    assert order[:6] == ["mine", "theirs", "theirs", "mine", "mine", "theirs"]
    # rounds, mine / theirs: 2/1, 20/2, 3/30, 4/8, 5/50
    assert found["ratio"]["latency"] == pytest.approx(0.5)
    assert found["latency"] == 4.0
    assert found["against"]["latency"] == 8.0
    assert found["ratio"]["bytes"] == 1.0


def test_models_of_different_kinds_are_refused_before_they_are_timed(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ProgramSession.of(program("norm-linears"))
    monkeypatch.setattr(bench_module, "run_once", lambda session: pytest.fail("timed"))
    with pytest.raises(DataError, match="kind decoder, the reference of kind module"):
        bench(open_artifact(toy), other, memory=False)


def test_peak_memory_is_measured_in_a_process_of_its_own(toy: Path) -> None:
    peak = peak_memory(open_artifact(toy))
    assert peak is None or 10_000 < peak < 200_000_000
