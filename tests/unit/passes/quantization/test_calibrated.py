"""Weights quantised on calibration text: what they read, in which order, and what is stored."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from modelathe.ir import (
    Linear,
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
    Weight,
    fingerprint,
    load_program,
    mark,
    save_program,
    to_text,
)
from modelathe.passes import PassContext, QuantizeWeights
from modelathe.passes.data import TokenWindows
from modelathe.passes.quantization.methods import PUBLISHED
from modelathe.passes.quantization.readers import WIDTH, Shared, find_shared
from modelathe.passes.quantization.sequential import Moments, in_sequence
from modelathe.passes.quantization.store import Stored
from support.models import canonical, quantizer
from support.numeric import relative_error


def windows(rows: int = 4, length: int = 12, vocabulary: int = 32) -> TokenWindows:
    generator = torch.Generator().manual_seed(3)
    return TokenWindows.of(torch.randint(vocabulary, (rows, length), generator=generator), "test")


def context() -> PassContext:
    return PassContext(calibration=windows())


def inputs_of(program: Program, name: str) -> Tensor:
    """Return all that the linear with a weight reads, [tokens, in], in one plain run."""
    from modelathe.passes.outputs import graph_inputs, runner

    run = runner(program)
    found: list[Tensor] = []
    for graph_name, graph in program.graphs.items():
        stops = [
            view.input
            for node in graph.nodes
            if (view := Linear.match(node)) and str(view.weight.target) == name
        ]

        def observe(node: fx.Node, value: Tensor, stops: list[fx.Node] = stops) -> None:
            if node in stops:
                found.extend([value.flatten(0, -2)] * stops.count(node))

        given = graph_inputs(program, graph_name, windows().tokens, run)
        program.run(given, graph_name, observe, torch.float32)
    return torch.cat(found)


class Doubled(Weight):
    """Twice a weight: something that is easily seen downstream."""

    def __init__(self, weight: Weight) -> None:
        self.weight, self.shape, self.dtype = weight, weight.shape, weight.dtype

    @property
    def fingerprint(self) -> str:
        return f"doubled:{self.weight.fingerprint}"

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        return 2 * self.weight.load(dtype)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_moments_are_those_behind_the_weights_that_were_done_before(name: str) -> None:
    program = canonical(name)
    wanted = [shared for shared in find_shared(program) if shared.linear and not shared.obstacle]
    order: list[str] = []
    weights = dict(program.weights)
    now = replace(program, weights=program.weights.copy())

    def quantize(together: list[Shared], moments: Moments) -> list[Weight]:
        x = inputs_of(now, together[0].name).double()  # from the start, with what is done so far
        expected = x.T @ x / len(x)
        if sum(Linear.match(node) is not None for _, node in together[0].readers) == 1:
            assert moments.count == len(x)
            assert relative_error(expected, moments.matrix.double()) <= 1e-4
        order.extend(shared.name for shared in together)
        doubled: list[Weight] = [Doubled(weights[shared.name]) for shared in together]
        for shared, weight in zip(together, doubled, strict=True):
            now.weights.put(shared.name, weight)
        return doubled

    in_sequence(program, wanted, context(), quantize)
    assert sorted(order) == sorted(shared.name for shared in wanted)
    assert dict(program.weights) == weights  # the program itself is as it was


def test_a_head_that_shares_the_embedding_is_quantised_on_what_the_head_reads() -> None:
    program = canonical("gpt2")
    (head,) = [shared for shared in find_shared(program) if shared.head]
    assert head.embedding
    seen: list[Moments] = []

    def quantize(together: list[Shared], moments: Moments) -> list[Weight]:
        seen.append(moments)
        return [program.weights[shared.name] for shared in together]

    in_sequence(program, [head], context(), quantize)
    (moments,) = seen
    x = inputs_of(program, head.name).double()
    assert moments.count == windows().tokens.numel()
    assert relative_error(x.T @ x / len(x), moments.matrix.double()) <= 1e-5


def test_a_weight_that_is_read_twice_is_quantised_once_on_both() -> None:
    from modelathe.passes import TieBlocks

    program = TieBlocks(unique=1)(canonical("llama"), context()).program
    wanted = [s for s in find_shared(program) if s.linear and not s.embedding]
    seen: dict[str, Moments] = {}
    sizes: list[int] = []

    def quantize(together: list[Shared], moments: Moments) -> list[Weight]:
        sizes.append(len(together))
        for shared in together:
            assert shared.name not in seen
            seen[shared.name] = moments
        return [program.weights[shared.name] for shared in together]

    in_sequence(program, wanted, context(), quantize)
    assert sizes == [3, 1, 2, 1]  # those that read the same, at once
    tied = next(shared for shared in wanted if len(shared.readers) > 1)
    x = inputs_of(program, tied.name).double()
    assert seen[tied.name].count == len(x)
    assert len(x) == len(tied.readers) * windows().tokens.numel()
    assert relative_error(x.T @ x / len(x), seen[tied.name].matrix.double()) <= 1e-5


def test_a_weight_that_reads_one_value_twice_is_quantised_once() -> None:
    program = canonical("t5").editable()
    views = [view for node in program.graphs["encoder"].nodes if (view := Linear.match(node))]
    first, *_, last = (view for view in views if view.input is views[-1].input)
    last.set_weights(first.weight, None)
    program.clean()
    made = quantizer(method="gptq", only=("*EncDecAttention*",))(program, context()).program
    assert str(first.weight.target) not in made.weights


def codes(program: Program) -> dict[str, Stored]:
    return {
        node.name: Stored.of(program, call)
        for graph in program.graphs.values()
        for node in graph.nodes
        if (call := QuantizedLinear.match(node))
    }


def lost(before: Program, after: Program) -> float:
    """Return the mean relative change of the logits on the calibration text."""
    from modelathe.passes.outputs import predictions, runner, token_batch

    batch = token_batch(before, windows().tokens)
    expected, found = (predictions(p, batch, runner(p)) for p in (before, after))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("options", [{}, {"bits": 3, "group_size": -1}, {"symmetric": True}])
def test_what_text_chooses_computes_more_of_the_same_than_rounding(options: Any) -> None:
    program = canonical("llama")
    nearest = quantizer(method="rtn", **options)(program, context()).program
    errors = {
        method: lost(program, quantizer(method=method, **options)(program, context()).program)
        for method in ("gptq", "quantease", "auto")
    }
    assert max(errors.values()) < lost(program, nearest)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_number_type_is_stored_as_it_was_computed(
    bits: Any, group: int, symmetric: bool
) -> None:
    program = canonical("llama")
    pass_ = quantizer(bits=bits, group_size=group, symmetric=symmetric, only=("layers.1",))
    result = pass_(program, context())  # solve() compares stored and computed numbers, bit for bit
    for stored in codes(result.program).values():
        tensor = stored.load()
        assert tensor.qtype.bits == bits
        assert tensor.dequantize().isfinite().all()
    assert len(codes(result.program)) == 7


def test_half_precision_weights_keep_their_dtype() -> None:
    result = quantizer(only=("layers.0",))(canonical("llama-bf16"), context())
    scales = {stored.scales.dtype for stored in codes(result.program).values()}
    assert scales == {torch.bfloat16}


@pytest.mark.parametrize("method", [*PUBLISHED, "auto"])
@pytest.mark.parametrize(("model", "tied"), [("llama", True), ("cached-attention", False)])
def test_head_and_embedding_have_their_widths_with_every_method(
    method: Any, model: str, tied: bool
) -> None:
    pass_ = quantizer(method=method, bits=3, head_bits=8, embedding_bits=4)
    program = pass_(canonical(model), context()).program
    nodes = program.graph.nodes
    (table,) = [view for node in nodes if (view := QuantizedEmbedding.match(node))]
    head = [view for node in nodes if (view := QuantizedLinear.match(node))][-1]
    assert (head.bits, table.bits) == (8, 8 if tied else 4)
    assert (head.codes.target == table.codes.target) is tied


def test_calls_say_which_method_chose_their_codes() -> None:
    result = quantizer(method="gptq", only=("layers.0",))(canonical("llama"), context())
    assert to_text(result.program).count("!method=gptq") == 7


def test_auto_says_what_it_took_and_why() -> None:
    program = canonical("llama")
    with_text = quantizer(only=("layers.0",))(program, context())
    without = quantizer(only=("layers.0",))(program, PassContext())
    assert str(with_text.remarks[0]).endswith("there is calibration text")
    assert "gptq-quantease, by falling power" in str(with_text.remarks[0])
    assert (
        str(without.remarks[0])
        == "applied: quantize-weights: rtn: there is no calibration text that it could read"
    )


def test_auto_chooses_no_codes_by_random_tokens() -> None:
    found = quantizer(only=("*layer.0*",))(canonical("bert"), PassContext(calibration="self"))
    assert str(found.remarks[0]).startswith(
        "applied: quantize-weights: rtn: there is no calibration text"
    )


PLAIN = {"clip": "none", "act_order": False, "refit": False}
SWEEPS = {"iterations": 30, "relax": True}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gptq", {"damping": 0.01}),
        ("quantease", {**SWEEPS, "damping": 0.0}),
        ("gptq-quantease", {**SWEEPS, "damping": 0.01}),
    ],
)
def test_published_methods_store_what_their_published_settings_do(
    method: Any, settings: dict[str, Any]
) -> None:
    bare, spelled = (
        quantizer(method=method, bits=3, only=("layers.0",), **options)
        for options in ({}, {**PLAIN, **settings})
    )
    program = canonical("llama")
    found, expected = (codes(pass_(program, context()).program) for pass_ in (bare, spelled))
    for name, stored in expected.items():
        assert found[name].load().dequantize().equal(stored.load().dequantize()), name


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rtn", "act_order": True},
        {"method": "rtn", "clip": "activation"},
        {"method": "gptq", "iterations": 3},
        {"method": "gptq", "relax": False},
        {"iterations": 0},
        {"damping": -0.1},
        {"damping": math.inf},
        {"clip": "both"},
    ],
)
def test_options_that_do_nothing_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match=r"does nothing|clip|at least"):
        QuantizeWeights(**options)


def test_a_chosen_width_is_obeyed_unless_bits_is_given() -> None:
    program = canonical("llama").editable()
    for graph in program.graphs.values():
        for node in graph.nodes:
            view = Linear.match(node)
            if view is not None and "layers.0" in str(view.weight.target):
                mark(node, WIDTH, "8")
    obeyed = quantizer()(program, PassContext())
    widths = sorted(stored.qtype.bits for stored in codes(obeyed.program).values())
    assert widths == sorted([8] * 7 + [4] * (len(widths) - 7))
    overridden = quantizer(bits=3)(program, PassContext())
    assert {stored.qtype.bits for stored in codes(overridden.program).values()} == {3}
    told = "applied: quantize-weights: bits=3 overrides the widths that were chosen for 7 weights"
    assert told in map(str, overridden.remarks)


def test_the_result_saves_and_loads_bitwise(tmp_path: Path) -> None:
    result = quantizer(only=("layers.0",))(canonical("llama"), context()).program
    save_program(result, tmp_path)
    loaded = load_program(tmp_path)
    assert fingerprint(loaded) == fingerprint(result)
    for name, stored in codes(result).items():
        assert codes(loaded)[name].load().dequantize().equal(stored.load().dequantize())
