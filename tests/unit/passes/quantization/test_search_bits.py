"""``search-bits`` meets its target with widths that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from modelathe.ir import (
    SCRATCH,
    PassError,
    Program,
    QuantizedLinear,
    TensorWeight,
    marks_of,
    path_of,
)
from modelathe.passes import (
    AssignBits,
    Pass,
    PassContext,
    Pipeline,
    QuantizeWeights,
    SearchBits,
    TokenWindows,
)
from modelathe.passes.fidelity import Reference
from modelathe.passes.quantization import bit_search
from modelathe.passes.quantization.readers import WIDTH
from modelathe.passes.quantization.search_bits import first_pairs
from modelathe.passes.quantization.sensitivity import Cost, RoundedUnits, second_order
from modelathe.passes.quantization.store import Stored
from modelathe.passes.quantization.units import find_units, single_linears
from support.models import VOCABULARY, canonical, context

FEW = {"group_size": 8, "pairs": 2, "tables": 2}


def text() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (32, 12), generator=generator)


def searched(model: str = "llama", **options: Any) -> Any:
    return SearchBits(**{**FEW, **options})(canonical(model), context())


def widths(program: Program) -> dict[str, int]:
    return {
        path_of(node): int(marks_of(node)[WIDTH])
        for node in program.graph.nodes
        if WIDTH in marks_of(node)
    }


def rounded(program: Program, **options: Any) -> Program:
    pass_ = QuantizeWeights(**{"method": "rtn", "group_size": 8, "head_bits": None, **options})
    return pass_(program).program


def stored(program: Program) -> dict[str, Stored]:
    calls = [QuantizedLinear.match(node) for node in program.graph.nodes]
    return {path_of(call.node): Stored.of(program, call) for call in calls if call}


def size(program: Program) -> int:
    """Return the bytes of the quantised linears."""
    return sum(one.load().nbytes for one in stored(program).values())


def kl(program: Program, captured: Program) -> float:
    """Return the KL on the calibration text."""
    windows = context().calibration_tokens(captured)
    found = Reference(captured, PassContext(check_text=windows)).measure(program).kl
    assert found is not None
    return found


@pytest.mark.parametrize("unit", ["linear", "block"])
@pytest.mark.parametrize("target", [2, 3.5, 5])
def test_a_mean_width_is_met_and_the_cost_is_that_of_the_rounded_model(
    unit: Any, target: float
) -> None:
    result = searched(target_bits=target, unit=unit)
    weights = stored(rounded(result.program))
    marked = widths(result.program)
    assert {path: one.qtype.bits for path, one in weights.items()} == marked
    numbers = {path: one.codes.shape[0] * one.in_features for path, one in weights.items()}
    bits = sum(numbers[path] * one.qtype.bits for path, one in weights.items())
    assert bits / sum(numbers.values()) == pytest.approx(result.details["bits"])
    assert result.details["bits"] <= target
    cost = kl(rounded(result.program), canonical("llama"))
    assert result.details["cost"] == pytest.approx(cost, rel=1e-6)
    if unit == "block":
        assert len({(path.split(".")[2], width) for path, width in marked.items()}) == 2


def test_it_is_no_worse_than_the_uniform_width_or_the_order_by_lim() -> None:
    program = canonical("llama")
    found = searched(target_bits=3, tables=8)
    by_lim = AssignBits(score="lim", low=2, high=4, target_bits=3)(program, context())
    costs = [kl(rounded(one, **o), program) for one, o in
             ((found.program, {}), (program, {"bits": 3}), (by_lim.program, {}))]  # fmt: skip
    assert costs[0] <= min(costs[1:])
    assert costs[0] < max(costs[1:])


@pytest.mark.parametrize("share", [0.3, 3.0])
def test_a_kl_is_met_with_fewer_bytes_than_uniform_widths(share: float) -> None:
    program = canonical("llama")
    target = share * kl(rounded(program, bits=3), program)
    result = searched(target_kl=target)
    assert kl(rounded(result.program), program) <= target
    fewest = min(
        size(rounded(program, bits=bits))
        for bits in (2, 3, 4, 8)
        if kl(rounded(program, bits=bits), program) <= target
    )
    assert size(rounded(result.program)) < fewest


def test_bytes_count_codes_scales_and_zero_points() -> None:
    whole = {bits: size(rounded(canonical("llama"), bits=bits)) for bits in (2, 3)}
    result = searched(target_bytes=whole[3] - 1)
    assert whole[2] < size(rounded(result.program)) < whole[3]
    three = 3 in widths(result.program).values()
    assert any("ONNX stores 4" in str(remark) for remark in result.remarks) is three
    assert set(widths(searched(target_bytes=whole[2]).program).values()) == {2}


@pytest.mark.parametrize("options", [{}, {"group_size": -1, "symmetric": True}])
def test_the_recipe_makes_the_same_codes(options: dict[str, Any]) -> None:
    result = searched(target_bits=3.5, **options)
    (recipe,) = [remark.message for remark in result.remarks if remark.where == "recipe"]
    assert recipe == result.details["recipe"]
    by_text = stored(Pipeline.parse(recipe, check=False)(canonical("llama")).program)
    by_mark = stored(rounded(result.program, head_bits="bits", **options))
    assert by_text.keys() == by_mark.keys()
    assert len({one.qtype.bits for one in by_mark.values()}) > 1
    assert {one.qtype.symmetric for one in by_text.values()} == {bool(options)}
    for path, one in by_mark.items():
        assert one.codes.load().equal(by_text[path].codes.load())


def test_what_was_measured_is_in_the_manifest() -> None:
    result = searched(target_bits=3)
    tables: list[Mapping[str, Any]] = result.details["tables"]
    assert min(table["cost"] for table in tables) == result.details["cost"]
    assert {2.0, 3.0} <= {table["bits"] for table in tables}
    assert len(tables) <= 1 + 2 + 2  # of the chain, uniform, near by
    again = searched(target_bits=3)
    assert again.details == result.details


def test_the_checks_text_is_not_read() -> None:
    other = TokenWindows.of(text()[:2], "other")
    found = SearchBits(target_bits=3, **FEW)(canonical("llama"), context(check_text=other))
    assert found.details == searched(target_bits=3).details


def test_second_order_costs_are_those_of_small_errors() -> None:
    program = canonical("llama")
    units = single_linears(program, find_units(program)[0])
    small = RoundedUnits(program, units, 8, symmetric=False)
    expected = second_order(small, (8,), context(), text())[:, 0]
    cost = Cost(small, context(), text())
    measured = torch.tensor([cost({unit: 8}) for unit in range(len(units))], dtype=torch.float64)
    ratios = (expected / measured).log()
    assert float(ratios.abs().max()) < 0.7  # a few hundred tokens, one draw of each
    assert abs(float(ratios.mean())) < 0.2
    assert cost({0: 8}) == float(measured[0])


def test_a_rounded_weight_is_made_once_and_kept_where_computed_weights_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, kept = canonical("llama"), []
    units, _ = find_units(program)

    def keep(fingerprint: str, value: Tensor) -> TensorWeight:
        kept.append(value)
        return TensorWeight(value, fingerprint)

    monkeypatch.setattr(SCRATCH, "keep", keep)
    small, name = RoundedUnits(program, units, 8, symmetric=False), units[0].weights[0].name
    for _ in range(2):
        dense = small.weight(name, 3).load()
        assert small.tensor(name, 3).dequantize(dense.dtype).equal(dense)
    assert [value.nbytes for value in kept] == [small.tensor(name, 3).nbytes]


def test_gradients_reach_the_encoder_of_an_encoder_decoder() -> None:
    program = canonical("t5")
    units, _ = find_units(program)
    found = second_order(
        RoundedUnits(program, units, 8, symmetric=False), (2, 8), context(), text()
    )
    assert bool((found > 0).all())
    assert bool((found[:, 0] > 100 * found[:, 1]).all())


def test_the_chain_has_the_order_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[bit_search.Order] = []
    real = bit_search.chain

    def chain(forecast: bit_search.Forecast, order: bit_search.Order) -> list[bit_search.Table]:
        orders.append(order)
        return real(forecast, order)

    monkeypatch.setattr(bit_search, "chain", chain)
    searched(target_bits=3, unit="block")
    searched(target_bits=3, unit="block", order="static")
    assert orders == ["greedy", "static"]


def test_neighbours_are_measured_together_first() -> None:
    assert first_pairs([1.0, 2.0, 3.0, 0.5], 4) == [(1, 2), (0, 1), (2, 3), (0, 2)]
    assert first_pairs([1.0, 2.0], 0) == []


@pytest.mark.parametrize("model", ["bert", "albert"])
def test_models_without_logits_are_searched_by_their_cosine(model: str) -> None:
    result = searched(model, target_bits=3)
    assert any("by 1 - cosine" in str(remark) for remark in result.remarks)
    assert all(0 <= table["cost"] <= 2 for table in result.details["tables"])


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("llama", {"target_kl": 1e-9}, "out of reach: 8 bits in all blocks have KL"),
        ("llama", {"target_bytes": 10}, "in 2 bits the linears of the blocks take"),
        ("llama", {"target_bits": 3, "group_size": 32}, "48 wide, which group-size=32 does not"),
        ("bert", {"target_kl": 0.1}, "no logits"),
        ("vit", {"target_bits": 3}, "reads no tokens"),
        ("token-norm", {"target_bits": 3}, "no repeated blocks"),
    ],
)
def test_what_cannot_be_met_is_refused(model: str, options: Any, message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        searched(model, **options)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("pass_", "ending", "message"),
    [
        (SearchBits(target_kl=0.1, group_size=8), "mlp.up_proj.weight", "nan or inf"),
        (SearchBits(target_kl=0.1, group_size=8), "input_layernorm.weight", "outputs are not"),
        (SearchBits(target_bits=3, group_size=8), "input_layernorm.weight", "outputs are not"),
        (AssignBits(score="lim"), "input_layernorm.weight", "residual stream is not finite"),
        (AssignBits(score="lim", agg="token-mean"), "input_layernorm.weight", "is not finite"),
        (AssignBits(score="zd"), "mlp.up_proj.weight", "weights are not finite"),
    ],
)  # fmt: skip
def test_numbers_that_are_not_finite_are_refused(pass_: Pass, ending: str, message: str) -> None:
    found = canonical("llama").editable()
    name = next(name for name in found.weights if name.endswith(ending))
    found.weights.put(name, TensorWeight(torch.full_like(found.weights[name].load(), torch.nan)))
    with pytest.raises(PassError, match=message) as caught:
        pass_.run(found, context())
    assert caught.value.remedy


def test_a_quantised_program_is_refused() -> None:
    with pytest.raises(PassError, match="14 weights are quantised already"):
        SearchBits(target_bits=3)(rounded(canonical("llama"), bits=4), context())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of"),
        ({"target_bits": 3, "target_kl": 0.1}, "give one of"),
        ({"target_bits": 1.5}, "from 2 to 8, got 1.5"),
        ({"target_bits": 3, "widths": (4, 8)}, "from 4 to 8, got 3"),
        ({"target_bits": 4, "widths": (4,)}, "two or more"),
        ({"target_bits": 4, "widths": (4, 4)}, "two or more"),
        ({"target_bits": 4, "widths": (4, 5)}, "bits is 2, 3, 4 or 8"),
        ({"target_kl": 0.0}, "above 0"),
        ({"target_bits": 4, "group_size": 0}, "group_size is positive"),
        ({"target_bits": 4, "tokens": 0}, "at least 1"),
        ({"target_bits": 4, "tables": -1}, "at least 0"),
    ],
)
def test_wrong_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchBits(**options)
