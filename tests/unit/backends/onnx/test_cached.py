"""A cache of codes in ONNX Runtime: the same codes as torch, or codes that are as near."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelathe.backends import Checkpoint, Onnx
from modelathe.backends.checks import check_lowering
from modelathe.backends.coded_cache import Oracle
from modelathe.backends.generate import generate
from modelathe.backends.onnx import cached
from modelathe.backends.program_session import ProgramSession
from modelathe.backends.session import Session, open_artifact
from modelathe.ir import LoweringError, Program
from modelathe.ir.cache import reads_codes
from modelathe.passes import QuantizeCache, SilentProgress
from modelathe.passes.probes import probe
from support.models import canonical, context

MIXED = QuantizeCache(key_bits=4, value_bits=8, blocks=("1:2/4",))


def coded(model: str = "llama") -> Program:
    return MIXED(canonical(model), context()).program


def written(program: Program, folder: Path, **options: Any) -> Session:
    Onnx(**options).lower(program, check=False).save(folder)
    return open_artifact(folder)


@pytest.mark.parametrize("model", ["llama", "gpt2", "cached-attention"])
@pytest.mark.parametrize("opset", [18, 23])
def test_onnx_runtime_makes_the_codes_that_torch_makes(
    model: str, opset: int, tmp_path: Path
) -> None:
    program = QuantizeCache(key_bits=4, value_bits=2)(canonical(model), context()).program
    session = written(program, tmp_path / "out", opset=opset)
    inputs = probe(program, "main", 3, batch=2, sequence=7, past=4)
    expected = program.run(inputs, dtype=torch.float32)
    found = session.run({name: value.numpy() for name, value in inputs.items()})
    for name, value in expected.items():
        if value.dtype == torch.uint8:
            # another order of summation may put a number on the other side of a middle
            assert (torch.from_numpy(found[name]) != value).float().mean() < 0.01, name
        else:
            np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_lowering_passes_its_check(model: str, dtype: str, tmp_path: Path) -> None:
    program = coded(model)
    session = written(program, tmp_path / "out", dtype=dtype)
    check_lowering(program, session, dtype, SilentProgress())


def test_text_is_generated_from_a_cache_of_codes(tmp_path: Path) -> None:
    program = coded("gpt2")
    session = written(program, tmp_path / "out")
    prompts = [[5, 9, 11], [7]]
    found = generate(session, prompts, max_new_tokens=8)
    assert found == generate(ProgramSession.of(program), prompts, max_new_tokens=8)
    assert found == [generate(session, [p], max_new_tokens=8)[0] for p in prompts]


def test_onnxruntime_genai_is_told_why_it_cannot_run_it(tmp_path: Path) -> None:
    written(coded(), tmp_path / "out")
    assert not (tmp_path / "out" / "genai_config.json").exists()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (remark,) = manifest["remarks"]
    assert remark.startswith("missed: genai_config.json: not for onnxruntime-genai")
    assert "stored as codes with scales" in remark


def test_a_checkpoint_refuses_a_cache_of_codes(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="reads a cache of codes"):
        Checkpoint().lower(coded()).save(tmp_path / "out")


@contextmanager
def altered(name: str, function: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Translate with one function of the handlers replaced by ``function`` of its result."""
    plain = getattr(cached, name)
    with monkeypatch.context() as patch:
        patch.setattr(cached, name, lambda e, *args: function(e, plain(e, *args)))
        yield


def moved(e: Any, value: Any) -> Any:
    """Return codes one too large."""
    return e.op("Clip", e.op("Add", value, e.builder.constant(1, value.dtype)))


@pytest.mark.parametrize(("name", "function"), [("_rounded", moved), ("_packed", moved)])
def test_wrong_codes_are_found_out(
    name: str, function: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = coded("gpt2")
    with altered(name, function, monkeypatch):
        session = written(program, tmp_path / "out")
    with pytest.raises(LoweringError, match="is off by"):
        check_lowering(program, session, "float32", SilentProgress())


def test_a_scale_that_is_too_large_is_found_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Codes are then right for that scale, and each number within half of its large step."""
    program = coded("gpt2")
    with monkeypatch.context() as patch:
        patch.setattr(cached, "step_factor", lambda bits, dtype: 1.5 / ((1 << bits) - 1))
        session = written(program, tmp_path / "out")
    with pytest.raises(LoweringError, match="_scale of the artifact is off"):
        check_lowering(program, session, "float32", SilentProgress())


def test_a_past_that_is_not_handed_on_is_found_out() -> None:
    program = coded()
    inputs = probe(program, "main", 0, batch=1, sequence=2, past=3)
    outputs = program.run(inputs, dtype=torch.float32)
    arrays = {name: value.numpy().copy() for name, value in outputs.items()}
    arrays["present.0.key"][0, 0, 1] ^= 1
    expected, found = Oracle(program).run(inputs, "main", arrays, {})
    gaps = {name: (value.float() - found[name].float()).abs() for name, value in expected.items()}
    wrong = [name for name, gap in gaps.items() if bool((gap > 1e-4).any())]
    assert "present.0.key, past" in wrong
    assert "present.0.value, past" not in wrong


def test_a_number_in_the_middle_may_have_either_code() -> None:
    program = coded()
    inputs = probe(program, "main", 0, batch=1, sequence=2, past=0)
    values: dict[Any, torch.Tensor] = {}
    outputs = program.run(inputs, observe=values.__setitem__, dtype=torch.float32)
    read = reads_codes(program.graph)[0]
    steps = values[read.newest] / values[read.scales]
    off = (steps - steps.round())[0, 0, 0, :4]  # the low halves of the first token's bytes
    place = int(off.abs().argmax())
    other = 1 if off[place] > 0 else -1
    arrays = {name: value.numpy().copy() for name, value in outputs.items()}
    arrays["present.0.key"][0, 0, 0, place] += other
    expected, found = Oracle(program).run(inputs, "main", arrays, {})
    gap = (expected["present.0.key"] - found["present.0.key"]).abs()
    step = float(values[read.scales][0, 0, 0, 0])
    # the other neighbour is 1 - |off| steps away; half a step is forgiven
    assert float(gap.max()) == pytest.approx((0.5 - float(off[place].abs())) * step, abs=1e-5)
    assert int((gap > 1e-5).sum()) == 1


def test_every_cache_that_is_read_is_an_output_of_codes() -> None:
    program = coded()
    results = program.graph.output_node().args[0]
    assert isinstance(results, tuple)
    assert all(read.codes in results for read in reads_codes(program.graph))
