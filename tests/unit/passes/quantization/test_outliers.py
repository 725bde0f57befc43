"""Entries that are kept beside the codes: which, what they cost, and what the algebra promises."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelathe.backends.sizes import program_sizes
from modelathe.ir import (
    PassError,
    Program,
    TensorWeight,
    fingerprint,
    load_program,
    save_program,
)
from modelathe.ir.quant import QuantType, choose_grid
from modelathe.ir.sparse import OutlierSum, outlier_sums
from modelathe.passes import ConvertDtype, PassContext, QuantizeWeights, TieBlocks
from modelathe.passes.data import TokenWindows
from modelathe.passes.quantization.methods import PUBLISHED, Method, Recipe, solve
from modelathe.passes.quantization.outliers import (
    KINDS,
    Kind,
    Outliers,
    Solved,
    choose_outliers,
)
from modelathe.passes.quantization.sequential import Moments
from modelathe.passes.quantization.store import Stored
from support.models import canonical
from support.numeric import relative_error

OUT, IN = 12, 40
both = pytest.mark.parametrize("kind", KINDS)


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Moments]:
    """Return a weight with a heavy column and heavy entries, and moments that are not diagonal."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator)
    weight[:, 7] *= 6
    weight[3, 11], weight[5, 2] = 12.0, -15.0
    inputs = torch.randn(IN, 3 * IN, generator=generator)
    mixed = inputs + torch.randn(IN, IN, generator=generator) @ inputs / 4
    return weight.to(dtype), Moments(mixed @ mixed.T / inputs.shape[1], inputs.shape[1])


def recipe(kind: Kind, share: float = 0.05, method: Method = "quantease", **more: Any) -> Recipe:
    return replace(PUBLISHED[method], outliers=share, outlier_kind=kind, **more)


def solved(how: Recipe, group: int = -1, dtype: torch.dtype = torch.float32) -> Solved:
    weight, moments = problem(dtype)
    return solve("w", weight, moments, QuantType(3, group, symmetric=False), how)


def lost(found: Solved) -> float:
    weight, moments = problem()
    difference = (weight - found.dequantize(torch.float32)).double()
    return float((difference @ moments.matrix.double() * difference).sum())


def test_structured_outliers_are_the_columns_without_which_rounding_costs_least() -> None:
    weight, moments = problem()
    qtype = QuantType(3, -1, symmetric=False)
    power = moments.matrix.diagonal().clone()

    def kept(power: Tensor) -> list[int]:
        chosen = choose_outliers(weight, power, 0.05, "structured", qtype)
        return chosen.all(0).nonzero().flatten().tolist()

    largest = weight.square().sum(0).topk(2).indices.sort().values.tolist()
    assert kept(power) == largest  # one of them is heavy: without it all steps are smaller
    power[20] = 1e4 * power.max()
    assert 20 in kept(power)  # what multiplies this one is large


def test_columns_are_stored_with_their_numbers() -> None:
    found = solved(recipe("structured")).outliers
    assert found is not None
    assert found.columns.dtype == torch.int32
    assert found.values.shape == (OUT, 2)
    assert found.nbytes == 4 * (2 * OUT + 2)


def test_unstructured_outliers_are_the_largest_entries() -> None:
    found = solved(recipe("unstructured")).outliers
    weight, _ = problem()
    assert found is not None
    largest = weight.abs().flatten().topk(round(0.05 * OUT * IN)).indices
    kept = torch.zeros(OUT, IN)
    replace(found, values=torch.ones_like(found.values)).add_to(kept, slice(0, OUT))
    assert kept.flatten().nonzero().flatten().tolist() == largest.sort().values.tolist()
    assert found.nbytes == (4 + 1) * 24 + OUT  # a value and its column, and the count of each row


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grid_does_not_cover_them(kind: Kind, dtype: torch.dtype) -> None:
    found = solved(recipe(kind, iterations=2), dtype=dtype)
    weight, _ = problem(dtype)
    assert found.outliers is not None
    kept = torch.zeros(OUT, IN)
    replace(found.outliers, values=torch.ones_like(found.outliers.values)).add_to(
        kept, slice(0, OUT)
    )
    rest = weight.masked_fill(kept.bool(), 0)
    assert found.codes.scales.equal(choose_grid(rest, QuantType(3, -1, symmetric=False)).scales)
    assert not (found.codes.dequantize() * kept).any()
    assert found.outliers.values.dtype == dtype


