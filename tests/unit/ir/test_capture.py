"""A captured program computes, bit for bit, what the module does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

from modelathe.ir import CaptureError, Program, capture, verify
from modelathe.ir.config import max_length
from modelathe.ir.tracing import positions_behind_padding
from modelathe.ir.wrappers import cache_argument
from support.feeds import SHAPES, decoder_outputs, feed, plain_outputs
from support.models import MODELS, TRANSFORMERS, VOCABULARY, Transformer, module, perturb, program
from support.numeric import assert_same_bits, rounding, worst_error

DECODERS = ["llama", "gpt2", "gemma3", "llama-bf16"]
GROUPED = {"llama", "gemma3", "llama-bf16"}
KINDS = {
    **dict.fromkeys(DECODERS, "decoder"),
    "bert": "encoder",
    "albert": "encoder",
    "vit": "vision",
    "t5": "encoder-decoder",
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_gives_the_bits_of_transformers(name: str, shape: tuple[int, int, int]) -> None:
    batch, sequence, past = shape
    inputs = feed(program(name), batch=batch, sequence=sequence, past=past)
    found, expected = program(name).run(inputs), decoder_outputs(module(name), inputs)
    if sequence == 1 and past and name in GROUPED:
        # transformers itself multiplies in another order there: heads of a group as positions
        dtype = expected["logits"].dtype
        assert worst_error(found, expected) <= rounding(dtype)
    else:
        assert_same_bits(found, expected)


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("name", DECODERS)
def test_so_it_does_with_left_padding(name: str, past: int) -> None:
    inputs = feed(program(name), batch=2, sequence=6, past=past, pads=3)
    assert_same_bits(program(name).run(inputs), decoder_outputs(module(name), inputs))


@pytest.mark.parametrize("pads", [0, 2])
@pytest.mark.parametrize("name", ["bert", "albert", "vit"])
def test_an_encoder_gives_the_bits_of_transformers(name: str, pads: int) -> None:
    found = program(name)
    for batch, sequence in ((1, 1), (3, 7)):
        inputs = feed(found, batch=batch, sequence=sequence, pads=pads if sequence > 1 else 0)
        expected = plain_outputs(module(name), inputs, found.signature.outputs)
        assert_same_bits(found.run(inputs), expected)


_TINY = {
    "vocab_size": 20,
    "max_position_embeddings": 12,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("kind", ["roberta", "xmod", "ibert", "lilt", "esm", "mpnet", "markuplm"])
def test_positions_that_begin_behind_the_padding_are_fewer_than_the_table_has(kind: str) -> None:
    model = Transformer("AutoModel", kind, {**_TINY, "pad_token_id": 2})()
    padding = 1 if kind == "mpnet" else 2  # it reads no key for that
    assert positions_behind_padding(model) == 12 - (padding + 1)


@pytest.mark.parametrize("kind", ["bert", "opt"])
def test_so_are_no_others(kind: str) -> None:
    model = Transformer("AutoModel", kind, {**_TINY, "pad_token_id": 2})()
    assert positions_behind_padding(model) is None


def test_the_configuration_of_a_program_has_the_longest_sequence() -> None:
    found = capture(Transformer("AutoModel", "roberta", {**_TINY, "pad_token_id": 0})().eval())
    longest = max_length(found.config)
    assert longest == 11
    types = torch.zeros(1, longest + 1, dtype=torch.int64)
    inputs = {"input_ids": types + 5, "attention_mask": types + 1, "token_type_ids": types}
    found.run({name: value[:, :longest] for name, value in inputs.items()})
    with pytest.raises(IndexError):
        found.run(inputs)


def test_a_model_that_adds_its_mask_to_a_bias_is_given_none_where_it_reads_none() -> None:
    """Traced, transformers makes one of ones; eager it does not, and the bits differ."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.BeitConfig(
        **sizes, image_size=8, patch_size=4, num_hidden_layers=2, use_relative_position_bias=True
    )
    model = transformers.BeitModel(config).eval()
    perturb(model)
    found = capture(model)
    inputs = feed(found, batch=2)
    expected = plain_outputs(model, inputs, found.signature.outputs)
    assert_same_bits(found.run(inputs), expected)
    ignored = transformers.masking_utils._ignore_bidirectional_mask_sdpa
    assert ignored.__module__ == transformers.masking_utils.__name__  # as it was


@pytest.mark.parametrize("pads", [0, 2])
def test_an_encoder_decoder_gives_the_bits_of_transformers_token_by_token(pads: int) -> None:
    found, model = program("t5"), module("t5")
    inputs = feed(found, "encoder", batch=2, pads=pads)
    encoded = found.run(inputs, "encoder")
    tokens = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    crossed = {n: v for n, v in encoded.items() if n.startswith("cross_key_values.")}
    past = {
        name: torch.zeros(2, 4, 0, 8)
        for name in found.signatures["decoder"].inputs
        if name.startswith("past_key_values.")
    }
    state = hidden = None
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        given = {
            "decoder_input_ids": tokens[:, start:stop],
            "decoder_attention_mask": torch.ones(2, stop, dtype=torch.int64),
            "attention_mask": inputs["attention_mask"],
        }
        out = found.run({**given, **past, **crossed}, "decoder")
        with torch.no_grad():
            expected = model(
                decoder_input_ids=given["decoder_input_ids"],
                attention_mask=inputs["attention_mask"],
                **{cache_argument(model.forward): state},
                use_cache=True,
                **({"input_ids": inputs["input_ids"]} if state is None else {}),
                **({"encoder_outputs": (hidden,)} if state is not None else {}),
            )
        hidden, state = expected.encoder_last_hidden_state, expected.past_key_values
        assert torch.equal(encoded["last_hidden_state"], hidden)
        assert torch.equal(out["logits"], expected.logits)
        past = {n.replace("present.", "past_key_values."): v for n, v in out.items() if n[0] == "p"}


