"""What a dry run expects is about what the run makes."""

from __future__ import annotations

from typing import Any

import pytest

from modelathe.backends import Eager, Onnx
from modelathe.backends.sizes import program_sizes
from modelathe.cli.plan import plan
from modelathe.passes import ConvertDtype, PassContext, Pipeline, PruneBlocks, QuantizeWeights
from support.models import canonical, program


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"only": ("layers.0",)}),
        ("llama", {"ignore": ("*.mlp",)}),
        ("llama", {"head_bits": None}),
        ("llama", {"bits": 8, "symmetric": True}),
        ("bert", {}),
        ("bert", {"embedding_bits": 8}),
    ],
)
def test_bytes_of_quantised_weights(name: str, options: dict[str, Any]) -> None:
    pass_ = QuantizeWeights(method="rtn", group_size=8, **options)
    made = pass_(canonical(name), PassContext()).program
    found = plan(program(name), Pipeline([pass_]), Eager(), None)
    assert found["bytes"] == program_sizes(program(name)).bytes
    assert found["estimated_bytes"] == pytest.approx(program_sizes(made).bytes, rel=0.01)


def test_bytes_of_fewer_blocks() -> None:
    pass_ = PruneBlocks(blocks=(1,))
    made = pass_(canonical("llama"), PassContext()).program
    found = plan(program("llama"), Pipeline([pass_]), Eager(), None)
    assert found["estimated_blocks"] == 1
    assert found["estimated_bytes"] == pytest.approx(program_sizes(made).bytes, rel=0.03)


@pytest.mark.parametrize(
    ("passes", "backend", "times"),
    [
        ([], Eager(), 1),
        ([], Onnx(), 2),
        ([], Onnx(dtype="float16"), 1),
        ([ConvertDtype(to="float16")], Onnx(), 1),
        ([ConvertDtype(to="float32")], Eager(), 2),
    ],
)
def test_bytes_of_the_dtype_that_is_written(passes: list[Any], backend: Any, times: int) -> None:
    found = plan(program("llama-bf16"), Pipeline(passes), backend, None)
    assert found["estimated_bytes"] == pytest.approx(times * found["bytes"], rel=0.02)
