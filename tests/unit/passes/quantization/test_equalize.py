from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import Linear, Norm, Program, capture
from modelathe.passes import (
    Canonicalize,
    Equalize,
    FoldNorms,
    PassError,
    PassResult,
    QuantizeWeights,
    TieBlocks,
)
from modelathe.passes.fidelity import judge_rounding
from modelathe.passes.quantization.scale_search import Observed, Reading, Search
from support.models import LENGTH, VOCABULARY, Case, Transformer, canonical, context
from support.numeric import EXACT
from support.views import views

F = nn.functional
SMOOTH = Equalize(kind="smooth", grid=4)
IDS = torch.zeros(2, 3, dtype=torch.int64)


class Mlp(nn.Module):
    """``x + down(act(up(norm(x))))`` and a head; a gated one multiplies by a linear."""

    def __init__(self, act: Callable[[Tensor], Tensor], *, gated: bool = False) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, 8), nn.RMSNorm(8)
        self.gate = nn.Linear(8, 16) if gated else None
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)
        self.act = act

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y = self.norm(x)
        hidden = self.act(self.up(y)) if self.gate is None else self.act(self.gate(y)) * self.up(y)
        result: Tensor = self.head(x + self.down(hidden))
        return result


def small(build: Callable[[], nn.Module]) -> Program:
    return Canonicalize()(capture(Case(build, (IDS,)).module(), (IDS,))).program


def check_exact(before: Program, after: Program) -> None:
    found = judge_rounding(before, after, "equalize", SMOOTH.kept)
    assert found.error is not None
    assert found.error < EXACT


def kinds(result: PassResult, kind: str) -> list[str]:
    return [f"{remark.where}: {remark.message}" for remark in result.remarks if remark.kind == kind]


@functools.cache
def gptj() -> Program:
    """Attention that is spelled out, and one norm for attention and MLP."""
    options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": LENGTH}
    special = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    case = Case(Transformer("AutoModelForCausalLM", "gptj", {**options, **special}))
    return Canonicalize()(capture(case.module())).program


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma3", "llama-bf16", "bert", "gptj"])
def test_outputs_are_kept_exactly(model: str) -> None:
    before = gptj() if model == "gptj" else canonical(model)
    result = SMOOTH(before, context())
    assert result.modified
    check_exact(before, result.program)


def test_attention_that_is_spelled_out_hands_values_on() -> None:
    applied = kinds(SMOOTH(gptj(), context()), "applied")
    assert any("32 scales" in text and "%linear_8 and %linear_9:" in text for text in applied)


def test_query_heads_share_the_scales_of_their_value_head() -> None:
    before, after = canonical("llama"), SMOOTH(canonical("llama"), context()).program
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qvo"]
    old = [before.weights[name].load(torch.float64) for name in names]
    new = [after.weights[f"{name}.equalized"].load(torch.float64) for name in names]
    query, value, output = (b / a for b, a in zip(new, old, strict=True))
    norm = query[0]  # what divides the norm in front of both; rows of queries are not scaled
    torch.testing.assert_close(query, norm.expand_as(query))
    rows = (value / norm)[:, 0].view(2, 8)
    columns = output[0].view(4, 8)
    torch.testing.assert_close(columns, 1 / rows.repeat_interleave(2, 0))
    assert float((rows - 1).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("act", "gated", "pairs"),
    [
        (F.relu, False, 2),
        (F.leaky_relu, False, 2),
        (F.gelu, False, 1),
        (lambda x: x * x, False, 1),
        (F.silu, True, 2),
        (F.relu, True, 2),
    ],
    ids=["relu", "leaky", "gelu", "square", "gated", "gated relu"],
)
def test_up_and_down_are_a_pair_where_what_is_between_passes_scales(
    act: Callable[[Tensor], Tensor], gated: bool, pairs: int
) -> None:
    program = small(lambda: Mlp(act, gated=gated))
    result = SMOOTH(program, context())
    assert len(kinds(result, "applied")) == pairs
    assert len(kinds(result, "missed")) == 3 - pairs  # the head reads the residual sum
    check_exact(program, result.program)


