"""Equalised programs as model folders: scales lie in weights that the architecture has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modelathe.ir import capture
from modelathe.passes import Canonicalize, Equalize
from support.checkpoints import model_folder, round_trip
from support.feeds import feed
from support.models import context
from support.numeric import rounding, worst_error


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_equalised_program_goes_back_and_computes_the_same(name: str, tmp_path: Path) -> None:
    source = Canonicalize()(capture(model_folder(name, tmp_path / "model"))).program
    result = Equalize(kind="smooth", grid=2)(source, context())
    assert result.modified
    trip = round_trip(result.program, tmp_path / "out")
    assert not {key: value for key, value in trip.told.items() if value}
    inputs = feed(source, sequence=5)
    found, wanted = trip.again.run(inputs), trip.program.run(inputs)
    assert worst_error(found, wanted) <= rounding(torch.float32, steps=64)
    logits = {"logits": source.run(inputs)["logits"]}
    assert worst_error({"logits": found["logits"]}, logits) <= rounding(torch.float32, steps=256)
