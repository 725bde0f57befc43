from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from modelathe.ir import Attention, PassError, Program
from modelathe.ir.cache import dequantize_cache, quantize_cache
from modelathe.passes import Pipeline, QuantizeCache
from modelathe.passes.cache import search as search_module
from modelathe.passes.cache.attention_errors import attention_errors
from modelathe.passes.cache.entries import Entries
from modelathe.passes.cache.pareto import pareto_front
from modelathe.passes.cache.search import Found, Method, search
from modelathe.passes.cache.simulation import Simulation
from modelathe.passes.cache.widths import CANDIDATES, read_table
from modelathe.passes.fidelity import Reference
from modelathe.passes.outputs import graph_inputs, runner
from support.models import canonical, context
from support.views import views

BITS = [keys + values for keys, values in CANDIDATES]


def windows() -> Tensor:
    return context().calibration_tokens(canonical("llama")).tokens


def found(model: str = "llama", **options: Any) -> Found:
    return search(canonical(model), context(), "main", **options)


def rounded(x: Tensor, bits: int) -> Tensor:
    return dequantize_cache(*quantize_cache(x, bits), x, bits)


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma3"])
def test_errors_are_those_of_attention_with_rounded_keys_and_values(model: str) -> None:
    program = canonical(model)
    values: dict[fx.Node, Any] = {}
    inputs = graph_inputs(program, "main", windows(), runner(program))
    program.run(inputs, observe=values.__setitem__, dtype=torch.float32)
    errors = attention_errors(program, context(), "main", windows())
    calls = views(Attention, program)
    for row, call in enumerate(calls):
        q, k, v = (values[part] for part in (call.query, call.key, call.value))
        for column, (keys, numbers) in enumerate(CANDIDATES):
            out = call.node.target(
                q, rounded(k, keys), rounded(v, numbers), values[call.mask], **call.node.kwargs
            )
            expected = (out - values[call.node]).norm() / values[call.node].norm()
            assert float(errors.errors[row, column]) == pytest.approx(float(expected), rel=1e-4)


def test_candidates_are_the_front_of_bits_and_error() -> None:
    errors = attention_errors(canonical("llama"), context(), "main", windows())
    for own, row in zip(errors.candidates(), errors.errors.tolist(), strict=True):
        assert own == pareto_front([float(bits) for bits in BITS], row)
        assert {CANDIDATES[own[0]], CANDIDATES[own[-1]]} == {(2, 2), (8, 8)}


def test_a_simulated_cache_costs_what_a_quantised_one_does() -> None:
    program, text = canonical("llama"), context().calibration_tokens(canonical("llama"))
    table = read_table(("0:4/2", "1:2/8"))
    simulation = Simulation(program, context(), "main", text.tokens)
    made = QuantizeCache(blocks=("0:4/2", "1:2/8"))(program, context()).program
    expected = Reference(program, context(check_text=text)).measure(made).kl
    assert simulation.kl(table) == pytest.approx(expected, rel=1e-9)
    assert simulation.kl({}) == 0
    assert simulation.kl(table) == pytest.approx(expected, rel=1e-9)


def test_few_tables_are_all_measured() -> None:
    result = found()
    assert result.space <= search_module.FEW
    assert result.measured >= result.space
    assert result.groups == ((0,), (1,))
    for point in result.front:
        better = [o for o in (*result.front, *result.uniform) if o.bits <= point.bits]
        assert all(o.kl >= point.kl for o in better)


@pytest.mark.parametrize("method", ["sums", "nsga2"])
def test_a_search_is_deterministic_and_no_uniform_pair_beats_its_front(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "FEW", 0)
    result, again = (found(method=method, trials=12) for _ in range(2))
    assert result.known() == again.known()
    for point in result.front:
        assert not any(u.bits <= point.bits and u.kl < point.kl for u in result.uniform)
    assert result.measured < result.space + len(CANDIDATES)


def test_sums_find_nearly_what_measuring_all_tables_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    best = found("gpt2").within(4.0).kl
    monkeypatch.setattr(search_module, "FEW", 0)
    assert found("gpt2").within(4.0).kl <= 1.5 * best


def test_groups_share_their_widths() -> None:
    result = found(groups=1)
    assert len(result.groups) <= 2  # one for each set of candidates
    for group in result.groups:
        for point in result.front:
            assert len({point.table[block] for block in group}) == 1 or point in result.uniform


