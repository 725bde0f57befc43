from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelathe.ir import PassError, SpecSyntaxError, load_program, save_program
from modelathe.ir.cache import reads_codes
from modelathe.passes import PassResult, Pipeline, PruneBlocks, QuantizeCache, TieBlocks
from modelathe.passes.cache.entries import Entries, cache_bytes
from modelathe.passes.cache.widths import read_table, write_table
from modelathe.passes.probes import empty_cache, feeds, next_cache, probe
from support.feeds import feed
from support.models import LENGTH, VOCABULARY, canonical, context
from support.numeric import assert_same_bits, relative_error

MIXED = QuantizeCache(key_bits=4, value_bits=8, blocks=("1:8/2",))


def quantized(model: str, pass_: QuantizeCache = MIXED) -> PassResult:
    return pass_(canonical(model), context())


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma3"])
def test_a_text_at_once_and_token_by_token_give_the_same(model: str) -> None:
    program, text = quantized(model).program, tokens(2, 12)
    cache = empty_cache(program, 2)
    whole = program.run(feeds(program, text, cache, 0), dtype=torch.float64)
    for place in range(12):
        inputs = feeds(program, text[:, place : place + 1], cache, place)
        found = program.run(inputs, dtype=torch.float64)
        assert relative_error(whole["logits"][:, place], found["logits"][:, 0]) < 1e-12
        cache = next_cache(found)
    for name, value in next_cache(whole).items():
        assert relative_error(value, cache[name]) < 1e-12, name


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_left_padding_changes_nothing(model: str) -> None:
    program, text = quantized(model).program, tokens(2, 9)
    given = feeds(program, text, empty_cache(program, 2), 0)
    given["attention_mask"] = torch.ones_like(text)
    given["attention_mask"][:, :3] = 0
    given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    padded = program.run(given, dtype=torch.float64)["logits"][:, 3:]
    plain = feeds(program, text[:, 3:], empty_cache(program, 2), 0)
    assert relative_error(program.run(plain, dtype=torch.float64)["logits"], padded) < 1e-12


def test_outputs_are_those_of_rounded_keys_and_values() -> None:
    before, after = canonical("llama"), quantized("llama").program
    inputs = feed(before, sequence=7)
    rounded: dict[Any, Tensor] = {}
    plain = after.run(feed(after, sequence=7), observe=rounded.__setitem__, dtype=torch.float64)
    reads = [rounded[read.node] for read in reads_codes(after.graph)]
    replaced = before.editable()
    entries = Entries.of(replaced, "main").found
    for entry, value in zip(entries, reads, strict=True):
        name = replaced.add_weight("rounded", value)
        node = replaced.weight_node(replaced.graph, name, before=entry.join)
        entry.join.replace_all_uses_with(node, delete_user_cb=lambda user: user.op != "output")
    inputs |= {"input_ids": feed(after, sequence=7)["input_ids"]}
    expected = replaced.run(inputs, dtype=torch.float64)["logits"]
    assert relative_error(expected, plain["logits"]) < 1e-12


def test_codes_scales_and_zero_points_are_in_the_signature_side_by_side() -> None:
    program = quantized("llama").program
    names = [name for name in program.signature.inputs if name.startswith("past_key_values.1.")]
    parts = ["key", "key_scale", "key_zero", "value", "value_scale", "value_zero"]
    assert names == [f"past_key_values.1.{part}" for part in parts]
    dims = program.signature.dims
    assert dims["past_key_values.0.key"] == ("batch", 2, "past", 4)  # 8 channels of 4 bits
    assert dims["past_key_values.1.value"] == ("batch", 2, "past", 2)
    assert dims["past_key_values.1.value_scale"] == ("batch", 2, "past", 1)
    outputs = [name.replace("present", "past_key_values") for name in program.signature.outputs[1:]]
    assert outputs == list(program.signature.inputs[3:])


def test_bytes_count_scales_and_zero_points() -> None:
    found = quantized("llama")
    # 2 heads of 8; codes of 4, 8, 8 and 2 bits, and 4 + 1 bytes for each of 4 entries
    assert cache_bytes(found.program) == 2 * (4 + 8 + 8 + 2 + 4 * 5)
    expected = {"before": 2 * 2 * 2 * 8 * 4, "after": cache_bytes(found.program)}
    assert found.details["bytes_per_token"] == expected
    assert found.details["blocks"] == "0:4/8,1:8/2"


def test_scales_have_the_dtype_of_the_model() -> None:
    program = quantized("llama-bf16").program
    types = {str(n.target): n.meta["val"].dtype for n in program.graph.find_nodes(op="placeholder")}
    assert types["past_key_values.0.key_scale"] == torch.bfloat16
    assert types["past_key_values.0.key"] == types["past_key_values.0.key_zero"] == torch.uint8


def test_none_leaves_an_entry_as_it_is() -> None:
    found = quantized("llama", QuantizeCache(key_bits=None, blocks=("0:8/none",)))
    applied = [remark.where for remark in found.remarks if remark.kind == "applied"]
    assert applied == ["past_key_values.0.key", "past_key_values.1.value"]


