"""Modules of the user's own: what they may return, and what sizes they may need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import (
    CaptureError,
    Program,
    StorageError,
    capture,
    save_program,
    tracing,
    verify,
)
from modelathe.ir.infer import size_hints
from modelathe.ir.storage import load_program
from modelathe.passes.probes import probes, size_variations


class Returns(nn.Module):
    """Returns what ``pick`` makes of its input's double."""

    def __init__(self, pick: Any) -> None:
        super().__init__()
        self.pick = pick

    def forward(self, x: Tensor) -> Any:
        return self.pick(x * 2)


@pytest.mark.parametrize(
    ("pick", "names"),
    [
        (lambda y: (y, None), ("output",)),
        (lambda y: (y, None, {"more": y + 1}), ("output_0", "output_2")),
    ],
)
def test_an_output_that_is_none_is_left_out(pick: Any, names: tuple[str, ...]) -> None:
    found = capture(Returns(pick).eval(), (torch.ones(2, 3),))
    verify(found)
    values = [torch.full((2, 3), 2.0), torch.full((2, 3), 3.0)]
    made = found.run({"x": torch.ones(2, 3)})
    assert tuple(made) == names
    assert all(torch.equal(a, b) for a, b in zip(made.values(), values, strict=False))


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        (lambda y: (y, 3), r"output 1 is no tensor"),
        (lambda y: (y.shape[0], y), r"output 0 is no tensor"),
        (lambda y: None, r"returns no tensor"),
    ],
)
def test_other_outputs_that_are_no_tensors_are_refused(pick: Any, message: str) -> None:
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    with pytest.raises(CaptureError, match=message) as caught:
        capture(Returns(pick).eval(), (torch.ones(2, 3),), shapes)
    assert caught.value.remedy


D = torch.export.Dim.DYNAMIC
Case = tuple[nn.Module, tuple[Tensor, ...], Any]


def _wide_kernel() -> Case:
    return nn.Conv1d(4, 8, 9), (torch.ones(2, 4, 64),), ({0: D, 2: D},)


def _three_pools() -> Case:
    pools = (nn.MaxPool2d(2) for _ in range(3))
    return nn.Sequential(*pools, nn.Flatten(2)), (torch.ones(2, 3, 32, 32),), ({0: D, 2: D, 3: D},)


class Window(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x[: y.shape[0]] + y


def _window() -> Case:
    """The second size is at most the first, though both examples have the same."""
    return Window(), (torch.ones(6), torch.ones(6)), ({0: D}, {0: D})


def _limited() -> Case:
    size = torch.export.Dim("length", min=3, max=10)
    return nn.Linear(4, 4), (torch.ones(7, 4),), ({0: size},)


def captured(case: Callable[[], Case]) -> Program:
    module, example, shapes = case()
    return capture(module.eval(), example, shapes)


@pytest.mark.parametrize("case", [_wide_kernel, _three_pools, _window, _limited])
def test_sizes_are_as_large_as_the_example_had_them(case: Callable[[], Case]) -> None:
    module, example, shapes = case()
    found = capture(module.eval(), example, shapes)
    verify(found)
    made = found.run(dict(zip(found.signature.inputs, example, strict=True)))
    assert torch.equal(made["output"], module(*example))
    for _, inputs in probes(found):
        found.run(inputs)


def test_equal_examples_are_told_apart() -> None:
    found = captured(_three_pools)
    assert size_hints(found.graph, found.signature) == {"d0": 2, "d1": 32, "d2": 64}


@pytest.mark.parametrize("case", [_wide_kernel, _limited])
def test_sizes_and_limits_survive_a_file(case: Callable[[], Case], tmp_path: Path) -> None:
    before = captured(case)
    save_program(before, tmp_path)
    after = load_program(tmp_path)
    assert size_hints(after.graph, after.signature) == size_hints(before.graph, before.signature)
    assert after.signature.limits == before.signature.limits


def test_a_check_varies_every_size_within_what_is_legal() -> None:
    assert list(size_variations(captured(_wide_kernel), "main")) == [
        {"d0": 2, "d1": 64},
        {"d0": 1, "d1": 64},
        {"d0": 4, "d1": 128},
        {"d0": 3, "d1": 66},
    ]
    assert list(size_variations(captured(_limited), "main")) == [{"d0": 7}, {"d0": 8}]


def test_shapes_that_cannot_be_followed_are_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("negative output size")

    monkeypatch.setattr(tracing, "infer_graph", fails)
    with pytest.raises(CaptureError, match="shapes cannot be followed: negative output size"):
        captured(_wide_kernel)


class Damaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 2), float("nan")))
        self.mask: Tensor
        self.register_buffer("mask", torch.full((2,), float("-inf")))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.mask


def test_a_module_is_told_of_nan_in_a_parameter_but_not_in_a_buffer() -> None:
    found = capture(Damaged().eval(), (torch.ones(3, 2),))
    assert found.weight("mask").load().isinf().all()
    with pytest.raises(StorageError, match="Damaged: weight holds nan or inf"):
        found.weight("weight").load()
