"""Removing blocks is deleting them from the model: bits, caches and configuration."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from modelathe.ir import PassError, Program, capture, find_blocks, fingerprint, to_text
from modelathe.passes import Pipeline, PruneBlocks, QuantizeWeights
from modelathe.passes.depth.removal import Removal
from support.feeds import decoder_outputs, feed, plain_outputs
from support.models import canonical, context, module, program
from support.numeric import assert_same_bits

# What a model is with one block deleted by hand: where its blocks are, and what counts them.
STACKS = {
    "gemma3": ("model.layers", "num_hidden_layers"),
    "gpt2": ("transformer.h", "n_layer"),
    "llama": ("model.layers", "num_hidden_layers"),
    "bert": ("encoder.layer", "num_hidden_layers"),
    "vit": ("layers", "num_hidden_layers"),
}


def without_layer(name: str, index: int) -> Any:
    """Return the transformers model with one block deleted, and its entry in per-block lists."""
    path, count = STACKS[name]
    model: Any = copy.deepcopy(module(name))
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    del layers[index]
    for number, layer in enumerate(layers):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [
            kind for number, kind in enumerate(model.config.layer_types) if number != index
        ]
    setattr(model.config, count, len(layers))
    return model


def pruned(found: Program, *blocks: int, **options: Any) -> Program:
    return PruneBlocks(blocks=blocks, **options)(found).program


@pytest.mark.parametrize(
    ("name", "index"), [("gemma3", 0), ("gemma3", 1), ("gemma3", 2), ("gpt2", 0), ("llama", 1)]
)
def test_a_decoder_without_a_block_has_the_bits_of_the_model_without_it(
    name: str, index: int
) -> None:
    """Texts are longer than gemma3's sliding window, with and without a cache and padding."""
    model, found = without_layer(name, index), pruned(program(name), index)
    shapes = ({"sequence": 12}, {"sequence": 3, "past": 8}, {"sequence": 7, "past": 2, "pads": 3})
    for sizes in shapes:
        inputs = feed(found, **sizes)
        assert_same_bits(found.run(inputs), decoder_outputs(model, inputs))


@pytest.mark.parametrize(("name", "index"), [("bert", 0), ("bert", 1), ("vit", 0)])
def test_an_encoder_without_a_block_has_the_bits_of_the_model_without_it(
    name: str, index: int
) -> None:
    model, found = without_layer(name, index), pruned(program(name), index)
    inputs = feed(found)
    expected = plain_outputs(model, inputs, found.signature.outputs)
    assert_same_bits(found.run(inputs), expected)


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
@torch.no_grad()
def test_an_encoder_decoder_loses_a_block_of_the_graph_that_is_meant(graph: str) -> None:
    model: Any = copy.deepcopy(module("t5"))
    del model.get_submodule(f"{graph}.block")[1]
    found = pruned(canonical("t5"), 1, graph=graph)
    names = ["cross_key_values.0.key", "cross_key_values.0.value"]
    crossed = [n for n in found.signatures["encoder"].outputs if n.startswith("cross")]
    assert crossed[: len(names)] == names
    assert len(crossed) == (2 if graph == "decoder" else 4)
    source = feed(found, "encoder")
    made = found.run(source, "encoder")
    inputs = feed(found, "decoder", sequence=4)
    inputs |= {name: value for name, value in made.items() if name in inputs}
    found_logits = found.run(inputs, "decoder")["logits"]
    expected = model(**source, decoder_input_ids=inputs["decoder_input_ids"], use_cache=False)
    torch.testing.assert_close(found_logits, expected.logits)
    counts = {"encoder": "num_layers", "decoder": "num_decoder_layers"}
    assert {key: found.config[counts[key]] for key in counts} == {
        key: 1 if key == graph else 2 for key in counts
    }


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "llama-bf16"])
def test_what_is_left_is_numbered_densely(name: str) -> None:
    found = canonical(name)
    blocks = len(find_blocks(found.graph))
    left = pruned(found, 0)
    entries = [f"{n}.{part}" for n in range(blocks - 1) for part in ("key", "value")]
    assert [n for n in left.signature.inputs if "past" in n] == [
        f"past_key_values.{entry}" for entry in entries
    ]
    assert left.signature.outputs == ("logits", *(f"present.{entry}" for entry in entries))
    assert set(left.signature.dims) == set(left.signature.inputs)
    assert [block.index for block in find_blocks(left.graph)] == list(range(blocks - 1))
    assert not any(".0." in weight for weight in left.weights)


def test_the_configuration_loses_the_same_entries() -> None:
    left = pruned(canonical("gemma3"), 1)
    assert left.config["num_hidden_layers"] == 2
    assert left.config["layer_types"] == ["sliding_attention", "sliding_attention"]
    assert canonical("gemma3").config["num_hidden_layers"] == 3


def test_the_input_program_is_untouched_and_a_second_run_removes_more() -> None:
    found = canonical("gemma3")
    before = fingerprint(found), to_text(found)
    twice = pruned(pruned(found, 1), 1)
    assert (fingerprint(found), to_text(found)) == before
    assert [block.key for block in find_blocks(twice.graph)] == ["model.layers.0"]
    assert to_text(twice) == to_text(pruned(found, 1, 2))


