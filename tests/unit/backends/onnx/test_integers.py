"""Rounded activations and 8-bit weights in ONNX Runtime: the same codes, multiplied as integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelathe.backends import Checkpoint, Eager, Onnx
from modelathe.backends.checks import check_lowering
from modelathe.backends.onnx import integers
from modelathe.backends.onnx.exact import exact_session
from modelathe.backends.onnx.session import products_overflow
from modelathe.backends.session import open_artifact
from modelathe.backends.taken_codes import TakenCodes
from modelathe.ir import LoweringError, Program
from modelathe.ir.activations import rounded_activations
from modelathe.passes import (
    FoldNorms,
    QuantizeActivations,
    QuantizeCache,
    QuantizeWeights,
    SilentProgress,
)
from modelathe.passes.probes import probe
from support.feeds import feed
from support.models import canonical, context
from support.numeric import relative_error
from support.onnx_models import emitted, opened, operators, ran


def rounded(model: str, symmetric: bool = False, **options: Any) -> Program:
    weights = QuantizeWeights(
        bits=8, group_size=-1, method="rtn", symmetric=symmetric, embedding_bits=8
    )
    return QuantizeActivations(**options)(
        weights(canonical(model), context()).program, context()
    ).program


def saved(program: Program, folder: Path, **options: Any) -> Path:
    Onnx(**options).lower(program, check=False).save(folder)
    return folder


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5", "cached-attention"])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_lowering_passes_its_check(model: str, mode: Any, tmp_path: Path) -> None:
    program = rounded(model, symmetric=model == "bert", mode=mode, bits=7 if model == "t5" else 8)
    with exact_session(saved(program, tmp_path / "out")) as session:
        found = check_lowering(program, session, "float32", SilentProgress())
    assert found["error"] < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_narrow_artifacts_pass_too(dtype: Any, mode: Any, tmp_path: Path) -> None:
    program = rounded("gpt2", mode=mode)
    with exact_session(saved(program, tmp_path / "out", dtype=dtype)) as session:
        check_lowering(program, session, dtype, SilentProgress())


def test_a_cache_of_codes_and_rounded_activations_go_together(tmp_path: Path) -> None:
    program = QuantizeCache(key_bits=8, value_bits=8)(rounded("llama"), context()).program
    with exact_session(saved(program, tmp_path / "out", opset=18)) as session:
        check_lowering(program, session, "float32", SilentProgress())


def test_linears_on_one_value_share_its_codes() -> None:
    counts = operators(emitted(rounded("llama")))
    # q, k and v share codes, and so do gate and up; the tied head keeps its weight and its kernel
    assert counts["QuantizeLinear"] == 2 * 4
    assert counts["MatMulIntegerToFloat"] == 2 * 7
    assert counts["MatMulNBits"] == 1
    assert counts["DequantizeLinear"] == 0


def test_eager_rounds_as_onnx_runtime_does(tmp_path: Path) -> None:
    program = rounded("bert")
    Eager().lower(program, check=False).save(tmp_path / "eager")
    inputs = {name: value.numpy() for name, value in feed(program, sequence=8).items()}
    onnx = open_artifact(saved(program, tmp_path / "onnx")).run(inputs)
    for name, value in open_artifact(tmp_path / "eager").run(inputs).items():
        # a number between two codes may take either: 1 step of 127
        assert relative_error(torch.from_numpy(value), torch.from_numpy(onnx[name])) < 0.02, name


@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_of_zeros_give_the_bias(symmetric: bool) -> None:
    weights = QuantizeWeights(bits=8, group_size=-1, method="rtn", symmetric=symmetric)
    program = QuantizeActivations()(weights(FoldNorms()(canonical("norm-mlp")).program).program)
    (name,) = program.program.signature.inputs
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    rows[1] = 2.0  # a norm makes zeros of it
    inputs = {name: rows}
    expected, found = program.program.run(inputs), ran(opened(emitted(program.program)), inputs)
    for output, value in expected.items():
        assert value.isfinite().all()
        torch.testing.assert_close(found[output], value, rtol=0, atol=1e-5)


def _altered(monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> None:
    plain = getattr(integers, name)
    monkeypatch.setattr(integers, name, lambda *given: change(plain(*given)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("middle_code", lambda code: code + 1),  # codes, and the zero that they are read with
        ("_signed", lambda codes: codes.roll(1, 0)),  # weights
    ],
)
def test_a_wrong_lowering_is_found_out(
    name: str, change: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = rounded("bert")
    _altered(monkeypatch, name, change)
    found_out = pytest.raises(LoweringError, match="is off by")
    with exact_session(saved(program, tmp_path / "out")) as session, found_out:
        check_lowering(program, session, "float32", SilentProgress())


def test_the_shipped_artifact_tells_no_codes(tmp_path: Path) -> None:
    program = rounded("bert")
    folder = saved(program, tmp_path / "out")
    inputs = {name: value.numpy() for name, value in feed(program, sequence=8).items()}
    session = open_artifact(folder)
    session.run(inputs)
    assert session.codes == {}
    with exact_session(folder) as exact:
        exact.run(inputs)
        assert set(exact.codes) == {v.node.name for v in rounded_activations(program.graph)}


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_either_neighbour_of_a_middle_is_right_and_nothing_else(mode: Any) -> None:
    program = rounded("token-norm", mode=mode)
    (view,) = rounded_activations(program.graph)
    values: dict[Any, Tensor] = {}
    inputs = probe(program, "main", 3, batch=1, sequence=4)
    program.run(inputs, observe=values.__setitem__, dtype=torch.float32)
    x = values[view.input]
    step: Any = x.abs().amax(-1, keepdim=True) / 127 if view.scale is None else values[view.scale]
    middle = 128 if view.zero is None else int(values[view.zero])
    exact = x / step + middle
    for codes, good in ((exact.floor(), False), (exact.round(), True)):
        taken = TakenCodes(program.graph, {view.node.name: codes.to(torch.uint8).numpy()})
        program.run(inputs, dtype=torch.float32, amend=taken)
        ((name, expected),) = taken.expected.items()
        assert (relative_error(expected, taken.found[name]) < 1e-6) == good


def test_a_checkpoint_refuses_rounded_activations(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"rounds activations|reads quantised weights"):
        Checkpoint().lower(rounded("bert")).save(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "overflow"),
    [
        ("flags : fpu sse4_1 avx2 fma", True),
        ("flags : fpu avx2 avx512f avx512_vnni", False),
        ("flags : fpu avx2 avx_vnni", False),
        ("Features : fp asimd asimddp", False),
    ],
)
def test_products_overflow_without_vnni(flags: str, overflow: bool, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\n{flags}\n")
    assert products_overflow(path) is overflow
    assert not products_overflow(tmp_path / "nothing")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_are_only_looked_up_have_one_scale(bits: Any, symmetric: bool) -> None:
    weights = QuantizeWeights(
        bits=8, group_size=-1, method="rtn", symmetric=symmetric, embedding_bits=bits
    )
    program = weights(canonical("token-norm")).program
    model = emitted(program)
    scales = [
        v for v in model.graph.initializers.values() if "embed" in v.name and "scales" in v.name
    ]
    assert [tuple(v.shape) for v in scales] == [(48, 1)]
    inputs = probe(program, "main", 3, batch=2, sequence=5)
    expected, found = program.run(inputs), ran(opened(model), inputs)
    for name, value in expected.items():
        assert relative_error(value, found[name]) < 1e-5


def test_a_sum_in_front_of_a_layer_norm_is_not_fused_with_it() -> None:
    counts = operators(emitted(canonical("bert")))
    assert counts["Sum"] == counts["LayerNormalization"] == 2 * 2 + 1