@both
def test_a_share_of_no_entry_is_the_plain_method(kind: Kind) -> None:
    plain, none = solved(PUBLISHED["quantease"]), solved(recipe(kind, share=1e-6))
    assert none.outliers is None
    assert none.codes.codes.equal(plain.codes.codes)


@both
def test_all_entries_leave_no_error(kind: Kind) -> None:
    found = solved(recipe(kind, share=0.9999, iterations=3))
    assert lost(found) <= 1e-6 * lost(Solved(found.codes))


@both
def test_sweeps_never_raise_the_error(kind: Kind) -> None:
    errors = [lost(solved(recipe(kind, iterations=n, relax=False))) for n in range(1, 9)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


@both
@pytest.mark.parametrize("method", ["gptq", "quantease", "gptq-quantease"])
@pytest.mark.parametrize("group", [-1, 8])
def test_outliers_lower_the_error(kind: Kind, method: Method, group: int) -> None:
    plain = lost(solved(PUBLISHED[method], group))
    assert lost(solved(recipe(kind, method=method), group)) < 0.9 * plain


@both
def test_what_is_kept_is_the_best_beside_the_codes(kind: Kind) -> None:
    found = solved(recipe(kind, iterations=60, relax=False))
    assert found.outliers is not None
    least = lost(found)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        move = 0.01 * torch.randn(found.outliers.values.shape, generator=generator)
        moved = replace(found.outliers, values=found.outliers.values + move)
        assert lost(replace(found, outliers=moved)) > least


@both
def test_every_setting_of_the_default_keeps_what_was_computed(kind: Kind) -> None:
    how = recipe(kind, method="gptq-quantease", act_order=True, clip="activation", refit=True)
    assert lost(solved(how, 8)) < lost(solved(recipe(kind, method="gptq-quantease"), 8))


def test_a_column_that_reads_zeros_is_not_kept() -> None:
    weight, moments = problem()
    moments.matrix[2], moments.matrix[:, 2] = 0, 0
    how = recipe("unstructured")
    found = solve("w", weight, moments, QuantType(3, -1, symmetric=False), how).outliers
    assert found is not None
    assert not (found.columns == 2).any()


# the pass

windows = TokenWindows.of(
    torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(3)), "test"
)


def context() -> PassContext:
    return PassContext(calibration=windows)


def quantizer(kind: Kind, **options: Any) -> QuantizeWeights:
    settings = {"bits": 3, "group_size": -1, "method": "quantease", "iterations": 2}
    chosen = {"outliers": 0.1, "outlier_kind": kind}
    return QuantizeWeights(**{**settings, **chosen, **options})


def sums(program: Program) -> list[OutlierSum]:
    return [one for graph in program.graphs.values() for one in outlier_sums(graph)]


def logits(program: Program) -> Tensor:
    from modelathe.passes.outputs import graph_inputs, runner

    return program.run(graph_inputs(program, "main", windows.tokens, runner(program)))["logits"]


@both
def test_the_program_computes_with_what_the_codes_and_the_outliers_stand_for(kind: Kind) -> None:
    before = canonical("gpt2")
    after = quantizer(kind, only=("h.0",))(before, context()).program
    assert len(sums(after)) == 4
    dense = replace(before, weights=before.weights.copy())
    for one in sums(after):
        outliers = Outliers.read(after, one)
        stored = Solved(Stored.of(after, one.product).load(), outliers)
        name = str(one.product.codes.target).removesuffix(".codes")
        dense.weights.put(name, TensorWeight(stored.dequantize()))
    assert relative_error(logits(dense), logits(after)) < 1e-5
    assert relative_error(logits(before), logits(after)) > 1e-3