def test_a_module_without_a_configuration_can_lose_a_block() -> None:
    left = pruned(canonical("tied-blocks"), 0)
    assert left.config == {}
    assert [block.key for block in find_blocks(left.graph)] == ["layers.1"]
    assert "head.weight" in {*left.weights, *left.weights.aliases}


def test_the_same_blocks_can_go_before_and_after_quantising() -> None:
    quantize = QuantizeWeights(bits=8, group_size=8, method="rtn")
    first, last = (
        Pipeline(passes, context(), check=False)(canonical("gpt2")).program
        for passes in ([PruneBlocks(blocks=(0,)), quantize], [quantize, PruneBlocks(blocks=(0,))])
    )
    inputs = feed(first, sequence=3, past=4)
    assert_same_bits(first.run(inputs), last.run(inputs))


def test_the_pipeline_measures_what_it_costs() -> None:
    step = Pipeline([PruneBlocks(count=1)], context())(program("gemma3")).steps[-1]
    assert step.measured.kl is not None
    assert step.measured.kl > 0
    assert "removed block" in str(step.remarks)


def test_count_removes_the_blocks_with_the_lowest_scores_and_says_them() -> None:
    from modelathe.passes.analysis.block_influence import block_influence

    found = canonical("gemma3")
    scores = block_influence(found, context()).scores
    result = PruneBlocks(count=2)(found, context())
    (left,) = find_blocks(result.program.graph)
    assert left.key == f"model.layers.{scores.index(max(scores))}"
    (said,) = [remark.message for remark in result.remarks if "influence" in remark.message]
    assert all(f"{index}: {score:.4g}" in said for index, score in enumerate(scores))


def test_count_passes_over_a_block_that_others_need() -> None:
    result = PruneBlocks(count=1, graph="encoder")(canonical("t5"), context())
    keys = [block.key for block in find_blocks(result.program.graphs["encoder"])]
    assert keys == ["encoder.block.0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either blocks= or count="),
        ({"blocks": (1,), "count": 1}, "either blocks= or count="),
        ({"count": 0}, "at least 1"),
        ({"blocks": (-1,)}, "numbered from 0"),
        ({"blocks": (1, 2, 1)}, "twice"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneBlocks(**options)


@pytest.mark.parametrize(
    ("name", "options", "message", "remedy"),
    [
        ("gemma3", {"blocks": (1, 3)}, "no block 3", "0 to 2"),
        ("gemma3", {"blocks": (0, 1, 2)}, "removes all 3 blocks", "at most 2"),
        ("gemma3", {"count": 3}, "removes all 3 blocks", "at most 2"),
        ("gemma3", {"blocks": (1,), "graph": "encoder"}, "no graph encoder", "leave it out"),
        ("norm-mlp", {"blocks": (0,)}, "no repeated blocks", ""),
        ("albert", {"blocks": (1,)}, "one of 2 calls of one module", "leave the pass out"),
        ("albert", {"count": 1}, "one of 2 calls of one module", ""),
        ("t5", {"blocks": (0,)}, "makes %unsqueeze.* for calls outside", "can be removed: 1"),
    ],
)
def test_what_cannot_be_removed_is_refused(
    name: str, options: dict[str, Any], message: str, remedy: str
) -> None:
    with pytest.raises(PassError, match=message) as caught:
        PruneBlocks(**options)(canonical(name), context())
    assert remedy in caught.value.remedy


def test_blocks_of_different_widths_are_refused() -> None:
    class Widen(nn.Module):
        def __init__(self, before: int, after: int) -> None:
            super().__init__()
            self.up = nn.Linear(before, after)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.up(x).relu()
            return result

    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([Widen(4, 8), Widen(8, 8), Widen(8, 12)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for stage in self.stages:
                x = stage(x)
            return x + 1

    found = capture(Stages().eval(), (torch.ones(2, 4),))
    for index in (0, 2):
        with pytest.raises(PassError, match=r"writes \[2, .*input and output cannot be joined"):
            pruned(found, index)
    assert pruned(found, 1).run(feed(found))["output"].shape == (2, 12)


def test_a_size_that_a_removed_block_works_out_for_others_stays() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(x.shape[0] * x.shape[1], 4)
            return x + self.up(flat).reshape(x.shape)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Flat(), Flat(), Flat()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x + 1

    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    found = capture(Stack().eval(), (torch.ones(2, 3, 4),), dynamic)
    assert "= mul(" in to_text(found).partition("aten.linear")[0]
    left = pruned(found, 0)
    assert [block.key for block in find_blocks(left.graph)] == ["layers.1", "layers.2"]
    assert left.run(feed(left))["output"].shape == feed(left)["x"].shape


def test_bypassing_blocks_next_to_each_other_follows_the_chain() -> None:
    found = canonical("gemma3")
    keys = [block.key for block in find_blocks(found.graph)[:2]]
    removal = Removal.of(found, "main", keys)
    inputs = feed(found, sequence=4)
    left = found.run(inputs, bypass=removal.bypass())
    model = without_layer("gemma3", 0)
    del model.model.layers[0]
    model.config.layer_types = ["sliding_attention"]
    model.model.layers[0].self_attn.layer_idx = 0
    model.config.num_hidden_layers = 1
    short = {name: v for name, v in inputs.items() if not name.startswith("past")}
    with torch.no_grad():
        assert torch.equal(left["logits"], model(**short, use_cache=False).logits)
