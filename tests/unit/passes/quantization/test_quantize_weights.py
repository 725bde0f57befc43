from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import PassError, Program, TensorWeight, fingerprint
from modelathe.ir.quant import QuantType, quantize
from modelathe.passes.quantization import QuantizeWeights, store
from support.tiny import TinyBlock, logits, logits_with, tiny, tiny_model, tiny_program
from support.views import quantized_calls


def bits_by_path(program: Program) -> dict[str, int]:
    return {path: call.bits for path, call in quantized_calls(program).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 3, "group_size": -1, "symmetric": True},
        {"bits": 2, "group_size": 16, "clip": "weight"},
        {"bits": 8, "head_bits": 4},
    ],
)
def test_the_result_computes_what_the_model_computes_with_rounded_weights(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = tiny_model(2, dtype=dtype)
    pass_ = QuantizeWeights(**options)
    rounded: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            usual = pass_.bits or 4
            bits = options.get("head_bits", usual) if "embed" in name else usual
            qtype = QuantType(bits, pass_.group_size, pass_.symmetric)
            rounded[name] = quantize(weight.detach(), qtype, pass_.clip).dequantize()
    result = pass_(tiny(2, dtype=dtype)).program
    assert logits(result).equal(logits_with(model, rounded))
    assert len(quantized_calls(result)) == 6


def test_a_tied_pair_is_one_tensor_ruled_by_head_bits() -> None:
    program = tiny(1)
    result = QuantizeWeights(bits=4, head_bits=8, embedding_bits=2)(program).program
    calls = quantized_calls(result)
    assert {path: c.bits for path, c in calls.items()} == {
        "embed": 8, "layers.0.up": 4, "layers.0.down": 4, "head": 8,
    }  # fmt: skip
    embed, head = calls["embed"], calls["head"]
    assert embed.zeros is not None
    assert head.zeros is not None
    for a, b in ((embed.codes, head.codes), (embed.scales, head.scales), (embed.zeros, head.zeros)):
        assert a.target == b.target
    untouched = QuantizeWeights(head_bits=None, embedding_bits=2)(program).program
    assert set(bits_by_path(untouched)) == {"layers.0.up", "layers.0.down"}
    nameless = replace(program, signatures={"main": program.signature.renamed({"logits": "y"})})
    assert bits_by_path(QuantizeWeights(head_bits=8)(nameless).program)["head"] == 8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"head": 4}),
        ({"head_bits": 8}, {"head": 8}),
        ({"head_bits": None}, {}),
        ({"embedding_bits": 2, "head_bits": 3}, {"embed": 2, "head": 3}),
    ],
)
def test_head_and_embedding_have_widths_of_their_own(
    options: dict[str, Any], expected: dict[str, int]
) -> None:
    result = QuantizeWeights(**options)(tiny(1, tied=False)).program
    blocks = {"layers.0.up": 4, "layers.0.down": 4}
    assert bits_by_path(result) == blocks | expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"only": ("layers.0",)}, {"layers.0.up", "layers.0.down"}),
        ({"only": ("layers.*.up", "head")}, {"layers.0.up", "layers.1.up", "embed", "head"}),
        ({"ignore": ("down", "embed")}, {"layers.0.up", "layers.1.up"}),
        ({"only": ("layers.1",), "ignore": ("up",)}, {"layers.1.down"}),
    ],
)
def test_globs_choose_modules(options: dict[str, Any], expected: set[str]) -> None:
    result = QuantizeWeights(**options)(tiny(2)).program
    assert set(bits_by_path(result)) == expected


@pytest.mark.parametrize("option", ["only", "ignore"])
def test_a_glob_that_matches_nothing_is_an_error(option: str) -> None:
    with pytest.raises(PassError, match=f'{option}="attention" matches none'):
        QuantizeWeights(**{option: ("attention",)})(tiny(1))


def test_a_group_size_that_does_not_divide_is_an_error_with_a_remedy() -> None:
    program = tiny_program(tiny_model([TinyBlock(hidden=40)]))
    with pytest.raises(
        PassError, match=r"@layers\.0\.down\.weight: 40 wide.*group-size=32"
    ) as info:
        QuantizeWeights()(program)
    assert 'ignore="layers.0.down"' in info.value.remedy
    assert "group-size=-1" in info.value.remedy
    assert QuantizeWeights(group_size=-1)(program).modified
    assert QuantizeWeights(ignore=("layers.0.down",))(program).modified


