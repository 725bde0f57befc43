"""What writes a residual stream, what sees its mean, and writers without one."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import Norm, Program, call_name
from modelathe.passes import QuantizeWeights
from modelathe.passes.norms.residual import (
    Stream,
    center_writers,
    find_streams,
    other_reader,
    writers,
)
from support.feeds import feed
from support.models import canonical
from support.small import small
from support.views import views

F = nn.functional


def last_norm(found: Program) -> Norm:
    return views(Norm, found)[-1]


def calls(stream: Stream) -> list[str]:
    return sorted(call_name(writer.node) for writer in stream.writers)


class Net(nn.Module):
    """A norm behind whatever ``form`` makes of the input."""

    def __init__(self, form: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.table, self.scale = nn.Parameter(torch.ones(3, 8)), nn.Parameter(torch.ones(8))
        self.norm, self.head = nn.LayerNorm(8, bias=False), nn.Linear(8, 8)
        self.patches = nn.Conv2d(2, 8, 2, stride=2)
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(F.layer_norm(self.form(self, x), [8]))
        return result


def summed(m: Net, x: Tensor) -> Tensor:
    return m.first(x) + m.second(x).relu() @ m.second.weight.t()


def moved(m: Net, x: Tensor) -> Tensor:
    y = torch.cat([m.first(x), 0.5 * m.second(x)], 1).reshape(3, 4, 8).transpose(0, 1)
    return y[:, 1:] / 3.0


def with_table(m: Net, x: Tensor) -> Tensor:
    return m.first(x) + m.table


def per_token(m: Net, x: Tensor) -> Tensor:
    return m.first(x) * x[..., :1]


def behind_bare_norm(m: Net, x: Tensor) -> Tensor:
    return F.layer_norm(x, [8]) + m.first(x)


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (summed, ["aten.linear", "aten.linear"]),
        (moved, ["aten.linear", "aten.linear"]),
        (with_table, ["aten.add.Tensor", "aten.linear"]),
        (per_token, ["aten.linear"]),
        (behind_bare_norm, ["aten.linear"]),
    ],
)
def test_writers_are_found(form: Callable[[Net, Tensor], Tensor], found: list[str]) -> None:
    stream = writers(last_norm(small(lambda: Net(form))))
    assert (stream.reason, calls(stream)) == ("", found)


def test_patches_are_written_by_a_convolution() -> None:
    def form(m: Net, x: Tensor) -> Tensor:
        result: Tensor = m.patches(x).flatten(2).transpose(1, 2)
        return result

    stream = writers(last_norm(small(lambda: Net(form), torch.ones(2, 2, 4, 4))))
    assert (stream.reason, calls(stream)) == ("", ["aten.conv2d"])


def grouped(m: Net, x: Tensor) -> Tensor:
    result: Tensor = m.grouped(x.transpose(1, 2)).transpose(1, 2)
    return result


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (lambda m, x: x + m.first(x), r"%x \(input x\) writes it"),
        (lambda m, x: m.first(x).relu(), r"%relu \(aten.relu\) writes it"),
        (lambda m, x: m.first(x) * m.scale, r"%mul \(aten.mul.Tensor\) writes it"),
        (lambda m, x: m.first(x) * m.second(x), r"%mul \(aten.mul.Tensor\) writes it"),
        (lambda m, x: m.first(x) + 1, r"%add \(aten.add.Tensor\) writes it"),
        (lambda m, x: m.first(x) + x[..., :1], r"%add \(aten.add.Tensor\) writes it"),
        (lambda m, x: 1 / m.first(x), r"%\w+ \(aten.\w+(.Tensor)?\) writes it"),
        (lambda m, x: torch.cat([m.first(x)[..., :4], x[..., :4]], -1), r"\(aten.cat\) writes it"),
        (lambda m, x: m.first(x)[..., [1, 0, 2, 3, 4, 5, 6, 7]], r"\(aten.index.Tensor\) writes"),
        (lambda m, x: m.norm(x), r"%layer_norm \(aten.layer_norm\) writes it, whose gain or bias"),
        (
            lambda m, x: F.rms_norm(m.first(x), [8]),
            r"\(aten.rms_norm\) writes it, and sees the mean",
        ),
        (grouped, r"\(aten.conv1d\) writes it"),
    ],
)
def test_what_has_a_mean_of_its_own_is_named(
    form: Callable[[Net, Tensor], Tensor], reason: str
) -> None:
    stream = writers(last_norm(small(lambda: Net(form))))
    assert re.search(reason, stream.reason)


def test_quantised_writers_are_refused() -> None:
    found = QuantizeWeights(group_size=8)(small(lambda: Net(lambda m, x: m.first(x)))).program
    assert writers(last_norm(found)).reason.endswith("writes it, which is quantised already")


def test_weights_that_are_to_be_left_are_listed_apart() -> None:
    stream = writers(last_norm(canonical("tied-blocks")), {"embed.weight"})
    assert calls(stream) == ["aten.linear", "aten.linear"]
    (left,) = stream.left
    assert (call_name(left.node), left.axis) == ("aten.embedding", 1)


def test_norms_that_see_one_stream_are_together() -> None:
    (stream,) = find_streams(canonical("gpt2"))
    assert [norm.node.name for norm in stream.norms] == [
        norm.node.name for node in canonical("gpt2").graph.nodes if (norm := Norm.match(node))
    ]
    assert len(stream.writers) == 2 + 4
    assert not stream.reason
    assert other_reader(stream) is None


class Branches(nn.Module):
    """Two streams with norms of their own, and a norm of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x), self.second(x)
        parts = F.layer_norm(left, [8]).relu() + F.layer_norm(right, [8]).relu()
        result: Tensor = self.head(F.layer_norm(left + right, [8])) + parts
        return result


def test_streams_that_meet_are_one() -> None:
    (stream,) = find_streams(small(Branches))
    assert [norm.node.name for norm in stream.norms] == [
        "layer_norm",
        "layer_norm_1",
        "layer_norm_2",
    ]
    assert len(stream.writers) == 2


def linear_reader(m: Net, x: Tensor) -> Tensor:
    """A linear that writes the stream reads it, too, without a norm."""
    y = m.first(x)
    result: Tensor = y + m.second(y)
    return result


def test_a_writer_that_reads_the_stream_sees_its_mean() -> None:
    (stream,) = find_streams(small(lambda: Net(linear_reader)))
    other = other_reader(stream)
    assert other is not None
    assert call_name(other) == "aten.linear"


class Returned(Net):
    """The stream is an output, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.first(x)
        return self.norm(y), y


def test_an_output_sees_the_mean() -> None:
    (stream,) = find_streams(small(lambda: Returned(summed)))
    other = other_reader(stream)
    assert other is not None
    assert other.op == "output"


def test_centred_writers_make_a_stream_without_a_mean() -> None:
    found = canonical("gpt2").editable()
    (stream,) = find_streams(found)
    center_writers(found, stream.writers)
    means: list[float] = []

    def observe(node: object, value: Tensor) -> None:
        if any(norm.input is node for norm in stream.norms):
            means.append(float(value.mean(-1).abs().max() / value.abs().max()))

    found.run(feed(found), observe=observe, dtype=torch.float64)
    assert len(means) == len(stream.norms)
    assert max(means) <= 1e-15
