"""A healing run that is stopped at any step and gone on with gives the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modelathe.ir import Program, fingerprint
from modelathe.passes import Heal, RemoveNorms
from support.models import canonical
from support.numeric import assert_same_bits
from support.training import SHORT, context, pruned, stop_training


class StoppedError(Exception):
    """The run was killed."""


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what has training raise when a run of this process has done so many steps."""
    return lambda steps: stop_training(monkeypatch, steps, StoppedError)


def weights(program: Program) -> dict[str, torch.Tensor]:
    return {name: program.weights[name].load() for name in program.weights}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 0),
        ({}, 1),
        ({}, 11),
        ({"weights": "lora"}, 7),
        ({"optimizer": "lamb", "layer_decay": 0.8}, 7),
        ({"mix": 0.5}, 7),
    ],
    ids=["first", "second", "last", "lora", "lamb", "mix"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    options: dict[str, Any], steps: int, tmp_path: Path, stop: Any
) -> None:
    before, pass_ = pruned("llama"), Heal(**{**SHORT, **options})
    whole = pass_(before, context())
    stop(steps)
    with pytest.raises(StoppedError):
        pass_(before, context(state=tmp_path))
    stop(None)
    rest = pass_(before, context(state=tmp_path))
    assert_same_bits(weights(rest.program), weights(whole.program))
    assert rest.details == whole.details


def test_norms_that_were_frozen_before_the_stop_stay_frozen(tmp_path: Path, stop: Any) -> None:
    marked = RemoveNorms(schedule="progressive", untie=True)(canonical("gpt2"), context()).program
    pass_ = Heal(**SHORT)
    whole = pass_(marked, context())
    stop(6)
    with pytest.raises(StoppedError):
        pass_(marked, context(state=tmp_path))
    stop(None)
    rest = pass_(marked, context(state=tmp_path))
    assert fingerprint(rest.program) == fingerprint(whole.program)


def test_nobody_goes_on_from_the_state_of_another_run(tmp_path: Path, stop: Any) -> None:
    stop(6)
    with pytest.raises(StoppedError):
        Heal(**SHORT)(pruned("llama"), context(state=tmp_path))
    stop(None)
    other = {**SHORT, "lr": 1e-3}
    apart = Heal(**other)(pruned("llama"), context())
    found = Heal(**other)(pruned("llama"), context(state=tmp_path))
    assert fingerprint(found.program) == fingerprint(apart.program)


def test_a_state_that_was_cut_short_while_it_was_written_is_not_read(tmp_path: Path) -> None:
    whole = Heal(**SHORT)(pruned("llama"), context())
    for name in ("heal-0.partial", "generated-0.partial"):
        (tmp_path / name).write_bytes(b"half")
    found = Heal(**SHORT)(pruned("llama"), context(state=tmp_path))
    assert fingerprint(found.program) == fingerprint(whole.program)
