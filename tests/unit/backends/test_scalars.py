"""An input without axes keeps having none, in every runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modelathe.backends import Backend, Eager, Onnx, open_artifact
from modelathe.ir import capture


class Power(nn.Module):
    def forward(self, base: Tensor, exponent: Tensor) -> Tensor:
        return base**exponent


@pytest.mark.parametrize("backend", [Eager(), Onnx()], ids=["eager", "onnx"])
def test_what_is_made_of_scalars_is_one(backend: Backend, tmp_path: Path) -> None:
    program = capture(Power().eval(), (torch.tensor(3.0), torch.tensor(2.0)))
    backend.lower(program).save(tmp_path / "out")
    session = open_artifact(tmp_path / "out")
    first, second = (spec.name for spec in session.graphs["main"].inputs)
    (found,) = session.run({first: np.array(2.0), second: np.array(5.0)}).values()
    assert (found.shape, float(found)) == ((), 32.0)