PLAIN = [name for name, case in MODELS.items() if name not in TRANSFORMERS and case.finish is None]


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_module_gives_its_own_bits_at_other_sizes(name: str) -> None:
    inputs = feed(program(name))
    with torch.no_grad():
        made = module(name)(*inputs.values())
    values = made if isinstance(made, tuple) else (made,)
    expected = dict(zip(program(name).signature.outputs, values, strict=True))
    assert_same_bits(program(name).run(inputs), expected)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_captured_is_a_legal_program(name: str) -> None:
    verify(program(name))


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_is_found(name: str) -> None:
    assert program(name).kind == KINDS[name]


def test_a_decoder_has_an_explicit_cache() -> None:
    signature = program("llama").signature
    cache = [f"past_key_values.{n}.{part}" for n in (0, 1) for part in ("key", "value")]
    assert signature.inputs == ("input_ids", "attention_mask", "position_ids", *cache)
    present = [name.replace("past_key_values", "present") for name in cache]
    assert signature.outputs == ("logits", *present)
    assert signature.dims["attention_mask"] == ("batch", "past + sequence")
    assert signature.dims["past_key_values.1.key"] == ("batch", 2, "past", 8)


def test_an_encoder_decoder_has_two_graphs_over_one_table() -> None:
    found = program("t5")
    assert list(found.graphs) == ["encoder", "decoder"]
    cross = [f"cross_key_values.{n}.{part}" for n in (0, 1) for part in ("key", "value")]
    assert found.signatures["encoder"].outputs == ("last_hidden_state", *cross)
    assert set(cross) < set(found.signatures["decoder"].inputs)
    readers = [
        name
        for name, graph in found.graphs.items()
        if any(node.target == "shared.weight" for node in graph.find_nodes(op="get_attr"))
    ]
    assert readers == ["encoder", "decoder"]


@pytest.mark.parametrize(
    ("name", "alias", "first"),
    [
        ("llama", "lm_head.weight", "model.embed_tokens.weight"),
        ("gpt2", "lm_head.weight", "transformer.wte.weight"),
        ("t5", "lm_head.weight", "shared.weight"),
        ("tied-head", "head.weight", "embed.weight"),
    ],
)
def test_tied_weights_are_one_weight_and_an_alias(name: str, alias: str, first: str) -> None:
    weights = program(name).weights
    assert weights.aliases[alias] == first
    assert alias not in list(weights)
    assert weights[alias] is weights[first]


def test_weights_keep_the_names_and_values_of_the_module() -> None:
    found = program("llama")
    parameters = dict(module("llama").named_parameters())
    assert set(parameters) <= set(found.weights)
    for name, value in parameters.items():
        assert torch.equal(found.weight(name).load(), value)


def test_a_module_of_several_outputs_and_named_inputs() -> None:
    class Two(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return left + right, left * 2

    found = capture(Two().eval(), {"left": torch.ones(2, 3), "right": torch.ones(3)})
    assert found.signature.inputs == ("left", "right")
    assert found.signature.outputs == ("output_0", "output_1")
    out = found.run({"left": torch.full((2, 3), 2.0), "right": torch.ones(3)})
    assert torch.equal(out["output_1"], torch.full((2, 3), 4.0))


def test_a_tensor_that_is_given_twice_is_two_inputs() -> None:
    class Difference(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left - right

    same = torch.ones(2)
    found = capture(Difference().eval(), (same, same))
    out = found.run({"left": torch.ones(2) * 3, "right": torch.ones(2)})
    assert torch.equal(out["output"], torch.full((2,), 2.0))


def test_a_graph_that_writes_in_place_becomes_functional() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            y[:, 0] += 1
            return y.relu_()

    model = Writes().eval()
    found = capture(model, (torch.ones(2, 3),))
    verify(found)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.run({"x": x})["output"], model(x))


def _training() -> Program:
    return capture(module("norm-mlp").__class__(), (torch.ones(3, 8),))


def _no_inputs() -> Program:
    return capture(nn.Linear(2, 2).eval())


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def _data_dependent() -> Program:
    return capture(Branches().eval(), (torch.ones(2),))


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (_training, "NormMlp is in training mode"),
        (_no_inputs, "Linear is not a transformers model, so it needs example inputs"),
        (_data_dependent, "Branches: torch.export cannot follow it"),
    ],
)
def test_what_cannot_be_captured_says_why_and_what_to_do(
    attempt: Callable[[], Program], message: str
) -> None:
    with pytest.raises(CaptureError, match=message) as caught:
        attempt()
    assert caught.value.remedy
