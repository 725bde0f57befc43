"""Which ways to write rotary positions become one call, and which look alike and do not.

All forms are outputs of one module, so that there is one capture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from modelathe.ir import Program, Rotary, call_name, capture
from modelathe.passes import Canonicalize
from support.numeric import relative_error, rounding

EXACT = 1e-12  # sums of two products in float64
Form = Callable[[Tensor, Tensor], Tensor]


def turn_halves(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def turn_neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def doubled(angles: Tensor) -> Tensor:
    return torch.cat((angles, angles), dim=-1)


def halves(x: Tensor, angles: Tensor) -> Tensor:
    """Llama's."""
    cos, sin = doubled(angles).cos().unsqueeze(1), doubled(angles).sin().unsqueeze(1)
    return x * cos + turn_halves(x) * sin


def neighbours(x: Tensor, angles: Tensor, axis: int = 1) -> Tensor:
    """GPT-J's and Cohere's."""
    twice = angles.repeat_interleave(2, dim=-1)
    cos, sin = twice.cos().unsqueeze(axis), twice.sin().unsqueeze(axis)
    return x * cos + turn_neighbours(x) * sin


def glm(x: Tensor, angles: Tensor) -> Tensor:
    """Neighbours, with the angles of halves cut and repeated."""
    twice = (doubled(angles).cos(), doubled(angles).sin())
    cos, sin = (each.unsqueeze(1)[..., :4].repeat_interleave(2, dim=-1) for each in twice)
    return x * cos + turn_neighbours(x) * sin


def scaled(x: Tensor, angles: Tensor) -> Tensor:
    """Angles in another dtype, with the factor that YaRN has, and all sums the other way round."""
    wide = doubled(angles).double()
    cos, sin = ((1.3 * each).to(x.dtype).unsqueeze(1) for each in (wide.cos(), wide.sin()))
    return (sin * turn_halves(x)) + (cos * x)


