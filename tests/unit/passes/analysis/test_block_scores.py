"""LIM is minus the cosine of a block's two ends; ZD the share of weights that stick out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from modelathe.ir import PassError, Program, TensorWeight, find_blocks
from modelathe.passes import PruneBlocks, TokenWindows
from modelathe.passes.analysis.block_influence import block_influence, compare_ends
from modelathe.passes.analysis.lim import lim
from modelathe.passes.analysis.zd import linear_weights, share_above, zd
from modelathe.passes.quantization.readers import find_shared
from support.models import canonical, context


def with_weights(program: Program, change: Any, ending: str) -> Program:
    """Return a program where the weights whose name ends so are changed."""
    found = replace(program, weights=program.weights.copy())
    for name in list(found.weights):
        if name.endswith(ending):
            value = found.weights[name].load()
            found.weights.put(name, TensorWeight(change(value)))
    return found


def ends(program: Program) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what every block reads and writes, all windows at once."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    compare_ends(program, context(), "main", lambda _, a, b: found.append((a, b)))
    return found


@pytest.mark.parametrize("skip", [False, True])
def test_flattened_lim_is_one_cosine_for_all_tokens(skip: bool) -> None:
    program = canonical("llama")
    first = int(skip)
    expected = [
        -float(torch.cosine_similarity(*(x[:, first:].double().flatten() for x in pair), dim=0))
        for pair in ends(program)
    ]
    found = lim(program, context(), skip_first=skip)
    assert found.scores == pytest.approx(expected, abs=1e-12)
    assert found.tokens == context().calibration_tokens(program).tokens.numel()


def test_lim_of_token_means_is_block_influence_less_one() -> None:
    program = canonical("llama")
    influence = block_influence(program, context()).scores
    found = lim(program, context(), agg="token-mean").scores
    assert found == pytest.approx([score - 1 for score in influence], abs=1e-12)


def test_a_block_that_changes_nothing_has_the_lowest_lim() -> None:
    program = canonical("llama")
    for ending in ("layers.1.self_attn.o_proj.weight", "layers.1.mlp.down_proj.weight"):
        program = with_weights(program, torch.zeros_like, ending)
    scores = lim(program, context()).scores
    assert scores[1] == -1.0
    assert scores[0] > -1.0
    assert lim(program, context(), agg="token-mean").scores[1] == pytest.approx(-1.0, abs=1e-15)


def test_windows_read_a_few_at_a_time_change_no_lim(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelathe.passes import outputs

    whole = lim(canonical("llama"), context()).scores
    monkeypatch.setattr(outputs, "BATCH_TOKENS", 1)
    assert lim(canonical("llama"), context()).scores == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_both_graphs_of_an_encoder_decoder_have_scores(graph: str) -> None:
    assert all(-1 <= score <= 1 for score in lim(canonical("t5"), context(), graph).scores)
    assert all(0 < score < 1 for score in zd(canonical("t5"), graph).scores)


@pytest.mark.parametrize("sided", ["one", "two"])
def test_zd_is_the_share_of_numbers_beyond_one_deviation(sided: Any) -> None:
    program = canonical("llama")
    names = linear_weights(find_blocks(program.graph)[0].nodes)
    assert len(names) == 7
    numbers = torch.cat([program.weight(name).load().double().flatten() for name in names])
    z = (numbers - numbers.mean()) / numbers.std(correction=0)
    expected = float(((z.abs() if sided == "two" else z) > 1).double().mean())
    assert zd(program, sided=sided).scores[0] == pytest.approx(expected, abs=1e-12)
    apart = [share_above([program.weight(name)], sided) for name in names]
    mean = sum(apart) / len(apart)
    assert zd(program, sided=sided, pooled=False).scores[0] == pytest.approx(mean)


def test_a_decoder_block_s_zd_counts_the_cross_attention_linears_of_the_encoder_graph() -> None:
    program = canonical("t5")
    inside = f"{find_blocks(program.graphs['decoder'])[0].path}."
    names = [one.name for one in find_shared(program) if one.paths[0].startswith(inside)]
    assert len(names) == 10  # two attentions of four linears, and an MLP of two
    expected = share_above([program.weight(name) for name in names], "one")
    assert zd(program, "decoder").scores[0] == pytest.approx(expected, abs=1e-12)


def test_equal_numbers_do_not_stick_out() -> None:
    assert share_above([TensorWeight(torch.full((3, 5), 0.1))], "two") == 0.0


def test_scores_know_the_program_they_belong_to() -> None:
    program = canonical("llama")
    scores = zd(program)
    scores.check(program)
    with pytest.raises(PassError, match="measured on another program"):
        scores.check(PruneBlocks(blocks=(0,))(program).program)


def test_a_graph_without_blocks_has_no_scores() -> None:
    assert zd(canonical("norm-mlp")).scores == ()
    text = TokenWindows.of(torch.zeros(1, 4, dtype=torch.int64), "zeros")
    assert lim(canonical("token-norm"), context(calibration=text)).scores == ()
