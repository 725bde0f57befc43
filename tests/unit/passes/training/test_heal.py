"""Healing: it learns what it should, changes what it may, and refuses the rest."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import DataError, PassError, Program, TensorWeight, fingerprint
from modelathe.passes import (
    Heal,
    PassContext,
    PassResult,
    Pipeline,
    PruneBlocks,
    QuantizeWeights,
    TieBlocks,
)
from modelathe.passes.training import trainer
from support.models import canonical
from support.training import SHORT, context, pruned, text


def heal(before: Program, **options: Any) -> PassResult:
    return Heal(**{**SHORT, **options})(before, context())


def losses(result: PassResult) -> tuple[float, float]:
    """Return the held-out loss at the beginning, and the best one."""
    curve = result.details["curve"]
    return curve[0]["text"], min(point["text"] for point in curve)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "llama-bf16"])
def test_a_pruned_model_gets_closer_to_what_it_was(name: str) -> None:
    before, after = losses(heal(pruned(name)))
    assert after < 0.9 * before


def test_both_graphs_of_an_encoder_decoder_are_trained() -> None:
    rounded = QuantizeWeights(bits=2, group_size=8, method="rtn")
    damaged = rounded(canonical("t5"), context()).program
    result = heal(damaged, weights="full")
    before, after = losses(result)
    assert after < before
    healed = {name for name in result.program.weights if name.endswith(".healed")}
    assert any("encoder" in name for name in healed)
    assert any("decoder" in name for name in healed)


def test_weights_keep_their_dtype_and_the_input_is_left_alone() -> None:
    before = pruned("llama-bf16")
    seen = fingerprint(before)
    after = heal(before).program
    assert fingerprint(before) == seen
    healed = [after.weights[name] for name in after.weights if name.endswith(".healed")]
    assert healed
    assert {weight.dtype for weight in healed} == {torch.bfloat16}


def test_tied_stays_tied_and_is_trained_once() -> None:
    looped = TieBlocks(unique=1)(canonical("gpt2"), context()).program
    after = heal(looped).program
    assert len(list(after.weights)) == len(list(looped.weights))


@pytest.mark.parametrize(
    ("weights", "part"),
    [("norms", "norm"), ("lora", "proj"), ("full", "embed")],
)
def test_only_the_weights_that_were_asked_for_change(weights: Any, part: str) -> None:
    before = pruned("llama")
    rank = {"rank": 2} if weights == "lora" else {}
    after = heal(before, weights=weights, **rank).program
    new = set(after.weights) - set(before.weights)
    assert any(part in name for name in new)
    assert all(name.endswith(".healed") for name in new)
    if weights == "norms":
        assert all("norm" in name for name in new)


def test_a_low_rank_update_is_merged_and_has_that_rank() -> None:
    before = pruned("llama")
    after = heal(before, weights="lora", rank=2).program
    name = "model.layers.0.mlp.up_proj.weight"
    change = after.weights[f"{name}.healed"].load().double() - before.weights[name].load().double()
    sizes = torch.linalg.svdvals(change)
    assert sizes[1] > 1e-5
    assert sizes[2] < 1e-5


def test_scales_of_a_quantised_model_are_trained_and_its_codes_stay() -> None:
    before = QuantizeWeights(bits=2, group_size=8)(canonical("llama"), context()).program
    result = heal(before, weights="scales", lr=3e-4)
    codes = [name for name in before.weights if name.endswith("codes")]
    assert codes
    assert all(name in result.program.weights for name in codes)
    first, best = losses(result)
    assert best < first


def test_the_best_weights_are_kept_when_training_only_hurts() -> None:
    damaged = pruned("llama")
    result = heal(damaged, lr=30.0, warmup=0.0, patience=2)
    first, best = losses(result)
    assert best == first
    assert result.details["steps"] < SHORT["steps"]
    name = "model.norm.weight"
    healed = result.program.weights[f"{name}.healed"].load()
    assert torch.equal(healed, damaged.weights[name].load())


def test_generated_text_is_a_share_of_every_batch_and_in_the_record() -> None:
    pipeline = Pipeline(
        [PruneBlocks(blocks=(1,)), Heal(**{**SHORT, "steps": 2, "mix": 0.5})], context=context()
    )
    result = pipeline(canonical("llama"))
    point = result.steps[-1].details["curve"][0]
    assert {"text", "generated"} <= set(point)
    assert "generated" in result.data
    again = pipeline(canonical("llama"))
    assert again.data["generated"]["sha256"] == result.data["generated"]["sha256"]
    assert fingerprint(again.program) == fingerprint(result.program)


def test_a_decoder_without_text_heals_on_its_own() -> None:
    found = Heal(**SHORT)(pruned("llama"), PassContext(check_text=text(4)))
    assert set(found.details["curve"][0]) == {"step", "tokens", "generated"}


def test_a_text_too_short_for_the_windows_is_an_error() -> None:
    from modelathe.ir import DataError

    few = dataclasses.replace(context(), calibration=text(1, 8))
    with pytest.raises(DataError, match="too little text"):
        Heal(**SHORT)(pruned("llama"), few)


@pytest.mark.parametrize("name", ["vit", "norm-mlp"])
def test_what_reads_no_text_is_refused(name: str) -> None:
    with pytest.raises(PassError, match="reads no text"):
        heal(canonical(name))


def test_there_must_be_something_to_train() -> None:
    with pytest.raises(PassError, match="no quantised weight to train"):
        heal(pruned("llama"), weights="scales")


@pytest.mark.parametrize(
    ("option", "value"),
    [("tokens", 0), ("steps", 0), ("lr", 0.0), ("mix", 1.5), ("layer_decay", 0.0), ("length", 1)],
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        Heal(**{option: value})


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"rank": 2, "weights": "norms"}, {"steps": 3, "tokens": 5}]
)
def test_options_that_cannot_act_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Heal(**options)


def test_only_decoders_write_text_to_mix_in() -> None:
    with pytest.raises(PassError, match=r"mix=0.5, and .* \(encoder\) writes no text") as caught:
        heal(canonical("bert"), mix=0.5)
    assert caught.value.remedy == "leave mix out"


def test_the_term_for_removed_norms_needs_removed_norms() -> None:
    with pytest.raises(PassError, match=r"auxiliary=0.3 is for norms that were removed") as caught:
        heal(pruned("llama"), auxiliary=0.3)
    assert "remove-norms" in (caught.value.remedy or "")


def test_half_of_a_decoder_s_batches_is_its_own_text() -> None:
    usual = {name: value for name, value in SHORT.items() if name != "mix"} | {"steps": 1}
    found = Heal(**usual)(pruned("llama"), context())
    half = Heal(**usual, mix=0.5)(pruned("llama"), context())
    assert found.details == half.details
    assert "generated" not in Heal(**usual)(canonical("bert"), context()).details["curve"][0]


def test_a_budget_is_judged_after_healing_only() -> None:
    from modelathe.ir import FidelityError
    from modelathe.passes import Budget

    passes = [PruneBlocks(blocks=(1,)), Heal(**SHORT)]
    done = Pipeline(passes, context=context())(canonical("llama"))
    damaged, healed = done.steps[-2].measured.kl, done.steps[-1].measured.kl
    assert damaged is not None
    assert healed is not None
    assert healed < damaged
    between = Budget(max_kl=(damaged + healed) / 2)
    Pipeline(passes, context=context(), budget=between)(canonical("llama"))
    with pytest.raises(FidelityError, match="KL"):
        Pipeline(passes[:1], context=context(), budget=between)(canonical("llama"))


def test_the_remark_says_what_was_kept() -> None:
    hurt = heal(pruned("llama"), lr=30.0, warmup=0.0, patience=2)
    first = hurt.details["curve"][0]["text"]
    assert f"held-out loss {first:.4g} -> {first:.4g}" in hurt.remarks[0].message


def test_layer_decay_rules_low_rank_updates_too() -> None:
    runs = [heal(pruned("gemma3"), weights="lora", layer_decay=decay) for decay in (1.0, 1e-6)]
    assert runs[0].details["curve"][-1] != runs[1].details["curve"][-1]


def test_a_batch_of_one_window_cannot_be_mixed() -> None:
    from modelathe.ir import DataError

    with pytest.raises(DataError, match="mix"):
        heal(pruned("llama"), mix=0.5, batch=8)


def test_a_small_share_of_generated_text_is_not_rounded_away() -> None:
    found = Heal(**{**SHORT, "mix": 0.05, "steps": 1})(pruned("llama"), context())
    assert "generated" in found.details["curve"][0]


def test_an_endless_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="lr"):
        Heal(lr=float("inf"))


def test_a_model_that_is_not_finite_before_training_is_not_blamed_on_the_rate() -> None:
    damaged = pruned("llama").editable()
    weight = damaged.weights["model.norm.weight"]
    damaged.weights.put("model.norm.weight", TensorWeight(torch.full(weight.shape, 3e38)))
    with pytest.raises(DataError, match="held-out loss is nan before anything was") as caught:
        heal(damaged)
    assert "schedule=progressive" in caught.value.remedy


def test_a_gradient_that_is_not_finite_moves_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    clip = nn.utils.clip_grad_norm_

    def overflowing(parameters: Any, limit: float) -> Tensor:
        length = clip(parameters, limit)
        steps.append(length)
        return length * torch.inf if len(steps) == 3 else length

    monkeypatch.setattr(trainer.nn.utils, "clip_grad_norm_", overflowing)
    with pytest.raises(DataError, match="gradient is inf after 2 steps") as caught:
        heal(pruned("llama"))
    assert "lr=" in caught.value.remedy
