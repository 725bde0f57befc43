from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from modelathe.ir import Linear, Program, capture
from modelathe.passes import (
    Canonicalize,
    PassError,
    QuantizeCache,
    QuantizeWeights,
    SmoothKeys,
    TieBlocks,
)
from modelathe.passes.cache.channels import Channels, number_last
from modelathe.passes.cache.entries import Entries
from modelathe.passes.cache.simulation import Simulation
from modelathe.passes.cache.smoothing import Rows
from modelathe.passes.fidelity import judge_rounding
from modelathe.passes.probes import empty_cache, feeds, next_cache
from support.feeds import feed
from support.models import LENGTH, VOCABULARY, Case, Transformer, canonical, context
from support.numeric import EXACT, relative_error
from support.views import views

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "max_position_embeddings": LENGTH, "intermediate_size": 48}
_MORE: dict[str, dict[str, Any]] = {
    # neighbours are pairs, half of the channels are turned, attention spelled out
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": LENGTH},
    # one linear for queries, keys and values, head by head; a quarter of the channels is turned
    "gpt_neox": {**_SIZES, **_HEADS},
    # biases on queries and keys
    "qwen2": {**_SIZES, **_HEADS, "num_key_value_heads": 2},
    # one linear, grouped heads
    "phi3": {**_SIZES, **_HEADS, "num_key_value_heads": 2, "pad_token_id": 0},
}
every_model = pytest.mark.parametrize("model", ["llama", "gpt2", "llama-bf16", "t5", *_MORE])


@functools.cache
def given(model: str) -> Program:
    if model not in _MORE:
        return canonical(model)
    options = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, **_MORE[model]}
    return Canonicalize()(
        capture(Case(Transformer("AutoModelForCausalLM", model, options)).module())
    ).program


def smoothed(model: str, channels: int = 0) -> Program:
    return SmoothKeys(channels=channels)(given(model), context()).program


def key_sizes(program: Program) -> list[tuple[Tensor, Tensor]]:
    """Return the largest key of each channel on the calibration text, and which share a scale.

    Both are [heads, width], for each entry.
    """
    graph = "decoder" if "decoder" in program.graphs else "main"
    rows = Rows.of(program, graph, Entries.of(program, graph))
    found = []
    for entry, largest in rows.measure(program, context(), graph)[1].items():
        ids = rows.of_entry(entry)
        assert ids is not None
        found.append((largest, rows.scales.labels[ids]))
    return found


@every_model
@pytest.mark.parametrize("channels", [0, 2])
def test_outputs_are_kept_exactly(model: str, channels: int) -> None:
    before, after = given(model), smoothed(model, channels)
    found = judge_rounding(before, after, "smooth-keys", SmoothKeys().kept)
    assert found.error is not None
    assert found.error < EXACT


@every_model
def test_keys_that_share_a_scale_have_size_1_afterwards(model: str) -> None:
    assert all(bool((sizes - 1).abs().max() > 0.2) for sizes, _ in key_sizes(given(model)))
    for sizes, labels in key_sizes(smoothed(model)):
        assert sizes.max() <= 1 + 1e-2  # weights may be bfloat16
        # a pair of norm 1 has one number of at least 1 / sqrt(2)
        for label in labels.unique():
            assert sizes[labels == label].max() > 0.5**0.5 - 1e-2


@pytest.mark.parametrize(("model", "channels"), [("llama", 0), ("llama", 1), ("gpt2", 0)])
def test_a_cache_of_scaled_keys_goes_on_where_all_at_once_would(model: str, channels: int) -> None:
    program = smoothed(model, channels)
    text = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    whole = program.run(feeds(program, text, empty_cache(program, 2), 0), dtype=torch.float64)
    first = program.run(
        feeds(program, text[:, :6], empty_cache(program, 2), 0), dtype=torch.float64
    )
    rest = program.run(feeds(program, text[:, 6:], next_cache(first), 6), dtype=torch.float64)
    assert relative_error(whole["logits"][:, 6:], rest["logits"]) < EXACT


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        ("llama", {(c, c + 4) for c in range(4)}),
        ("gpt_neox", {(0, 1), *((c, c) for c in range(2, 8))}),
        ("gptj", {(0, 1), (2, 3), *((c, c) for c in range(4, 8))}),
        ("gpt2", {(c, c) for c in range(8)}),
    ],
)
def test_pairs_are_those_that_rotary_positions_turn(
    model: str, pairs: set[tuple[int, int]]
) -> None:
    program = given(model)
    entries = Entries.of(program, "main")
    rows = Rows.of(program, "main", entries)
    ids = rows.of_entry(entries.found[0])
    assert ids is not None
    labels = rows.scales.labels[ids[0]].tolist()
    found = {
        (labels.index(label), max(c for c, other in enumerate(labels) if other == label))
        for label in labels
    }
    assert found == pairs
    assert bool(rows.scales.free[ids].all())


def test_a_scale_of_one_channel_of_a_pair_would_be_wrong() -> None:
    """The pairs matter: the same edit with other factors is found out."""
    program = given("llama").editable()
    linear = next(
        view
        for node in program.graph.nodes
        if (view := Linear.match(node)) and "k_proj" in str(view.weight.target)
    )
    factors = torch.ones(16)
    factors[0], factors[4] = 2.0, 1.0
    weight = program.weight(linear.weight).load() * factors[:, None]
    name = program.add_weight("wrong", weight)
    linear.set_weights(program.weight_node(program.graph, name, before=linear.node), None)
    with pytest.raises(Exception, match="smooth"):
        judge_rounding(given("llama"), program, "smooth", SmoothKeys().kept)