def chunks(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = (torch.stack((a, a), dim=-2).flatten(-2) for a in (angles.cos(), angles.sin()))
    return x * cos[:, None] + torch.cat((second.neg(), first), dim=-1) * sin[:, None]


def part(form: Form) -> Form:
    """Turn the first four channels, as GPT-NeoX and Phi do."""
    return lambda x, angles: torch.cat((form(x[..., :4], angles[..., :2]), x[..., 4:]), dim=-1)


def split_part(x: Tensor, angles: Tensor) -> Tensor:
    turned, rest = x.split([4, 4], dim=-1)
    return torch.cat((halves(turned, angles[..., :2]), rest), dim=-1)


def gptj(x: Tensor, angles: Tensor) -> Tensor:
    """A part of neighbours, with the heads behind the tokens."""
    form = part(functools.partial(neighbours, axis=2))
    return form(x.transpose(1, 2), angles).transpose(1, 2)


def two_blocks(x: Tensor, angles: Tensor) -> Tensor:
    """Unsqueeze the same angles two times."""
    cos, sin = doubled(angles).cos(), doubled(angles).sin()
    for _ in range(2):
        x = x * cos.unsqueeze(1) + turn_halves(x) * sin.unsqueeze(1)
    return x


RAISED: dict[str, tuple[Form, bool, int]] = {
    "halves": (halves, False, 8),
    "neighbours": (neighbours, True, 8),
    "neighbours with angles of halves": (glm, True, 8),
    "scaled angles": (scaled, False, 8),
    "halves as chunks": (chunks, False, 8),
    "one row of angles for all": (lambda x, angles: halves(x, angles[:1]), False, 8),
    "a part of halves": (part(halves), False, 4),
    "a part of neighbours": (part(neighbours), True, 4),
    "a part that was split off": (split_part, False, 4),
    "heads behind tokens": (gptj, True, 4),
    "two blocks": (two_blocks, False, 8),
}


def joined(*order: int) -> Form:
    """Join the turned part with other parts than the rest."""

    def form(x: Tensor, angles: Tensor) -> Tensor:
        turned, rest = halves(x[..., :4], angles[..., :2]), x[..., 4:]
        parts = (turned, rest, x[..., :4], torch.cat((rest[:, 1:], rest[:, :1]), dim=1))
        return torch.cat([parts[place] for place in order], dim=-1)

    return form


def also_read(x: Tensor, angles: Tensor) -> Tensor:
    turned = halves(x[..., :4], angles[..., :2])
    return torch.cat((turned, x[..., 4:]), dim=-1) * doubled(turned)


JOINED: dict[str, Form] = {
    "the rest in front": joined(1, 0),
    "the turned ones again": joined(0, 2),
    "the rest of other heads": joined(0, 3),
    "the rest two times": joined(0, 1, 1),
    "read by others, too": also_read,
}


def unlike(turned: Callable[[Tensor], Tensor], pair: Callable[[Tensor], Tensor] = doubled) -> Form:
    """Return a form with another vector for the sine, or other angles for a pair."""

    def form(x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = pair(angles).cos().unsqueeze(1), pair(angles).sin().unsqueeze(1)
        return x * cos + turned(x) * sin

    return form


def angles_of_heads(x: Tensor, angles: Tensor) -> Tensor:
    twice = doubled(angles[:, None] * torch.arange(1, 5)[:, None, None])
    return x * twice.cos() + turn_halves(x) * twice.sin()


def half_a_sine(x: Tensor, angles: Tensor) -> Tensor:
    sin = torch.cat((angles.sin(), angles.sin() * 0.5), dim=-1)
    return x * doubled(angles).cos().unsqueeze(1) + turn_halves(x) * sin.unsqueeze(1)


def weighted(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = doubled(angles).cos().unsqueeze(1), doubled(angles).sin().unsqueeze(1)
    return torch.add(x * cos, turn_halves(x) * sin, alpha=2)


def difference(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = doubled(angles).cos().unsqueeze(1), doubled(angles).sin().unsqueeze(1)
    return x * cos - turn_halves(x) * sin


KEPT: dict[str, Form] = {
    "the other way round": unlike(lambda x: -turn_halves(x)),
    "no minus": unlike(lambda x: torch.cat((x[..., 4:], x[..., :4]), dim=-1)),
    "two minuses": unlike(lambda x: torch.cat((-x[..., 4:], -x[..., :4]), dim=-1)),
    "halves in place": unlike(lambda x: torch.cat((-x[..., :4], x[..., 4:]), dim=-1)),
    "one half two times": unlike(lambda x: torch.cat((-x[..., 4:], x[..., 4:]), dim=-1)),
    "cut elsewhere": unlike(lambda x: torch.cat((-x[..., 5:], x[..., :5]), dim=-1)),
    "another vector": unlike(lambda x: turn_halves(x * 2)),
    "another head": unlike(lambda x: turn_halves(torch.cat((x[:, 1:], x[:, :1]), dim=1))),
    "neighbours by angles of halves": unlike(turn_neighbours),
    "halves by angles of neighbours": unlike(turn_halves, lambda a: a.repeat_interleave(2, -1)),
    "angles of a pair differ": unlike(turn_halves, lambda a: torch.cat((a, a + 1), dim=-1)),
    "angles of a pair have two signs": unlike(turn_halves, lambda a: torch.cat((a, -a), dim=-1)),
    "angles of a pair have two places": unlike(
        turn_halves, lambda a: torch.cat((a, a[..., 2:], a[..., :2]), dim=-1)
    ),
    "angles of a pair have two sines": half_a_sine,
    "heads have their own angles": angles_of_heads,
    "a difference": difference,
    "a weighted sum": weighted,
}
FORMS = {name: form for name, (form, *_) in RAISED.items()} | JOINED | KEPT


class Forms(nn.Module):
    """All forms of heads ``[b, 4, t, 8]`` and an angle for each pair, ``[b, t, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1.0, 0.3, 0.1, 0.03]))

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        angles = positions[..., None] * self.frequencies
        return tuple(form(x, angles) for form in FORMS.values())


def example(dtype: torch.dtype, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 4, tokens, 8, generator=generator).to(dtype)
    return x, torch.randint(100, (rows, tokens), generator=generator)


@functools.cache
def programs(dtype: torch.dtype = torch.float32) -> tuple[Program, Program]:
    """Return all forms as they are captured, and in canonical form."""
    rows, tokens = (torch.export.Dim(name, min=1, max=64) for name in ("rows", "tokens"))
    sizes = ({0: rows, 2: tokens}, {0: rows, 1: tokens})
    before = capture(Forms().eval(), example(dtype, 2, 3), sizes)
    return before, Canonicalize()(before).program


@functools.cache
def outputs(
    number: int, rows: int, tokens: int, dtype: torch.dtype, compute: torch.dtype | None
) -> dict[str, Tensor]:
    """Return what the program as it was, or the canonical one, makes of every form."""
    found = programs(dtype)[number]
    inputs = dict(zip(found.signature.inputs, example(dtype, rows, tokens), strict=True))
    return dict(zip(FORMS, found.run(inputs, dtype=compute).values(), strict=True))


def end_of(case: str, dtype: torch.dtype = torch.float32) -> fx.Node:
    """Return the call that a form ends with in the canonical program."""
    results: Any = programs(dtype)[1].graph.output_node().args[0]
    return dict(zip(FORMS, results, strict=True))[case]


def behind(node: fx.Node) -> set[fx.Node]:
    """Return a call and those that its value is made of."""
    seen, waiting = {node}, [node]
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if n not in seen]
        seen.update(new)
        waiting += new
    return seen


def rotaries(found: Any) -> list[Rotary]:
    return [view for node in found if (view := Rotary.match(node))]


@pytest.mark.parametrize("case", FORMS)
def test_values_are_kept(case: str) -> None:
    for rows, tokens in ((2, 3), (1, 1), (3, 5)):
        given = (rows, tokens, torch.float32, torch.float64)
        assert relative_error(outputs(0, *given)[case], outputs(1, *given)[case]) <= EXACT


@pytest.mark.parametrize("case", RAISED)
def test_a_sum_becomes_one_call(case: str) -> None:
    view = Rotary.match(end_of(case))
    assert view is not None
    assert (view.interleaved, view.turned) == RAISED[case][1:]
    assert [view.input.meta["val"].shape[axis] for axis in (1, 3)] == [4, 8]
    kinds = {call_name(node) for node in behind(view.node) if node.op == "call_function"}
    assert not kinds & {
        "aten.neg",
        "aten.add.Tensor",
        "aten.cat",
        "aten.repeat_interleave.self_int",
    }


def test_angles_are_halved_once_for_all_that_read_them() -> None:
    first, second = rotaries(behind(end_of("two blocks")))
    assert (first.cos, first.sin) == (second.cos, second.sin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("case", "wide"), [("scaled angles", False), ("halves", True)])
def test_a_call_computes_in_the_dtype_of_the_sum(case: str, wide: bool, dtype: torch.dtype) -> None:
    (view,) = rotaries([end_of(case, dtype)])
    for node in (view.node, view.cos):
        assert node.meta["val"].dtype == (torch.float32 if wide else dtype)
    before, after = (outputs(number, 2, 3, dtype, None)[case] for number in (0, 1))
    assert before.dtype == after.dtype
    assert relative_error(before, after) <= rounding(after.dtype, steps=4)


@pytest.mark.parametrize("case", JOINED)
def test_a_part_that_is_joined_otherwise_is_raised_alone(case: str) -> None:
    (view,) = rotaries(behind(end_of(case)))
    assert view.input.meta["val"].shape[-1] == view.turned == 4


@pytest.mark.parametrize("case", KEPT)
def test_what_looks_alike_is_left_alone(case: str) -> None:
    assert not rotaries(behind(end_of(case)))