def test_blocks_that_share_weights_share_codes() -> None:
    block = TinyBlock()
    result = QuantizeWeights()(tiny_program(tiny_model([block, block, TinyBlock()])))
    codes = [call.codes.target for call in quantized_calls(result.program).values()]
    applied = [remark for remark in result.remarks if remark.where.startswith("@")]
    assert len(set(codes)) == len(applied) == 5


class Experts(nn.Module):
    """A stack of experts, a convolution, and matrices that are not only a linear's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.ones(2, 32, 32))
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.plain = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.made = nn.Parameter(torch.ones(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.bmm(x, self.experts)
        y = nn.functional.linear(y, self.made.exp())
        y = self.conv(y.transpose(1, 2)).transpose(1, 2)
        result: Tensor = self.norm(self.plain(y)) + self.plain.weight.sum()
        return result


def test_what_it_cannot_quantize_is_missed_with_the_reason() -> None:
    model = tiny_model([Experts(), TinyBlock()])
    result = QuantizeWeights()(tiny_program_of(model))
    missed = {r.where: r.message for r in result.remarks if r.kind == "missed"}
    assert set(missed) == {
        "@layers.0.experts", "@layers.0.conv.weight", "@layers.0.plain.weight", "%linear",
    }  # fmt: skip
    assert missed["%linear"] == "its weight is made by aten.exp"
    assert missed["@layers.0.experts"] == "[2, 32, 32], read by aten.bmm: not a linear or embedding"
    assert "conv" in missed["@layers.0.conv.weight"]
    assert "aten.sum" in missed["@layers.0.plain.weight"]


def tiny_program_of(model: nn.Module) -> Program:
    """``tiny_program`` with a batch of two, which the stack of experts needs."""
    from modelathe.ir import capture

    return capture(model, (torch.zeros(2, 3, dtype=torch.int64),))


@pytest.mark.parametrize("group_size", [-1, 16])
def test_a_transposed_weight_is_no_obstacle(group_size: int) -> None:
    model = tiny_model(1, tied=False)
    model.get_submodule("head").weight = nn.Parameter(torch.randn(32, 24).T)
    assert QuantizeWeights(group_size=group_size)(tiny_program(model)).modified


def test_a_second_run_changes_nothing_and_says_why() -> None:
    program = QuantizeWeights(only=("layers.0",))(tiny(2)).program
    second = QuantizeWeights(only=("layers.0",))(program)
    assert fingerprint(second.program) == fingerprint(program)
    assert [str(remark) for remark in second.remarks] == [
        "missed: @layers.0.up.weight.codes: quantised to 4 bits already",
        "missed: @layers.0.down.weight.codes: quantised to 4 bits already",
    ]
    assert QuantizeWeights()(program).modified


def test_the_input_program_keeps_its_weights() -> None:
    program = tiny(1)
    before, expected = fingerprint(program), logits(program)
    QuantizeWeights()(program)
    assert fingerprint(program) == before
    assert logits(program).equal(expected)


def test_a_weight_is_quantized_once_for_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[torch.Size] = []

    def count(weight: Tensor, *rest: Any) -> Any:
        counted.append(weight.shape)
        return quantize(weight, *rest)

    monkeypatch.setattr(store, "quantize", count)
    result = QuantizeWeights()(tiny(2))
    logits(result.program)
    assert len(counted) == 5


def test_a_remark_has_the_error_and_the_bytes() -> None:
    model = tiny_model(1)
    result = QuantizeWeights(only=("up",))(tiny(1))
    weight = model.get_parameter("layers.0.up.weight").detach()
    restored = quantize(weight, QuantType(4, 32, symmetric=False)).dequantize()
    decibels = 10 * torch.log10(weight.square().sum() / (weight - restored).square().sum())
    method, remark = result.remarks
    assert (
        str(method)
        == "applied: quantize-weights: rtn: there is no calibration text that it could read"
    )
    assert str(remark) == (
        f"applied: @layers.0.up.weight: 4 bits per group of 32, {decibels:.1f} dB signal to error, "
        f"{64 * 32 * 4} -> {64 * (16 + 4 + 1)} bytes"
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    program = tiny_program(tiny_model(1)).editable()
    value = program.weights["layers.0.up.weight"].load().clone()
    value[3, 5] = bad
    program.weights.put("layers.0.up.weight", TensorWeight(value))
    with pytest.raises(PassError, match=r"@layers\.0\.up\.weight: the weight holds nan or inf"):
        QuantizeWeights()(program)


@pytest.mark.parametrize(
    "options",
    [{"bits": 5}, {"head_bits": 1}, {"embedding_bits": 7}, {"group_size": 0}, {"clip": "mse"},
     {"only": "head"}],
)  # fmt: skip
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"bits is|group_size is|clip is|only is"):
        QuantizeWeights(**options)