def test_query_heads_share_the_scale_of_their_key_head() -> None:
    before, after = given("llama"), smoothed("llama")
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk"]
    old = [before.weights[name].load(torch.float64) for name in names]
    new = [after.weights[f"{name}.smoothed"].load(torch.float64) for name in names]
    queries, keys = (
        (b / a).mean(1).view(-1, 2, 4) for a, b in zip(old, new, strict=True)
    )  # [heads, halves, pairs]
    torch.testing.assert_close(keys[:, 0], keys[:, 1])
    torch.testing.assert_close(queries * keys.repeat_interleave(2, 0), torch.ones(4, 2, 4).double())


def test_run_time_scales_are_those_of_the_largest_channels_and_their_pairs() -> None:
    before, program = given("llama"), smoothed("llama", channels=1)
    sizes = program.weights["cache.0.key_sizes"].load()
    assert sizes.shape == (2, 1, 8)
    scaled = (sizes != 1).sum(-1)
    assert (scaled == 2).all()
    largest, _ = key_sizes(before)[0]
    assert torch.equal(sizes.squeeze(1).argmax(-1), largest.argmax(-1))
    queries = program.weights["cache.0.key_sizes.queries"].load()
    assert torch.equal(queries, sizes.repeat_interleave(2, 0))


def test_keys_behind_a_norm_are_left_to_the_run_time() -> None:
    result = SmoothKeys()(canonical("gemma3"), context())
    assert not result.modified
    assert all("lies between" in remark.message for remark in result.remarks)
    after = SmoothKeys(channels=1)(canonical("gemma3"), context()).program
    judge_rounding(canonical("gemma3"), after, "smooth-keys", SmoothKeys().kept)


def test_quantised_linears_and_caches_are_left_alone() -> None:
    coded = QuantizeWeights(bits=8, group_size=8, method="rtn")(given("llama"), context()).program
    remarks = SmoothKeys()(coded, context()).remarks
    assert all("quantised already" in remark.message for remark in remarks)
    cached = QuantizeCache()(given("llama"), context()).program
    remarks = SmoothKeys()(cached, context()).remarks
    assert {remark.message for remark in remarks} == {"it is stored as codes already"}


def test_a_weight_that_something_else_reads_is_left_alone() -> None:
    program = given("llama").editable()
    linears = views(Linear, program)
    other = next(view for view in linears if "o_proj" in str(view.weight.target))
    query = next(view for view in linears if "q_proj" in str(view.weight.target))
    other.set_weights(query.weight, None)
    (first, *_) = SmoothKeys().run(program, context()).remarks
    assert first.kind == "missed"


def test_keys_that_a_linear_reads_too_are_left_alone() -> None:
    program = canonical("cached-attention").editable()
    by_name = {str(view.weight.target): view for view in views(Linear, program)}
    keys, values = by_name["k.weight"], by_name["v.weight"]
    values.node.replace_input_with(values.input, keys.node)
    before = program.editable()
    (remark,) = SmoothKeys().run(program, context()).remarks
    assert str(remark) == (
        "missed: past_key_values.0.key: its keys or queries are read by %" + values.node.name
    )
    judge_rounding(before, program, "smooth-keys", SmoothKeys().kept)


def test_tied_blocks_share_their_scales_and_stay_tied() -> None:
    tied = TieBlocks(unique=1)(given("llama"), context()).program
    result = SmoothKeys()(tied, context())
    judge_rounding(tied, result.program, "smooth-keys", SmoothKeys().kept)
    names = [name for name in result.program.weights if name.endswith("smoothed")]
    assert len(names) == 2


def test_it_lowers_what_rounding_keys_costs() -> None:
    """Keys of a trained model differ in size; those of a random one are made to."""
    program = given("gpt2").editable()
    factors = torch.ones(96)
    factors[0:32:8], factors[32:64:8] = 1 / 16, 16
    fused = views(Linear, program)
    for linear in (view for view in fused if "c_attn" in str(view.weight.target)):
        assert linear.bias is not None
        values = [program.weight(part).load() for part in (linear.weight, linear.bias)]
        names = [
            program.add_weight("uneven", value)
            for value in (values[0] * factors[:, None], values[1] * factors)
        ]
        new = [program.weight_node(program.graph, name, before=linear.node) for name in names]
        linear.set_weights(new[0], new[1])
    program.clean()
    text, table = context().calibration_tokens(program).tokens, {0: (4, 8), 1: (4, 8)}
    programs = (program, SmoothKeys()(program, context()).program)
    costs = [Simulation(each, context(), "main", text).kl(table) for each in programs]
    assert costs[1] < 0.3 * costs[0]


def test_a_model_without_a_cache_is_an_error() -> None:
    with pytest.raises(PassError, match="keeps no keys"):
        SmoothKeys()(canonical("bert"), context())


def test_following_channels_fixes_what_meets_an_unknown_call() -> None:
    program = given("llama")
    entries = Entries.of(program, "main")
    linears = views(Linear, program)
    value = next(view for view in linears if "v_proj" in str(view.weight.target))
    found = Channels.follow(program.graph, {value.node: number_last(value.node, 0)}, entries)
    reader: fx.Node | None = found.why_fixed(torch.arange(16), torch.arange(16))
    assert reader is not None
    inputs = feed(program)
    assert "past_key_values.0.value" in inputs
    assert not found.scales(torch.arange(0)).free.any()
