"""Whoever asks is told how far a capture is, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from modelathe.ir import Program, capture, load_program, save_program, to_text
from modelathe.ir.watch import Watch
from support.folders import tiny_bert, tiny_seq2seq, write_folder
from support.models import program
from support.tiny import tiny_model


def told_by(work: Callable[[Callable[[float], None]], Program]) -> tuple[list[float], Program]:
    shares: list[float] = []
    return shares, work(shares.append)


@pytest.fixture(scope="module")
def bert() -> tuple[list[float], Program]:
    return told_by(lambda report: capture(tiny_bert(), report=report))


def test_the_share_grows_to_the_whole(bert: tuple[list[float], Program]) -> None:
    shares, _ = bert
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] == pytest.approx(1, abs=0.1)  # building is accounted for in folders only


def test_no_stage_is_without_steps(bert: tuple[list[float], Program]) -> None:
    shares = [0.0, *bert[0]]
    jumps = [after - before for before, after in pairwise(shares)]
    assert max(jumps) < 0.1
    assert len(jumps) > 100


def test_what_is_captured_does_not_change(bert: tuple[list[float], Program]) -> None:
    assert to_text(bert[1]) == to_text(capture(tiny_bert()))


def test_nothing_is_left_behind_even_by_a_failure() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    run_node = fx.Interpreter.run_node
    hooks = len(nn.modules.module._global_forward_hooks)
    with pytest.raises(Exception, match="no"):
        capture(Fails().eval(), (torch.ones(1),), report=lambda _: None)
    capture(tiny_model(1), (torch.zeros(2, 3, dtype=torch.int64),), report=lambda _: None)
    assert fx.Interpreter.run_node is run_node
    assert len(nn.modules.module._global_forward_hooks) == hooks


def test_a_folder_reaches_the_whole_for_every_graph(tmp_path: Path) -> None:
    folder = write_folder(tiny_seq2seq("bart"), tmp_path)
    shares, _ = told_by(lambda report: capture(folder, report=report))
    assert shares[-1] == pytest.approx(1)
    assert sum(share < 0.5 for share in shares) > 100


def test_a_saved_program_tells_how_much_is_read(tmp_path: Path) -> None:
    save_program(program("gpt2"), tmp_path)
    shares, found = told_by(lambda report: load_program(tmp_path, report))
    assert shares[-1] == 1
    assert len(shares) >= len(found.graph.nodes)


def test_more_steps_than_expected_stay_within_the_stage() -> None:
    shares: list[float] = []
    watch = Watch(shares.append)
    with watch.stage(0.5, steps=2) as step:
        step()
        step(5)
    assert shares == [0.25, 0.5, 0.5]