def test_a_norm_that_the_residual_sum_reads_is_left_alone() -> None:
    result = SMOOTH(canonical("bert"), context())
    missed = kinds(result, "missed")
    assert sum("also reach" in text and "aten.add" in text for text in missed) == 4
    assert sum("its input comes from %gelu" in text for text in missed) == 2
    assert len(kinds(result, "applied")) == 2  # values and output projection of each block


def test_a_head_that_an_embedding_shares_is_left_alone() -> None:
    (missed,) = kinds(SMOOTH(canonical("llama"), context()), "missed")
    assert "its weight is also that of %embedding" in missed


def test_depths_that_share_weights_share_scales() -> None:
    tied = TieBlocks(unique=1)(canonical("llama"), context()).program
    result = SMOOTH(tied, context())
    check_exact(tied, result.program)
    assert len(kinds(result, "applied")) == 4
    made = [name for name in result.program.weights if name.endswith("equalized")]
    assert len([name for name in made if "proj" in name]) == 7


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_nothing_is_scaled_after_quantising(model: str) -> None:
    coded = QuantizeWeights(bits=8, group_size=8, method="rtn")(canonical(model)).program
    result = SMOOTH(coded, context())
    assert not result.modified
    assert all("quantised already: equalise before quantising" in str(r) for r in result.remarks)


def test_a_quantised_reader_keeps_its_norm_and_a_quantised_maker_its_reader() -> None:
    only = ("*.0.self_attn.q_proj", "*.1.mlp.up_proj")
    pass_ = QuantizeWeights(bits=8, group_size=8, method="rtn", only=only)
    missed = "\n".join(kinds(SMOOTH(pass_(canonical("llama")).program, context()), "missed"))
    assert missed.count("is quantised already: equalise before quantising") == 2
    assert "which is quantised already" not in missed
    assert re.search(r"mul\w*: for %linear_13: its input comes from %mul", missed)


def test_a_norm_whose_gain_was_folded_gets_one() -> None:
    folded = FoldNorms()(canonical("llama"), context()).program
    result = SMOOTH(folded, context())
    check_exact(folded, result.program)
    norms = views(Norm, result.program)
    assert [norm.gain is not None for norm in norms] == [True] * 5
    assert result.program.weights["model.layers.0.input_layernorm.weight.equalized"].shape == (32,)


def test_folding_afterwards_would_undo_it_and_is_refused() -> None:
    scaled = SMOOTH(canonical("llama"), context()).program
    result = FoldNorms()(scaled, context())
    missed = kinds(result, "missed")
    assert sum("fold before equalising" in text for text in missed) == 4
    assert not result.modified


def test_no_call_is_added() -> None:
    before, after = canonical("gpt2"), SMOOTH(canonical("gpt2"), context()).program
    targets = [[n.target for n in p.graph.nodes if n.op != "get_attr"] for p in (before, after)]
    assert targets[0] == targets[1]


def test_globs_choose_the_readers() -> None:
    pass_ = replace(SMOOTH, only=("layers.1.mlp",), ignore=("down_proj",))
    (applied,) = kinds(pass_(canonical("llama"), context()), "applied")
    assert applied.startswith("rms_norm_default_3: 32 scales")
    with pytest.raises(PassError, match="matches none"):
        replace(SMOOTH, only=("nothing",))(canonical("llama"), context())


def test_cached_values_are_not_kept() -> None:
    values = {"logits": IDS, "present.0.key": IDS, "present.0.value": IDS}
    assert list(SMOOTH.kept({}, values)) == ["logits", "present.0.key"]
    assert SMOOTH.kept({"past_key_values.0.key": IDS}, values) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gptq"}, "awq or smooth"),
        ({"grid": 0}, "grid is at least 1"),
        ({"refine": -1}, "refine is at least 0"),
        ({"kind": "smooth", "refine": 5}, "does nothing with kind=smooth"),
        ({"bits": 5}, "bits is 2, 3, 4 or 8"),
        ({"only": "x"}, "tuple of globs"),
    ],
)
def test_options_that_cannot_act_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Equalize(**options)  # type: ignore[arg-type]


