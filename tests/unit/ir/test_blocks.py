"""Blocks are found in the graph, with the residual stream between them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from modelathe.ir import capture, find_blocks, path_of
from modelathe.ir.blocks import block_of, info_of, set_info
from support.folders import tiny_bert
from support.models import MODELS, canonical, program

# model, graph -> keys of the blocks
BLOCKS = {
    ("llama", "main"): ["model.layers.0", "model.layers.1"],
    ("llama-bf16", "main"): ["model.layers.0", "model.layers.1"],
    ("gpt2", "main"): ["transformer.h.0", "transformer.h.1"],
    ("gemma3", "main"): [f"model.layers.{n}" for n in range(3)],
    ("bert", "main"): ["encoder.layer.0", "encoder.layer.1"],
    ("vit", "main"): ["layers.0", "layers.1"],
    ("t5", "encoder"): ["encoder.block.0", "encoder.block.1"],
    ("t5", "decoder"): ["decoder.block.0", "decoder.block.1"],
    ("tied-blocks", "main"): ["layers.0", "layers.1"],
    ("norm-mlp", "main"): [],
}


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "canonical"])
@pytest.mark.parametrize(("name", "graph"), BLOCKS)
def test_blocks_are_found(name: str, graph: str, captured: bool) -> None:
    found = program(name) if captured else canonical(name)
    blocks = find_blocks(found.graphs[graph])
    assert [block.key for block in blocks] == BLOCKS[name, graph]
    assert [block.index for block in blocks] == list(range(len(blocks)))
    for block in blocks:
        assert {block_of(node) for node in block.nodes} == {block.key}


@pytest.mark.parametrize(("name", "graph"), BLOCKS)
def test_the_residual_stream_runs_from_block_to_block(name: str, graph: str) -> None:
    blocks = find_blocks(canonical(name).graphs[graph])
    for block in blocks:
        assert block.input is not None
        assert block.output is not None
        assert block.input.meta["val"].shape[-1] == block.output.meta["val"].shape[-1]
    for block, following in itertools.pairwise(blocks):
        assert following.input is block.output


def test_calls_of_one_module_are_told_apart() -> None:
    keys = [block.key for block in find_blocks(program("albert").graph)]
    assert len(keys) == len(set(keys)) == 2
    paths = {block.path for block in find_blocks(program("albert").graph)}
    assert len(paths) == 1


def test_the_cache_of_a_block_belongs_to_it() -> None:
    """The cache grows outside the block's module, and still is the block's."""
    for number, block in enumerate(find_blocks(canonical("llama").graph)):
        grown = [node for node in block.nodes if info_of(node).get("cache")]
        sources = [str(source.target) for node in grown for source in node.all_input_nodes]
        entries = [name for name in sources if name.startswith("past_key_values.")]
        assert entries == [f"past_key_values.{number}.key", f"past_key_values.{number}.value"]


def test_calls_keep_the_path_of_their_module() -> None:
    paths = {path_of(node) for node in program("llama").graph.nodes if node.op == "call_function"}
    assert {"model.layers.1.self_attn.q_proj", "model.embed_tokens", "lm_head"} <= paths


def test_a_note_belongs_to_one_graph() -> None:
    copy = program("tied-blocks").editable()
    before = {node.name: block_of(node) for node in program("tied-blocks").graph.nodes}
    for node in copy.graph.nodes:
        set_info(node, block="elsewhere")
    after = {node.name: block_of(node) for node in program("tied-blocks").graph.nodes}
    assert after == before


ONE = {"bert": ["encoder.layer.0"], "t5": ["encoder.block.0", "decoder.block.0"]}


@pytest.mark.parametrize("name", ONE)
def test_an_only_layer_is_a_block_where_the_configuration_says_so(name: str) -> None:
    if name == "bert":
        model = tiny_bert()
    else:
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(vocab_size=16, **sizes)).eval()
    graphs = capture(model).graphs.values()
    (*blocks,) = (block for graph in graphs for block in find_blocks(graph))
    assert [block.key for block in blocks] == ONE[name]
    assert all(block.input is not None and block.output is not None for block in blocks)


def test_one_layer_is_no_repetition() -> None:
    stack = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    assert find_blocks(capture(stack, (torch.ones(1, 2),)).graph) == ()


def test_every_model_with_blocks_is_listed() -> None:
    listed = {name for name, _ in BLOCKS} | {"albert"}
    for name in MODELS:
        graphs = program(name).graphs.values()
        assert name in listed or not any(map(find_blocks, graphs)), name
