from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import PassError, Program, Weights, capture, fingerprint
from modelathe.passes.context import PassContext
from modelathe.passes.quantization import QuantizeWeights
from modelathe.passes.tying import TieBlocks
from modelathe.passes.tying.stacks import find_stacks, weight_names
from support.tiny import TinyBlock, logits, logits_with, tiny, tiny_model, tiny_program

Init = Literal["stepwise", "average", "lower"]
# for 4 blocks: which blocks' weights each block's are the mean of
SOURCES: dict[tuple[Init, int], list[list[int]]] = {
    ("stepwise", 1): [[0], [0], [0], [0]],
    ("stepwise", 2): [[0], [3], [0], [3]],
    ("stepwise", 4): [[0], [1], [2], [3]],
    ("lower", 1): [[0], [0], [0], [0]],
    ("lower", 2): [[0], [1], [0], [1]],
    ("average", 1): [[0, 1, 2, 3]] * 4,
    ("average", 2): [[0, 2], [1, 3], [0, 2], [1, 3]],
}


def blocks_read(program: Program) -> list[tuple[str, ...]]:
    """The names of the weights that each block reads."""
    (stack,) = find_stacks(program)
    return [weight_names(stack.nodes(index)) for index in range(len(stack.blocks))]


@pytest.mark.parametrize(("init", "unique"), SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_the_model_with_its_weights_replaced(
    init: Init, unique: int, dtype: torch.dtype
) -> None:
    model = tiny_model(4, dtype=dtype)
    weights: dict[str, Tensor] = {}
    for index, sources in enumerate(SOURCES[init, unique]):
        for name, _ in model.get_submodule("layers.0").named_parameters():
            parts = [model.get_parameter(f"layers.{i}.{name}").detach() for i in sources]
            weights[f"layers.{index}.{name}"] = torch.stack(parts).double().mean(0).to(dtype)
    result = TieBlocks(unique=unique, init=init)(tiny(4, dtype=dtype)).program
    assert logits(result).equal(logits_with(model, weights))


@pytest.mark.parametrize("init", ["stepwise", "average", "lower"])
def test_k_sets_of_weights_remain_in_cyclic_order(init: Init) -> None:
    result = TieBlocks(unique=2, init=init)(tiny(4))
    read = blocks_read(result.program)
    assert read[0] == read[2] != read[1] == read[3]
    assert len(result.program.weights) == len(tiny(4).weights) - 2 * len(read[0])
    assert [remark.kind for remark in result.remarks] == ["applied", "applied"]


def test_stepwise_keeps_the_first_and_the_last_block_at_equal_distances() -> None:
    program = tiny(6)
    read = blocks_read(TieBlocks(unique=3)(program).program)
    assert read == [blocks_read(program)[i] for i in (0, 3, 5)] * 2


def test_the_remark_names_blocks_source_and_bytes() -> None:
    block = 2 * 32 * 4 + (32 + 1) * 64 * 4 + (64 + 1) * 32 * 4 + 32 * 8  # norm, up, down, table
    assert list(map(str, TieBlocks(unique=2)(tiny(4)).remarks)) == [
        f"applied: layers.{k}: blocks {k}, {k + 2} read the weights of layers.{source},"
        f" {2 * block} -> {block} bytes"
        for k, source in ((0, 0), (1, 3))
    ]


@pytest.mark.parametrize("init", ["stepwise", "average", "lower"])
def test_a_second_run_changes_nothing_and_says_why(init: Init) -> None:
    pass_ = TieBlocks(unique=2, init=init)
    once = pass_(tiny(4)).program
    second = pass_(once)
    assert fingerprint(second.program) == fingerprint(once)
    assert list(map(str, second.remarks)) == ["missed: layers: the blocks repeat after 2 already"]
    assert not TieBlocks(unique=4, init=init)(tiny(4)).modified


@pytest.mark.parametrize("init", ["stepwise", "average", "lower"])
def test_what_is_tied_can_be_tied_further(init: Init) -> None:
    twice = TieBlocks(unique=1, init=init)(TieBlocks(unique=2, init=init)(tiny(4)).program).program
    read = blocks_read(twice)
    assert read == [read[0]] * 4
    once = TieBlocks(unique=1, init=init)(tiny(4)).program
    torch.testing.assert_close(logits(twice), logits(once))


@pytest.mark.parametrize("unique", [3, 5, 8])
def test_a_count_that_does_not_divide_is_an_error_with_the_legal_ones(unique: int) -> None:
    with pytest.raises(PassError, match=f"unique={unique} does not divide the 4 blocks") as info:
        TieBlocks(unique=unique)(tiny(4))
    assert "unique is one of 1, 2, 4" in info.value.remedy


def test_a_graph_without_blocks_is_refused() -> None:
    with pytest.raises(PassError, match="no repeated blocks"):
        TieBlocks(unique=1)(tiny(1))


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (TinyBlock(hidden=48), r"%linear_2 reads @layers\.1\.up\.weight where the other reads"),
        (TinyBlock(factor=0.5), r"%mul_\w+ differs from %mul"),
        (TinyBlock(offset=1), r"reads @layers\.\d\.table where the other reads @layers\.0\.table"),
        (nn.Linear(32, 32), r"%linear_2 calls aten\.linear, and %layer_norm"),
    ],
)
def test_blocks_that_are_not_interchangeable_are_refused(odd: nn.Module, reason: str) -> None:
    program = tiny_program(tiny_model([TinyBlock(), odd, TinyBlock(), odd]))
    refused = rf"layers\.1 cannot read the weights of layers\.0: .*{reason}"
    with pytest.raises(PassError, match=refused):
        TieBlocks(unique=1)(program)


