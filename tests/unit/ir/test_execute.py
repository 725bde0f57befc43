"""Programs run node by node, with weights loaded on use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from modelathe.backends.program_session import ProgramSession
from modelathe.ir import DataError, TensorWeight
from support.feeds import feed
from support.models import canonical, module, program
from support.numeric import assert_same_bits, relative_error, rounding


def test_whoever_observes_sees_every_value_in_order() -> None:
    found = program("norm-mlp")
    seen: list[tuple[str, Any]] = []
    out = found.run(feed(found), observe=lambda node, value: seen.append((node.name, value)))
    assert [name for name, _ in seen] == [n.name for n in found.graph.nodes if n.op != "output"]
    assert seen[-1][1] is out["output"]


def test_values_are_let_go_after_their_last_use() -> None:
    import weakref

    found = program("norm-mlp")
    alive: list[Any] = []

    def keep(node: fx.Node, value: Tensor) -> None:
        if node.op == "call_function":
            alive.append(weakref.ref(value))
            assert sum(ref() is not None for ref in alive) <= 2

    found.run(feed(found), observe=keep)


def test_each_weight_is_loaded_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[torch.dtype | None] = []
    real = TensorWeight.load

    def load(self: TensorWeight, dtype: torch.dtype | None = None) -> Tensor:
        loaded.append(dtype)
        return real(self, dtype)

    monkeypatch.setattr(TensorWeight, "load", load)
    found = program("norm-mlp")
    found.run(feed(found))
    assert loaded == [None] * 5


@pytest.mark.parametrize("name", ["llama", "gemma3", "llama-bf16", "bert", "vit"])
def test_a_program_runs_in_float64(name: str) -> None:
    found = program(name)
    inputs = feed(found)
    values: list[torch.dtype] = []

    def note(node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            values.append(value.dtype)

    wide = found.run(inputs, observe=note, dtype=torch.float64)
    assert set(values) == {torch.float64}
    narrow = found.run(inputs)
    for output, value in narrow.items():
        assert relative_error(wide[output], value) <= rounding(value.dtype, steps=256)


def test_it_computes_without_gradients() -> None:
    found = program("norm-mlp")
    seen: list[Tensor] = []
    made = found.run(feed(found), observe=lambda _, value: seen.append(value))
    assert not any(value.requires_grad for value in (*made.values(), *seen))


def test_products_of_strided_values_have_the_bits_of_a_module_in_every_runtime() -> None:
    found = program("rep-tokens")
    inputs = feed(found)
    with torch.no_grad():
        expected = module("rep-tokens")(*inputs.values())
    arrays = {name: value.numpy() for name, value in inputs.items()}
    session = ProgramSession.of(found, dtype=None).run(arrays)
    for made in (found.run(inputs)["output"], torch.from_numpy(session["output"])):
        assert torch.equal(made, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs.pop("x"), r"missing \['x'\]"),
        (lambda inputs: inputs.update(y=torch.ones(1)), r"unknown \['y'\]"),
    ],
)
def test_inputs_must_fit_the_signature(change: Any, message: str) -> None:
    found = program("norm-mlp")
    inputs = feed(found)
    change(inputs)
    with pytest.raises(DataError, match=message):
        found.run(inputs)


@pytest.mark.parametrize("name", ["norm-mlp", "tied-blocks", "llama"])
def test_a_bound_program_is_a_module_of_the_same_bits(name: str) -> None:
    found = canonical(name)
    bound = found.bind()
    inputs = feed(found)
    with torch.no_grad():
        made = bound(*inputs.values())
    assert_same_bits(dict(zip(found.signature.outputs, made, strict=True)), found.run(inputs))


def test_a_bound_program_can_be_trained_and_leaves_the_program_alone() -> None:
    found = program("tied-blocks")
    bound = found.bind()
    inputs = feed(found)
    before = found.run(inputs)
    (bound(*inputs.values())[0] ** 2).mean().backward()
    gradients = {name: parameter.grad for name, parameter in bound.named_parameters()}
    assert len(gradients) == len(found.weights)
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    with torch.no_grad():
        for parameter in bound.parameters():
            parameter.zero_()
    assert_same_bits(found.run(inputs), before)


def test_a_tied_weight_is_one_parameter() -> None:
    tied = program("tied-head").bind()
    assert len(list(tied.parameters())) == len(list(module("tied-head").parameters()))