def test_cross_attention_keeps_its_keys_and_values() -> None:
    found = quantized("t5")
    assert "past_key_values.0.key_scale" in found.program.signatures["decoder"].inputs
    assert "cross_key_values.0.key_scale" not in found.program.signatures["decoder"].inputs
    assert any(r.where == "cross_key_values" and r.kind == "missed" for r in found.remarks)


def test_heads_that_do_not_fill_bytes_are_left_alone_with_a_remark() -> None:
    program = canonical("llama").editable()
    for entry in Entries.of(program, "main").found:
        entry.newest.meta["val"] = entry.newest.meta["val"][..., :6]
    remarks = QuantizeCache(key_bits=2, value_bits=None).run(program, context()).remarks
    assert {r.message for r in remarks} == {"6 codes of 2 bits do not fill whole bytes"}


def test_blocks_that_are_not_there_are_an_error() -> None:
    with pytest.raises(PassError, match="no block 2"):
        quantized("llama", QuantizeCache(blocks=("1-2:4/4",)))


def test_a_model_without_a_cache_is_an_error() -> None:
    with pytest.raises(PassError, match="keeps no keys and values"):
        quantized("bert")


def test_pruning_afterwards_renumbers_scales_with_codes() -> None:
    after = PruneBlocks(blocks=(0,))(quantized("llama").program, context()).program
    before = QuantizeCache(key_bits=8, value_bits=2)(
        PruneBlocks(blocks=(0,))(canonical("llama"), context()).program, context()
    ).program
    assert after.signature == before.signature
    inputs = feed(after, sequence=5, past=3)
    assert_same_bits(after.run(inputs), before.run(inputs))


def test_tied_blocks_keep_caches_of_their_own() -> None:
    tied = TieBlocks(unique=1)(canonical("llama"), context()).program
    first = QuantizeCache(key_bits=4)(tied, context()).program
    second = quantized("llama", QuantizeCache(key_bits=4)).program
    second = TieBlocks(unique=1)(second, context()).program
    inputs = feed(first, sequence=5, past=3)
    assert_same_bits(first.run(inputs), second.run(inputs))


def test_a_saved_program_has_the_same_cache(tmp_path: Path) -> None:
    program = quantized("gpt2").program
    save_program(program, tmp_path)
    again = load_program(tmp_path)
    assert again.signature == program.signature
    inputs = probe(program, "main", past=3, sequence=4)
    assert_same_bits(again.run(inputs), program.run(inputs))


def test_what_attention_reads_is_checked() -> None:
    wrong = quantized("llama").program.editable()
    key, value, *_ = reads_codes(wrong.graph)
    value.node.replace_input_with(value.zeros, key.zeros)
    with pytest.raises(PassError, match="more than half a step"):
        MIXED.ensures(canonical("llama"), wrong)


def test_it_trains_behind_the_rounding() -> None:
    program = quantized("llama", QuantizeCache(key_bits=2, value_bits=2)).program
    bound = program.bind()
    inputs = feed(program, sequence=min(9, LENGTH))
    logits = bound(*(inputs[name] for name in program.signature.inputs))[0]
    logits.square().sum().backward()
    names = ["k_proj", "v_proj"]
    grads = [p.grad for n, p in bound.named_parameters() if any(part in n for part in names)]
    assert len(grads) == 4
    assert all(grad is not None and bool((grad != 0).any()) for grad in grads)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize-cache{key-bits=3}", r"takes auto\|2\|4\|8\|none"),
        ("quantize-cache{blocks=0:3/4}", "2, 4, 8 or none"),
        ("quantize-cache{blocks=0}", "rows such as"),
        ("quantize-cache{blocks=3-1:4/4}", "ends before it begins"),
        ("quantize-cache{blocks=0-2:4/4,1:2/2}", "block 1 twice"),
        ("quantize-cache{trials=4}", "target-bits= starts"),
        ("quantize-cache{target-bits=1}", "2 to 8"),
        ("quantize-cache{target-bits=4 key-bits=4}", "leave key_bits out"),
        ("quantize-cache{target-bits=4 key-bits=8}", "leave key_bits out"),
        ("quantize-cache{target-bits=4 key-bits=none}", "leave key_bits out"),
        ("quantize-cache{target-bits=4 trials=4}", "search=nsga2"),
        ("quantize-cache{target-bits=4 trials=100}", "search=nsga2"),
        ("quantize-cache{search=sums}", "target-bits= starts"),
        ("quantize-cache{key-bits=none value-bits=none}", "leaves everything"),
        ("quantize-cache{target-bits=4 groups=0}", "at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(SpecSyntaxError, match=message):
        Pipeline.parse(text)


@pytest.mark.parametrize("rows", [("0:8/8",), ("0-3:4/2", "4:none/8"), ("2:2/2", "4-5:8/8")])
def test_a_table_reads_back_what_is_written(rows: tuple[str, ...]) -> None:
    assert write_table(read_table(rows)) == rows


def test_probes_have_scales_above_zero() -> None:
    made = probe(quantized("llama").program, "main", past=3)
    scales = [value for name, value in made.items() if name.endswith("_scale")]
    assert len(scales) > 1
    assert all((value > 0).all() for value in scales)