def test_the_pass_takes_the_best_table_within_the_target() -> None:
    pass_ = QuantizeCache(target_bits=4.5)
    made = pass_(canonical("llama"), context())
    front = made.details["search"]["front"]
    chosen = [point for point in front if point["bits"] <= 4.5][-1]
    assert made.details["blocks"] == chosen["blocks"]
    assert any(chosen["blocks"] in remark.message for remark in made.remarks)
    again = Pipeline.parse(made.details["recipe"], check=False)(canonical("llama")).program
    assert again.signature == made.program.signature
    json.dumps(made.details)


def test_without_optuna_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(search_module, "FEW", 0)
    with pytest.raises(PassError, match="optuna") as error:
        found(method="nsga2")
    assert "pip install optuna" in (error.value.remedy or "")
    assert found(method="sums").front  # needs none


def test_attention_without_a_linear_behind_it_cannot_be_searched() -> None:
    program: Program = canonical("llama").editable()
    nodes = [node for node in program.graph.nodes if Attention.match(node)]
    program.graph.output_node().args = ((nodes[0], *program.graph.output_node().args[0][1:]),)
    program.clean()
    with pytest.raises(PassError, match="output is not clear") as error:
        attention_errors(program, context(), "main", windows())
    assert "blocks=" in (error.value.remedy or "")


def test_calls_that_name_a_dtype_are_measured_in_float32_as_all_others_are() -> None:
    program = canonical("llama").editable()
    for node in [node for node in program.graph.nodes if Attention.match(node)]:
        with program.graph.inserting_after(node):
            cast = program.graph.call_function(
                torch.ops.aten._to_copy.default, (node,), {"dtype": torch.bfloat16}
            )
        cast.meta.update(node.meta)
        node.replace_all_uses_with(cast, lambda user, cast=cast: user is not cast)
    plain, named = (
        attention_errors(one, context(), "main", windows()).errors
        for one in (canonical("llama"), program)
    )
    assert torch.equal(plain, named)


def six_wide() -> Program:
    """Return a model whose keys fill whole bytes with 4 and 8 bits only."""
    program = canonical("llama").editable()
    for entry in Entries.of(program, "main").found:
        if entry.part == "key":  # only the shape is looked at
            entry.newest.meta["val"] = entry.newest.meta["val"][..., :6]
    return program


def test_pairs_of_which_codes_fill_no_whole_bytes_are_no_candidates() -> None:
    errors = attention_errors(six_wide(), context(), "main", windows())
    kept = {CANDIDATES[index][0] for own in errors.candidates() for index in own}
    assert kept == {4, 8}


def test_a_target_below_every_table_is_refused() -> None:
    result = search(six_wide(), context(), "main")
    smallest = min(point.bits for point in result.front)
    assert result.within(smallest).bits == smallest > 2.5
    with pytest.raises(PassError, match=f"target-bits=2.5 is out of reach.* has {smallest:.3g}"):
        result.within(2.5)


def without_keys(*blocks: int) -> Program:
    """Return a model of which something else reads the past keys of some blocks, too."""
    program = canonical("llama").editable()
    graph = program.graph
    for entry in Entries.of(program, "main").found:
        if entry.part == "key" and entry.number in blocks:
            with graph.inserting_after(entry.past):
                copy = graph.call_function(torch.ops.aten.clone.default, (entry.past,))
            copy.meta.update(entry.past.meta)
            with graph.inserting_after(entry.join):
                both = graph.call_function(torch.ops.aten.cat.default, ([copy, entry.newest], 2))
            both.meta.update(entry.join.meta)
            entry.join.replace_all_uses_with(both, lambda user: user.op != "output")
    return program


def test_a_block_with_one_half_that_can_be_rounded_is_left_alone_by_the_search() -> None:
    made = QuantizeCache(target_bits=4)(without_keys(1), context())
    left = [r for r in made.remarks if r.where == "past_key_values.1.value"]
    assert [remark.kind for remark in left] == ["missed"]
    assert made.details["blocks"].endswith(",1:none/none")
    assert "past_key_values.1.value_scale" not in made.program.signature.inputs
    assert any(made.details["blocks"] in remark.message for remark in made.remarks)


def test_a_target_for_no_block_with_both_halves_is_refused() -> None:
    with pytest.raises(PassError, match="target-bits=4 is out of reach"):
        QuantizeCache(target_bits=4)(without_keys(0, 1), context())
