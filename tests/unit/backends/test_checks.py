"""The check of an artifact: which sizes it feeds, and what it makes of a runtime that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelathe.backends import Eager, Onnx
from modelathe.backends.checks import check_lowering, compute_dtype
from modelathe.backends.program_session import ProgramSession
from modelathe.backends.session import Cache
from modelathe.ir import FidelityError, LoweringError, StorageError, capture
from modelathe.passes.progress import SilentProgress
from support.models import program


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("norm-mlp", ["d0 = 3", "d0 = 1", "d0 = 6", "d0 = 4"]),
        ("vit", ["batch = 4", "batch = 2", "batch = 1"]),
    ],
)
def test_the_sizes_that_were_fed_are_recorded_each_once(name: str, sizes: list[str]) -> None:
    session = ProgramSession.of(program(name))
    found = check_lowering(program(name), session, "float32", SilentProgress())
    assert found["shapes"] == [f"main: {each}" for each in sizes]


def test_a_runtime_that_fails_at_some_size_is_named_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = ProgramSession.of(program("norm-mlp"))
    right = session._execute

    def execute(graph: str, feeds: Any, sizes: Any) -> Any:
        if next(iter(feeds.values())).shape[0] == 1:
            raise RuntimeError("no kernel")
        return right(graph, feeds, sizes)

    monkeypatch.setattr(session, "_execute", execute)
    with pytest.raises(LoweringError, match="fails at d0 = 1: no kernel"):
        check_lowering(program("norm-mlp"), session, "float32", SilentProgress())


def forget(cache: Cache) -> Cache:
    """Return the cache without what the last steps left."""
    return replace(cache, state=None)


def swap(cache: Cache) -> Cache:
    """Return the cache with keys in the places of values."""
    turned = {"key": "value", "value": "key"}
    state = dict(cache.state or {})
    places = {name: name.rpartition(".") for name in state}
    return replace(cache, state={n: state[f"{p[0]}.{turned[p[2]]}"] for n, p in places.items()})


@pytest.mark.parametrize("damage", [None, forget, swap])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_steps_with_a_cache_are_checked(
    monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Cache], Cache] | None
) -> None:
    session = ProgramSession.of(program(name))
    right = session.decode

    def decode(tokens: Any, mask: Any, cache: Cache | None = None) -> Any:
        logits, cache = right(tokens, mask, cache)
        return logits, cache if damage is None else damage(cache)

    monkeypatch.setattr(session, "decode", decode)
    if damage is None:
        found = check_lowering(program(name), session, "float32", SilentProgress())
        assert found["decoded_tokens"] == 16
        return
    with pytest.raises(LoweringError, match="of greedy decoding"):
        check_lowering(program(name), session, "float32", SilentProgress())


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(-x.abs() - 1)


def test_a_program_computes_in_the_dtype_of_most_numbers_not_of_most_bytes() -> None:
    wide, narrow = nn.Linear(3, 1, bias=False), nn.Linear(1, 4, bias=False).half()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = wide, narrow

        def forward(self, x: Tensor) -> Tensor:
            return self.narrow(self.wide(x).half())

    found = capture(Both().eval(), (torch.ones(2, 3),))
    assert compute_dtype(found) == "float16"


def test_figures_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    found = capture(Log().eval(), (torch.ones(3, 8),))
    with pytest.raises(FidelityError, match="hold nan or inf"):
        Eager().lower(found).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_a_weight_is_named_while_it_is_written(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).eval()
    with torch.no_grad():
        model.weight[0, 1] = float("nan")
    with pytest.raises(StorageError, match="Linear: weight holds nan or inf"):
        Onnx().lower(capture(model, (torch.ones(3, 3),)), check=False).save(tmp_path / "out")