def test_rows_that_do_not_fall_into_groups_are_an_error() -> None:
    with pytest.raises(PassError, match="group-size=5 does not divide") as caught:
        Equalize(group_size=5)(canonical("token-norm"), context())
    assert "ignore=" in (caught.value.remedy or "")


def test_values_that_are_not_finite_are_an_error() -> None:
    broken = canonical("token-norm").editable()
    table = broken.weights["embed.weight"].load().clone()
    table[:] = torch.inf
    broken.weights.put("embed.weight", type(broken.weights["norm.bias"])(table))
    with pytest.raises(PassError, match="not finite on the calibration text"):
        SMOOTH(broken, context())


def uneven(width: int = 32, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Return a weight [out, in] and inputs [tokens, in] of which two channels are large."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    x[:, [3, 17]] *= 30
    return torch.randn(16, width, generator=generator), x


def searched(kind: str, refine: int = 0) -> tuple[float, float | None, Tensor]:
    weight, x = uneven()
    search = Equalize(
        kind=kind, refine=refine or None, group_size=-1, bits=8 if kind == "smooth" else 3
    ).search  # type: ignore[arg-type]
    seen = Observed.of(search.kind, iter([x[:100], x[100:]]), 2, "x")
    search = Search(search.kind, search.qtype, 10, refine)
    found = search.best([Reading(weight, torch.arange(32), seen)], 32)
    return found.share, found.strength, found.scales


def test_large_channels_get_large_weights() -> None:
    for kind, share in (("awq", 0.5), ("smooth", 0.2)):
        found, strength, scales = searched(kind)
        assert found < share
        assert strength
        assert sorted(scales.topk(2).indices.tolist()) == [3, 17]


def test_descent_goes_on_from_the_best_strength() -> None:
    plain, refined = searched("awq"), searched("awq", refine=40)
    assert refined[0] < 0.9 * plain[0]
    assert refined[1] == plain[1]


def test_scales_that_help_nothing_are_not_put_in() -> None:
    weight = torch.eye(4)
    seen = Observed.of("awq", iter([torch.eye(4)]), 1, "x")
    search = Equalize(kind="awq", group_size=-1, refine=0).search
    found = search.best([Reading(weight, torch.arange(4), seen)], 4)
    assert (found.strength, found.share) == (None, 1.0)


def test_a_channel_that_is_always_zero_gets_a_finite_scale() -> None:
    weight, x = uneven()
    x[:, 5] = 0
    for kind in ("awq", "smooth"):
        search = Equalize(kind=kind, group_size=-1, bits=4, grid=4).search  # type: ignore[arg-type]
        seen = Observed.of(search.kind, iter([x]), 1, "x")
        scales = search.best([Reading(weight, torch.arange(32), seen)], 32).scales
        assert bool((scales.isfinite() & (scales > 0)).all())


def test_it_lowers_what_eight_bits_cost_a_model_with_large_channels() -> None:
    """Channels of a large model differ in size; those of a random one are made to."""
    program = canonical("token-norm").editable()
    (norm,) = (norm for node in program.graph.nodes if (norm := Norm.match(node)))
    (head,) = (one for node in program.graph.nodes if (one := Linear.match(node)))
    uneven_gain = program.weights["norm.weight"].load().clone()
    uneven_gain[2] *= 50
    name = program.add_weight("norm.weight.uneven", uneven_gain)
    norm.set_affine(program.weight_node(program.graph, name, before=norm.node), norm.bias)
    program.clean()
    (remark,) = SMOOTH(program, context()).remarks
    share = re.search(r"(\d+) % of the error left", remark.message)
    assert share is not None
    assert int(share[1]) < 60
    assert head.node.name in remark.message
