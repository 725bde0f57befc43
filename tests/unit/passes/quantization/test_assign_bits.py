"""``assign-bits`` marks linears with widths, and ``quantize-weights`` obeys them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from modelathe.ir import (
    Linear,
    PassError,
    Program,
    QuantizedLinear,
    fingerprint,
    load_program,
    marks_of,
    path_of,
    save_program,
    to_text,
)
from modelathe.passes import (
    AssignBits,
    Canonicalize,
    FoldNorms,
    PassResult,
    Pipeline,
    PruneBlocks,
    QuantizeWeights,
    TieBlocks,
)
from modelathe.passes.analysis.zd import zd
from modelathe.passes.quantization.readers import WIDTH
from support.models import canonical, context
from support.tiny import TinyBlock, tiny, tiny_model, tiny_program


def widths(program: Program) -> dict[str, int]:
    """Return the marks of all linears, by module path."""
    return {
        path_of(node): int(marks_of(node)[WIDTH])
        for graph in program.graphs.values()
        for node in graph.nodes
        if WIDTH in marks_of(node)
    }


def by_block(program: Program) -> dict[str, int]:
    return {path.rpartition(".")[0]: bits for path, bits in widths(program).items()}


def codes(program: Program) -> dict[str, tuple[int, bytes]]:
    """Return the width and the codes of every quantised linear, by module path."""
    calls = [QuantizedLinear.match(node) for node in program.graph.nodes]
    return {
        path_of(call.node): (
            call.bits,
            program.weight(call.codes).load().numpy().tobytes(),
        )
        for call in calls
        if call
    }


def rounded(program: Program, **options: Any) -> Program:
    return QuantizeWeights(**{"method": "rtn", "head_bits": None, **options})(program).program


def assigned(program: Program, **options: Any) -> Program:
    return AssignBits(**{"score": "zd", **options})(program, context()).program


@pytest.fixture(scope="module")
def four() -> Program:
    return tiny(4)


def test_the_blocks_with_most_large_weights_get_fewer_bits(four: Program) -> None:
    scores = zd(four).scores
    least = sorted(range(4), key=lambda index: -scores[index])[:2]
    found = assigned(four)
    assert by_block(found) == {f"layers.{i}": 4 if i in least else 8 for i in range(4)}
    assert set(widths(found)) == {f"layers.{i}.{name}" for i in range(4) for name in ("up", "down")}
    backwards = by_block(assigned(four, score="reverse-zd"))
    assert {backwards[f"layers.{i}"] for i in least} == {8}


@pytest.mark.parametrize("score", ["lim", "zd", "random", "reverse", "reverse-zd"])
def test_low_sets_are_nested(score: Any) -> None:
    program = canonical("gemma3")
    sets = []
    for count in range(4):
        found = by_block(assigned(program, score=score, fraction=count / 3))
        sets.append({block for block, bits in found.items() if bits == 4})
    assert all(a < b for a, b in itertools.pairwise(sets))


@pytest.mark.parametrize(("fraction", "bits"), [(0.0, 8), (1.0, 4)])
def test_none_and_all_are_the_uniform_widths(four: Program, fraction: float, bits: Any) -> None:
    found = codes(rounded(assigned(four, fraction=fraction)))
    assert found == codes(rounded(four, bits=bits))


@pytest.mark.parametrize("target", [8, 7, 6.1, 5, 4])
def test_the_mean_width_is_that_of_the_stored_codes(four: Program, target: float) -> None:
    result = AssignBits(score="zd", target_bits=target)(four)
    stored = codes(rounded(result.program))
    numbers = 4 * 2 * 32 * 64
    mean = sum(len(packed) for _, packed in stored.values()) * 8 / numbers
    assert result.details["bits"] == mean
    assert mean == 8 - round(4 * (8 - target) / 4)


def test_the_mean_width_counts_numbers_and_not_blocks() -> None:
    blocks: list[nn.Module] = [TinyBlock(hidden) for hidden in (32, 64, 256)]
    result = AssignBits(score="random", fraction=0.67)(tiny_program(tiny_model(blocks)))
    sizes = {"layers.0": 32, "layers.1": 64, "layers.2": 256}
    found = by_block(result.program)
    assert sorted(found.values()) == [4, 4, 8]
    mean = sum(sizes[block] * bits for block, bits in found.items()) / sum(sizes.values())
    assert result.details["bits"] == pytest.approx(mean)


def recipe_of(result: PassResult) -> str:
    (text,) = [remark.message for remark in result.remarks if remark.where == "recipe"]
    assert text == result.details["recipe"]
    return str(text)


def test_the_recipe_makes_the_same_codes() -> None:
    program = canonical("gemma3")
    result = AssignBits(score="lim", low=2, high=3)(program, context())
    text = recipe_of(result).replace("{", "{method=rtn group-size=8 ")
    by_text = Pipeline.parse(text, check=False)(program).program
    found = codes(by_text)
    assert found == codes(rounded(result.program, group_size=8, head_bits="bits"))
    assert sorted({bits for bits, _ in found.values()}) == [2, 3, 4]  # 4: the head


def test_the_table_is_in_the_remarks_and_in_the_details(four: Program) -> None:
    result = AssignBits(score="zd")(four)
    scores = zd(four).scores
    for index, score in enumerate(scores):
        bits = by_block(result.program)[f"layers.{index}"]
        line = f"applied: layers.{index}: zd {score:.4f}: {bits} bits"
        assert line in map(str, result.remarks)
        row = {"score": f"zd {score:.4f}", "bits": bits}
        assert result.details["blocks"][f"layers.{index}"] == row


def test_marks_are_printed_fingerprinted_saved_and_kept_by_later_passes(tmp_path: Path) -> None:
    program = canonical("llama")
    result = assigned(program)
    assert to_text(result).count(" !bits=4\n") == 7
    assert fingerprint(result) != fingerprint(program)
    save_program(result, tmp_path)
    assert widths(load_program(tmp_path)) == widths(result)
    assert len(widths(result)) == 14
    for pass_ in (Canonicalize(), FoldNorms(untie=True, center_readers=False)):
        assert widths(pass_(result).program) == widths(result), pass_.name
    left = widths(PruneBlocks(blocks=(0,))(result).program)
    assert left == {path: bits for path, bits in widths(result).items() if "layers.1" in path}


def test_blocks_that_share_weights_get_one_width_and_count_as_one(four: Program) -> None:
    tied = TieBlocks(unique=2)(four, context()).program
    result = AssignBits(score="zd")(tied)
    found = by_block(result.program)
    assert found["layers.0"] == found["layers.2"] != found["layers.1"] == found["layers.3"]
    assert any("and 1 that share weights with it" in remark.where for remark in result.remarks)
    text = recipe_of(result).replace("{", "{method=rtn ")
    again = Pipeline.parse(text, check=False)(tied).program
    assert codes(again) == codes(rounded(result.program, head_bits="bits"))


def test_a_weight_that_the_head_reads_too_has_no_width() -> None:
    model: Any = tiny_model([TinyBlock(24), TinyBlock(24)], tied=False)
    model.layers[0].up.weight = model.head.weight
    result = AssignBits(score="zd", fraction=1)(tiny_program(model))
    assert set(widths(result.program)) == {"layers.0.down", "layers.1.up", "layers.1.down"}
    missed = [str(remark) for remark in result.remarks if remark.kind == "missed"]
    assert len(missed) == 1
    assert "read outside the blocks too: layers.0.up, head" in missed[0]
    text = recipe_of(result).replace("{", "{method=rtn group-size=8 ")
    by_text = Pipeline.parse(text, check=False)(tiny_program(model)).program
    assert codes(by_text) == codes(rounded(result.program, group_size=8, head_bits="bits"))


def test_cross_attention_that_the_encoder_makes_belongs_to_the_decoder_block() -> None:
    found = widths(assigned(canonical("t5"), fraction=1))
    linears = [node for graph in canonical("t5").graphs.values() for node in graph.nodes]
    paths = {path_of(node) for node in linears if Linear.match(node)}
    assert set(found) == {path for path in paths if ".block." in path}
    assert any("EncDecAttention.k" in path for path in found)


def test_a_second_choice_replaces_the_first(four: Program) -> None:
    first = assigned(four, fraction=1)
    again = AssignBits(score="zd", fraction=1)(first)
    assert [str(remark) for remark in again.remarks] == [
        "missed: assign-bits: every block has these widths already"
    ]
    second = AssignBits(score="zd", fraction=0)(first)
    assert set(widths(second.program).values()) == {8}
    assert sum("in the place of 4" in str(remark) for remark in second.remarks) == 4


def test_chance_is_that_of_the_seed() -> None:
    program = tiny(4)
    found = [
        by_block(AssignBits(score="random")(program, context(seed=seed)).program)
        for seed in (0, 0, 1, 2, 3)
    ]
    assert found[0] == found[1]
    assert len({tuple(one.values()) for one in found}) > 1


@pytest.mark.parametrize(
    ("score", "options"),
    [
        ("lim", {"agg": "token-mean"}),
        ("lim", {"skip_first": True}),
        ("zd", {"sided": "two"}),
        ("zd", {"pooled": False}),
    ],
)
def test_options_of_the_scores_are_theirs(score: Any, options: Any) -> None:
    usual, other = (
        AssignBits(score=score, **given)(canonical("gemma3"), context()).details["blocks"]
        for given in ({}, options)
    )
    assert usual.keys() == other.keys()
    assert all(usual[block]["score"] != other[block]["score"] for block in usual)


def test_a_quantised_program_is_refused(four: Program) -> None:
    with pytest.raises(PassError, match="8 weights are quantised already") as caught:
        AssignBits(score="zd")(rounded(four))
    assert "in front of quantize-weights" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("norm-mlp", {}, "no repeated blocks"),
        ("conv-norms", {"score": "zd"}, "no repeated blocks"),
        ("vit", {}, "reads no tokens"),
    ],
)
def test_what_has_no_scores_is_refused(model: str, options: Any, message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        AssignBits(**options)(canonical(model), context())
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 8}, "low is less than high"),
        ({"low": 5}, "widths are 2, 3, 4 or 8"),
        ({"fraction": 1.5}, "fraction is a share"),
        ({"fraction": 0.5, "target_bits": 5}, "not both"),
        ({"target_bits": 3.9}, "target_bits is from low=4 to high=8"),
        ({"score": "zd", "agg": "token-mean"}, "options of lim"),
        ({"score": "random", "skip_first": True}, "options of lim"),
        ({"sided": "two"}, "options of zd"),
        ({"score": "random", "pooled": False}, "options of zd"),
    ],
)
def test_wrong_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AssignBits(**options)