def test_alternating_kinds_are_tied_each_among_themselves() -> None:
    kinds = [TinyBlock(factor=f, offset=o) for f, o in ((1.5, 0), (0.5, 1), (1.5, 0), (0.5, 1))]
    program = tiny_program(tiny_model(list(kinds)))
    for init in ("stepwise", "average", "lower"):
        assert TieBlocks(unique=2, init=init)(program).modified


def test_codes_are_shared_but_never_averaged() -> None:
    program = QuantizeWeights()(tiny(4)).program
    read = blocks_read(TieBlocks(unique=2)(program).program)
    assert read[0] == read[2] != read[1]
    with pytest.raises(PassError, match="reads codes, which have no average"):
        TieBlocks(unique=2, init="average")(program)


@pytest.mark.parametrize("options", [{"unique": 0}, {"unique": 2, "init": "upper"}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unique is at least 1|init is stepwise"):
        TieBlocks(**options)


def test_the_input_program_keeps_its_weights() -> None:
    program = tiny(4)
    before, expected = fingerprint(program), logits(program)
    TieBlocks(unique=1)(program)
    assert fingerprint(program) == before
    assert logits(program).equal(expected)


@dataclass(frozen=True, kw_only=True)
class Broken(TieBlocks):
    """Ties, then spoils the result as ``how`` says."""

    how: str = ""

    def run(self, program: Program, context: PassContext) -> Any:
        original = program.editable()
        result = super().run(program, context)
        linears = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
        node = linears[-1] if self.how == "outside" else linears[4]  # the head, layers.2.up
        read = node.args[1]
        name = {"one block": "layers.1.up.weight", "every block": "layers.2.up.weight"}.get(
            self.how
        )
        if name is not None:
            program.add_weight(name, original.weight(name))
        else:
            name = program.add_weight("spoiled", program.weight(read).load() * 1.01)
        readers = [node]
        if self.how in ("every block", "mean"):
            readers += [n for n in linears if n.args[1].target == read.target]
        for reader in readers:
            other = program.weight_node(program.graph, name, before=reader)
            reader.replace_input_with(reader.args[1], other)
        return result


@pytest.mark.parametrize(
    ("how", "init", "message"),
    [
        ("one block", "lower", r"layers\.2: reads other weights than block 0"),
        ("every block", "lower", r"layers\.0: reads the weights of the wrong block"),
        ("mean", "average", r"@spoiled: is not the mean of @layers\.0\.up\.weight, @layers\.2"),
        ("outside", "average", r"%linear_8: is in no block"),
    ],
)
def test_a_broken_pass_is_caught_and_the_place_is_named(how: str, init: Init, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Broken(unique=2, init=init, how=how)(tiny(4, tied=False))


class Crossed(TinyBlock):
    """A decoder block whose cross projection runs in the encoder's graph."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.Linear(32, 32)


class Half(nn.Module):
    """One half of an encoder-decoder: both have all modules, and run some."""

    def __init__(self, encode: bool) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([TinyBlock(), TinyBlock()])
        self.decoder = nn.ModuleList([Crossed(), Crossed()])
        self.encode = encode

    def forward(self, x: Tensor) -> Any:
        for layer in self.encoder if self.encode else self.decoder:
            x = layer(x)
        if self.encode:
            return x, *(layer.get_submodule("cross")(x) for layer in self.decoder)
        return x


def test_both_stacks_of_an_encoder_decoder_are_tied_cross_attention_included() -> None:
    halves = [capture(Half(encode).eval(), (torch.ones(2, 32),)) for encode in (True, False)]
    names = ("encoder", "decoder")
    program = Program(
        {name: half.graph for name, half in zip(names, halves, strict=True)},
        {name: half.signature for name, half in zip(names, halves, strict=True)},
        Weights(dict(halves[0].weights) | dict(halves[1].weights)),
        {},
        halves[0].origin,
    )
    result = TieBlocks(unique=1, init="lower")(program).program
    left = {name.rpartition(".")[0] for name in result.weights}
    assert {name for name in left if ".1." in name} == set()
    assert {name for name in left if "cross" in name} == {"decoder.0.cross"}
