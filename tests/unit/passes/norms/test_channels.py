"""An axis is followed through calls that treat channels alike, and through no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from modelathe.ir import capture
from modelathe.passes.norms.channels import carried, origin, permutation, unpermuted

F = nn.functional
Function = Callable[[Tensor], Tensor]
SHAPE = (2, 3, 4, 6)


class Call(nn.Module):
    """Any function as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def call_of(function: Function) -> fx.Node:
    """Return the last call of a function on a tensor of ``SHAPE`` with a symbolic batch."""
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = capture(Call(function).eval(), (torch.ones(SHAPE),), sizes)
    (result,) = program.graph.output_node().all_input_nodes
    return result


def scaled(x: Tensor, axis: int) -> Tensor:
    """Map the entries along an axis, each in its own way."""
    shape = [-1 if i == axis else 1 for i in range(x.dim())]
    steps = torch.arange(1.0, x.shape[axis] + 1, dtype=x.dtype)
    return x * steps.reshape(shape) + steps.sqrt().reshape(shape)


# the axes of the result that hold what axes 0, 1, 2, 3 of the input hold
CALLS: dict[str, tuple[Function, list[int | None]]] = {
    "transpose": (lambda x: x.transpose(1, 3), [0, 3, 2, 1]),
    "permute": (lambda x: x.permute(0, 2, 3, 1), [0, 3, 1, 2]),
    "permute back": (lambda x: x.permute(1, -1, 0, 2), [2, 0, 3, 1]),
    "flatten behind": (lambda x: x.flatten(2), [0, 1, None, None]),
    "flatten before": (lambda x: x.reshape(-1, 4, 6), [None, None, 1, 2]),
    "split": (lambda x: x.reshape(-1, 3, 4, 2, 3), [0, 1, 2, None]),
    "unsqueeze": (lambda x: x.unsqueeze(1), [0, 2, 3, 4]),
    "slice": (lambda x: x[:, :, 1:3], [0, 1, None, 3]),
    "select": (lambda x: x.select(1, 0), [0, None, 1, 2]),
    "select last": (lambda x: x[..., -1], [0, 1, 2, None]),
    "index": (lambda x: x[:, torch.tensor([0, 2])], [None, None, None, 3]),
    "mean": (lambda x: x.mean((1, -1)), [0, None, 1, None]),
    "mean, kept": (lambda x: x.mean(2, keepdim=True), [0, 1, None, 3]),
    "average pool": (lambda x: F.adaptive_avg_pool2d(x, 2), [0, 1, None, None]),
    "reflected": (lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), [0, 1, None, None]),
    "padded by nothing": (lambda x: F.pad(x, (0, 0)), [0, 1, 2, 3]),
    "padded with zeros": (lambda x: F.pad(x, (1, 0)), [None] * 4),
    "sum": (lambda x: x.sum(2), [None] * 4),
    "activation": (torch.relu, [None] * 4),
    "maximum": (lambda x: x.amax(3), [None] * 4),
}


@pytest.mark.parametrize(("function", "axes"), CALLS.values(), ids=CALLS)
def test_an_axis_is_found_behind_a_call(function: Function, axes: list[int | None]) -> None:
    call = call_of(function)
    source = call.all_input_nodes[0]
    assert [carried(call, source, axis) for axis in range(len(SHAPE))] == axes


@pytest.mark.parametrize(("function", "axes"), CALLS.values(), ids=CALLS)
def test_the_call_commutes_with_maps_along_that_axis(
    function: Function, axes: list[int | None]
) -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for axis, later in enumerate(axes):
        if later is not None:
            torch.testing.assert_close(function(scaled(x, axis)), scaled(function(x), later))


def test_an_expanded_axis_is_no_axis_of_channels() -> None:
    call = call_of(lambda x: x[:, :1].expand(-1, 3, -1, -1))
    source = call.all_input_nodes[0]
    assert [carried(call, source, axis) for axis in range(4)] == [0, None, 2, 3]


def test_a_broadcast_value_keeps_its_last_axes() -> None:
    call = call_of(lambda x: x.mean(0).expand(2, 3, 4, 6))
    source = call.all_input_nodes[0]
    assert [carried(call, source, axis) for axis in range(3)] == [1, 2, 3]


def test_an_origin_is_the_way_back() -> None:
    call = call_of(lambda x: x.permute(0, 2, 3, 1))
    source = call.all_input_nodes[0]
    assert [origin(call, axis) for axis in range(4)] == [(source, i) for i in (0, 2, 3, 1)]
    assert origin(source, 1) is None
    assert origin(call_of(lambda x: x.flatten(2)), 2) is None


def test_permutations_in_a_row_are_one() -> None:
    call = call_of(lambda x: x.permute(0, 2, 3, 1).transpose(0, 1).mT)
    root, order = unpermuted(call)
    assert root.op == "placeholder"
    x = torch.rand(SHAPE)
    assert torch.equal(x.permute(order), x.permute(0, 2, 3, 1).transpose(0, 1).mT)
    assert permutation(root) is None
    assert unpermuted(root) == (root, (0, 1, 2, 3))