@both
def test_sizes_count_values_and_places(kind: Kind) -> None:
    before = canonical("gpt2")
    plain = quantizer(kind, outliers=None, outlier_kind=None, only=("h.0",))(before, context())
    result = quantizer(kind, only=("h.0",))(before, context())
    beside = sum(Outliers.read(result.program, one).nbytes for one in sums(result.program))
    sizes, without = program_sizes(result.program), program_sizes(plain.program)
    assert sizes.bytes == without.bytes + beside
    assert (sizes.parameters, sizes.buffer_bytes) == (without.parameters, without.buffer_bytes)
    told = [str(remark) for remark in result.remarks if " with " in str(remark)]
    assert sum(int(text.split(" with ")[1].split()[0]) for text in told) == beside


@both
def test_a_second_run_and_a_saved_program_are_the_same(kind: Kind, tmp_path: Path) -> None:
    after = quantizer(kind, only=("h.0",))(canonical("gpt2"), context()).program
    again = quantizer(kind, only=("h.0",))(after, context())
    assert fingerprint(again.program) == fingerprint(after)
    save_program(after, tmp_path)
    assert fingerprint(load_program(tmp_path)) == fingerprint(after)


def test_a_weight_that_an_embedding_reads_has_none() -> None:
    result = quantizer("structured", only=("lm_head",))(canonical("gpt2"), context())
    assert not sums(result.program)
    assert any("an embedding reads its rows" in str(remark) for remark in result.remarks)


def test_too_small_a_share_is_said_to_be_none() -> None:
    result = quantizer("structured", outliers=0.001, only=("h.0",))(canonical("gpt2"), context())
    assert sum("without outliers: 0.1 %" in str(remark) for remark in result.remarks) == 4


@both
def test_a_shared_weight_has_one_set_of_outliers(kind: Kind) -> None:
    tied = TieBlocks(unique=1)(canonical("llama"), context()).program
    after = quantizer(kind, only=("q_proj",))(tied, context()).program
    first, second = sums(after)
    assert [part.target for part in first.parts] == [part.target for part in second.parts]


@both
def test_outliers_are_converted_with_the_rest(kind: Kind) -> None:
    after = quantizer(kind, only=("h.0",))(canonical("gpt2"), context()).program
    half = ConvertDtype(to="float16")(after, context()).program
    assert {half.weight(one.values).dtype for one in sums(half)} == {torch.float16}


@both
@pytest.mark.parametrize("wrong", ["values", "order", "places", "rows"])
def test_a_wrong_sparse_part_is_found(kind: Kind, wrong: str) -> None:
    before = canonical("gpt2")
    made = quantizer(kind, only=("h.0.mlp.c_fc",))
    after = made(before, context()).program.editable()
    (one,) = sums(after)
    weights = after.weights
    values, places, *rows = (str(part.target) for part in one.parts)
    if wrong == "values":
        weights.put(values, TensorWeight(100 * weights[values].load()))
    elif wrong == "order":
        weights.put(places, TensorWeight(weights[places].load().flip(0)))
    elif wrong == "places":  # one place further on
        weights.put(places, TensorWeight(weights[places].load() + 1))
    else:
        name = rows[0] if rows else places  # one entry too many, or columns that are not there
        weights.put(name, TensorWeight(weights[name].load() + 40))
    with pytest.raises(PassError, match=r"computed|not ascending|stand for zero"):
        made.ensures(before, after)


@pytest.mark.parametrize(
    "options",
    [
        {"outliers": 0.0},
        {"outliers": 1.0},
        {"outlier_kind": "structured"},
        {"outliers": 0.01, "method": "rtn"},
        {"outliers": 0.01, "outlier_kind": "columns"},
    ],
)
def test_options_that_do_nothing_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match=r"does nothing|more than 0|structured or"):
        QuantizeWeights(**options)
