"""What is checked of codes that text has chosen: that they stand for what was computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from modelathe.ir import Program, QuantizedLinear, TensorWeight
from modelathe.ir.quant import QuantizedTensor, QuantType
from modelathe.passes import PassContext, PassError, QuantizeWeights
from modelathe.passes.data import TokenWindows
from modelathe.passes.quantization import quantize_weights
from modelathe.passes.quantization.methods import AUTO, PUBLISHED, share_lost, solve
from modelathe.passes.quantization.outliers import Outliers, Solved
from modelathe.passes.quantization.sequential import Moments
from support.models import canonical
from support.views import views


def context() -> PassContext:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(32, (4, 12), generator=generator)
    return PassContext(calibration=TokenWindows.of(tokens, "test"))


@dataclass(frozen=True, kw_only=True)
class Broken(QuantizeWeights):
    """Quantises, then spoils what is stored as ``how`` says."""

    how: str = ""

    def run(self, program: Program, context: PassContext) -> Any:
        result = super().run(program, context)
        first, second, *_ = views(QuantizedLinear, program)
        scales, codes = (program.weight(part) for part in (first.scales, first.codes))
        other = program.weight(second.codes)  # of a weight of the same sizes
        spoiled: Any = {
            "groups": (first.scales, TensorWeight(scales.load().roll(1, 1))),
            "step": (first.scales, TensorWeight(scales.load() * 1.01)),
            "rows": (first.codes, TensorWeight(codes.load().roll(1, 0))),
            "another weight": (first.codes, other),
        }
        node, value = spoiled[self.how]
        program.weights.put(str(node.target), value)
        return result


@pytest.mark.parametrize("how", ["groups", "step", "rows", "another weight"])
def test_what_is_not_what_was_computed_is_found(how: str) -> None:
    broken = Broken(how=how, group_size=8, only=("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"))
    with pytest.raises(PassError, match=r"@model\.layers\.1.* do not stand for the numbers"):
        broken(canonical("llama"), context())


def test_a_weight_may_move_by_more_than_its_size_where_nothing_is_read() -> None:
    program = canonical("llama").editable()
    name = "model.embed_tokens.weight"
    generator = torch.Generator().manual_seed(0)
    table = program.weights[name].load()
    rows, columns = (torch.randn(size, generator=generator) for size in table.shape)
    one_direction = torch.outer(rows, columns) + 0.05 * table
    program.weights.put(name, TensorWeight(one_direction))
    pass_ = QuantizeWeights(bits=2, group_size=-1, method="quantease", head_bits=None)
    remarks = pass_(program, context()).remarks
    noise = [float(r.message.split(" dB")[0].split()[-1]) for r in remarks if " dB" in r.message]
    assert min(noise) < 0


def test_it_is_said_where_nothing_is_left_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_weights, "share_lost", lambda *_: 1.0)
    pass_ = QuantizeWeights(group_size=8, only=("layers.0.mlp.down_proj",))
    remarks = pass_(canonical("llama"), context()).remarks
    assert any(r.kind == "missed" and "nothing is left" in r.message for r in remarks)


def uneven() -> tuple[torch.Tensor, Moments]:
    """Return a weight, and moments of inputs whose powers differ by far."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.exp(4 * torch.randn(96, 1, generator=generator))
    mixing = torch.randn(96, 12, generator=generator) / 12**0.5
    inputs = mixing @ torch.randn(12, 1000, generator=generator)
    inputs = powers * (inputs + 0.3 * torch.randn(96, 1000, generator=generator))
    weight = torch.randn(64, 96, generator=generator)
    return weight, Moments(inputs @ inputs.T / 1000, 1000)


def test_refitted_scales_stay_near_the_weight_where_powers_differ_by_far() -> None:
    weight, moments = uneven()
    solved = solve("weight", weight, moments, QuantType(2, 16, symmetric=False), AUTO)
    assert float(solved.dequantize().abs().max()) < 2 * float(weight.abs().max())


def test_refitting_leaves_the_codes_of_gptq_as_they_are() -> None:
    weight, moments = uneven()
    qtype = QuantType(3, 16, symmetric=False)
    plain, fitted = (
        solve("weight", weight, moments, qtype, replace(PUBLISHED["gptq"], refit=refit))
        for refit in (False, True)
    )
    assert fitted.codes.codes.equal(plain.codes.codes)
    lost = [share_lost(weight, solved, moments) for solved in (fitted, plain)]
    assert lost[0] < 0.9 * lost[1]


def test_what_was_solved_elsewhere_comes_back_into_memory_with_all_its_parts() -> None:
    qtype = QuantType(4, 8, symmetric=False)
    with FakeTensorMode():  # a device that need not be there
        part = torch.empty(4, device="cuda")
        codes = QuantizedTensor(qtype, 8, part, part, part)
        solved = Solved(codes, Outliers(part, part, part)).cpu()
    codes, kept = solved.codes, solved.outliers
    assert kept is not None
    parts = (codes.codes, codes.scales, codes.zeros, *kept.parts().values())
    assert [part is not None and part.device.type for part in parts] == ["cpu"] * 6
