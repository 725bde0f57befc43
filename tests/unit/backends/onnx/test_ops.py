"""Single operators: ONNX Runtime against torch, at the oldest and the newest opset.

All cases are outputs of one module, so that there is one capture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from modelathe.ir import Program, capture
from support.onnx_models import emitted, opened, operators, ran

LIMIT = 1e-5  # single operators on numbers of size 1


class Given:
    """What cases read: ``x [b, 3, 6]``, an image ``[b, 4, 6, 6]``, whole numbers ``[b, 3]``."""

    def __init__(self, x: Tensor, image: Tensor, whole: Tensor, module: Operators) -> None:
        self.x, self.image, self.whole, self.w = x, image, whole, module
        self.heads = x.view(x.shape[0], 3, 2, 3).transpose(1, 2)  # [b, 2, 3, 3]


def _attend(g: Given, **options: object) -> Tensor:
    result: Tensor = functional.scaled_dot_product_attention(
        g.heads, 2 * g.heads, g.heads, **options
    )
    return result


def _rotary(g: Given, interleaved: bool, own: bool = False, width: int = 6) -> Tensor:
    """Turn channels of the image, ``[b, 4 heads, 6 places, 6 numbers]``.

    Args:
        g: what there is.
        interleaved: pairs are neighbours.
        own: every row of the batch has its own angles.
        width: how many channels are turned.
    """
    angles = g.image[:, 0, :, : width // 2] if own else g.w.shared[None, :, : width // 2]
    result: Tensor = torch.ops.modelathe.rotary(g.image, angles.cos(), angles.sin(), interleaved)
    return result


_EYE = torch.eye(3, dtype=torch.bool)
CASES: Mapping[str, Callable[[Given], Tensor]] = {
    "arithmetic of mixed dtypes": lambda g: (g.whole * 1.5 + (g.whole > 2)) * 2 - g.whole / 3,
    "add and subtract with alpha": lambda g: torch.sub(torch.add(g.x, g.x, alpha=2), 1, alpha=3),
    "reverse subtraction": lambda g: 1 - g.x,
    "integer division": lambda g: (
        (g.whole - 9) // 4 + torch.div(9 - g.whole, 4, rounding_mode="trunc")
    ),
    "remainders": lambda g: (
        (g.whole - 9) % 4 + torch.remainder(g.x, 0.7)[..., 0] + g.x[..., 1] // 0.3
    ),
    "powers": lambda g: g.x.abs() ** 1.5 + 2.0**g.x + g.x.square() + g.x.abs().sqrt() + g.x**2,
    "functions": lambda g: (
        g.x.sin() + g.x.exp() + g.x.abs().log1p() + g.x.rsqrt().nan_to_num(0, 0, 0)
    ),
    "activations": lambda g: (
        functional.gelu(g.x)
        + functional.gelu(g.x, approximate="tanh")
        + functional.silu(g.x)
        + functional.hardtanh(g.x)
        + functional.relu6(g.x * 5)
        + functional.softplus(g.x, 2.0)
        + functional.elu(g.x)
    ),  # from torchlib
    "activations of torchlib": lambda g: (
        functional.mish(g.x)
        + functional.leaky_relu(g.x, 0.2)
        + functional.hardswish(g.x)
        + functional.glu(g.x, -1).sum()
    ),
    "comparisons": lambda g: (g.x > 0) == (g.x.round() != 1),
    "logic": lambda g: ~(g.x > 0) & (g.x < 1) | ((g.x > 2) ^ (g.x < -1)),
    "bits": lambda g: ((g.whole & 3) | (g.whole ^ 1)) + ~g.whole,
    "choices": lambda g: torch.where(g.x > 0, g.x, 0) + g.x.masked_fill(g.x < 0, -1),
    "clamping": lambda g: g.x.clamp(-0.5, 0.5) + g.x.clamp(min=0) + g.x.clamp(max=g.w.row[0]),
    "conversion": lambda g: (
        g.x.int().float() + g.x.bool() + g.whole.to(torch.float64).sum().float()
    ),
    "sums": lambda g: g.x.sum(-1) + g.x.mean((0, 1), keepdim=True)[0, :, 0] + (g.x > 0).sum(-1),
    "extremes": lambda g: (
        g.x.amax(-1) + g.x.max(-1)[0] + g.x.min(-1)[1] + g.x.max() + g.x.argmax(-1)
    ),
    "any and all": lambda g: (g.x > 0).any(-1) | (g.x < 0).all(-1) | (g.x > 9).any(),
    "variance": lambda g: g.x.var(-1) + g.x.std((0, 2))[None] + g.x.var(1, correction=0)[:, :3],
    "running sums": lambda g: g.x.cumsum(1) + (g.x > 0).cumsum(-1),
    "ordering": lambda g: g.x.topk(2, -1)[0] + g.x.sort(-1, descending=True)[1][..., :2],
    "softmax": lambda g: (
        g.x.softmax(1) + g.x.log_softmax(-1) + g.x.softmax(-1, dtype=torch.float64)
    ),
    "layer norm": lambda g: (
        functional.layer_norm(g.x, (6,), g.w.row, g.w.row, 1e-3)
        + functional.layer_norm(g.x, (3, 6))
    ),
    "rms norm": lambda g: (
        functional.rms_norm(g.x, (6,), g.w.row, 1e-3) + functional.rms_norm(g.x, (6,))
    ),
    "group norm": lambda g: functional.group_norm(g.image, 2, g.w.row[:4], g.w.row[:4]),
    "batch norm": lambda g: functional.batch_norm(
        g.image, g.w.row[:4], g.w.row[:4] ** 2 + 1, g.w.row[2:]
    ),
    "products": lambda g: torch.baddbmm(g.x[..., :3], g.x, g.x.mT, beta=0.5, alpha=2.0) @ g.x,
    "addmm": lambda g: torch.addmm(g.w.row[:4], g.x[0], g.w.matrix.T, alpha=0.5),
    "linear": lambda g: functional.linear(g.x, g.w.matrix, g.w.row[:4]),
    "a linear with a computed weight": lambda g: functional.linear(g.x, g.x[0]),
    "a weight with two readers": lambda g: functional.linear(g.x, g.w.shared) + g.w.shared[0],
    "einsum": lambda g: torch.einsum("bij, kj -> bki", g.x, g.w.matrix),
    "embedding": lambda g: functional.embedding(g.whole, g.w.table),
    "convolution": lambda g: functional.conv2d(g.image, g.w.kernel, g.w.row, stride=2, padding=1),
    "same convolution": lambda g: functional.conv2d(
        g.image, g.w.kernel, padding="same", dilation=2
    ),
    "convolution in one dimension": lambda g: functional.conv1d(g.x, g.w.kernel[:, :3, 0]),
    "turned convolution": lambda g: functional.conv_transpose2d(
        g.image, g.w.kernel.transpose(0, 1)[:, :2].contiguous(), stride=2, output_padding=1
    ),
    "pooling": lambda g: functional.max_pool2d(g.image, 2) + functional.avg_pool2d(g.image, 2),
    "adaptive pooling": lambda g: (
        functional.adaptive_avg_pool2d(g.image, 1) + functional.adaptive_avg_pool2d(g.image, (2, 3))
    ),
    "upsampling": lambda g: functional.interpolate(g.image, size=(9, 7), mode="bilinear"),
    "attention": lambda g: _attend(g, scale=0.3),
    "attention with a mask": lambda g: _attend(g, attn_mask=(g.heads[..., :1] > 0) | _EYE),
    "attention with a short mask": lambda g: _attend(g, attn_mask=g.heads[:, :, :1] > -9),
    "attention with a bias": lambda g: _attend(g, attn_mask=g.x[:, None, :, :3]),
    "causal attention": lambda g: _attend(g, is_causal=True),
    "attention without heads": lambda g: functional.scaled_dot_product_attention(g.x, g.x, g.x),
    "grouped attention": lambda g: functional.scaled_dot_product_attention(
        torch.cat([g.heads, g.heads], 1), g.heads, g.heads, enable_gqa=True
    ),
    "rotary of halves": lambda g: _rotary(g, False),
    "rotary of neighbours": lambda g: _rotary(g, True),
    "rotary of halves of a part": lambda g: _rotary(g, False, own=True, width=4),
    "rotary of neighbours of a part": lambda g: _rotary(g, True, own=True, width=2),
    "rotary in float64": lambda g: torch.ops.modelathe.rotary(
        g.image.double(), g.image[:, 0, :, :3], g.image[:, 1, :, :3], True
    ),
    "views": lambda g: g.x.view(-1, 2, 9).reshape(g.x.shape[0], 18).unflatten(1, (9, 2)).flatten(1),
    "axes": lambda g: g.x.movedim(1, 2).unsqueeze(1).squeeze(1).permute(0, 2, 1).mT.flip(1, 2),
    "expansion": lambda g: g.x[:, :1].expand(-1, 4, -1) + g.w.row.expand(g.x.shape[0], 4, 6),
    "slices": lambda g: g.x[:, -2:, ::2] + g.x[:, :-1, 1::2][:, :2] + g.x[:, 1:, -1:],
    "splits": lambda g: sum(g.x.split([2, 4], -1)[1].chunk(2, -1)) + g.x.unbind(-1)[3][..., None],
    "joins": lambda g: torch.cat([g.x, torch.stack([g.whole, g.whole], -1)], -1),
    "repetition": lambda g: g.x.repeat(2, 1, 3) + g.x.repeat_interleave(3, 2).tile(2, 1, 1),
    "rolls": lambda g: g.x.roll(1, 1).roll((2, -1), (1, 2)),
    "padding": lambda g: (
        functional.pad(g.x, (1, 2, 0, 1), value=3.0)[:, :3]
        + functional.pad(g.x, (2, 1), mode="reflect")
    ),
    "triangles": lambda g: g.x.tril() + g.x.triu(1) + torch.ones(3, 6).tril(-1),
    "ranges": lambda g: torch.arange(g.x.shape[0]) + torch.arange(0, 2 * g.x.shape[0], 2),
    "constants": lambda g: (
        g.x[..., :3] + torch.eye(3) + torch.linspace(0, 1, 3) + torch.full((3,), 2)
    ),
    "filled": lambda g: (
        torch.zeros_like(g.x) + g.x.new_ones(g.x.shape[0], 1, 1) + g.x.new_full((6,), 3)
    ),
    "indices": lambda g: g.x[:, g.w.index] + g.x[:, g.w.index, :][:, [0, 1, 2]],
    "joint indices": lambda g: g.x[:, g.w.index, g.w.index],
    "distant indices": lambda g: g.x[g.w.index * 0, :, g.w.index],
    "gathering": lambda g: g.x.gather(2, g.whole[..., None] % 6) + g.x.index_select(1, g.w.index),
    "scattering": lambda g: torch.zeros_like(g.x).scatter(2, g.x.argsort(2), g.x),
    "adding at indices": lambda g: g.x.index_add(1, g.w.index, g.x),  # taken apart by torch
    "replacing": lambda g: (
        torch.slice_scatter(g.x, 2 * g.x[:, :2], 1, 1, 3)
        + torch.select_scatter(g.x, g.x[:, 0], 1, -1)
    ),
    "one hot": lambda g: functional.one_hot(g.whole, 24),
    "grids": lambda g: torch.stack(torch.meshgrid(g.x[0, 0], g.x[0, 1], indexing="ij"), -1),
    "norms": lambda g: (
        torch.linalg.vector_norm(g.x, dim=-1) + functional.normalize(g.x, dim=-1)[..., 0]
    ),
    "a fraction of a size": lambda g: g.x * (g.x.shape[0] / 3) + g.x.shape[0] ** 0.5,
}


class Operators(nn.Module):
    """Every case of ``CASES``, one output each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def random(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(sizes, generator=generator), requires_grad=False)

        self.row, self.matrix, self.table = random(6), random(4, 6), random(24, 6)
        self.shared, self.kernel = random(6, 6), random(6, 4, 3, 3)
        self.register_buffer("index", torch.tensor([2, 0, 1]))

    def forward(self, x: Tensor, image: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
        given = Given(x, image, whole, self)
        return tuple(case(given) for case in CASES.values())


def _inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    sizes = ((batch, 3, 6), (batch, 4, 6, 6))
    x, image = (torch.randn(size, generator=generator) for size in sizes)
    return x, image, torch.randint(0, 24, (batch, 3), generator=generator)


@functools.cache
def _program() -> Program:
    dynamic = torch.export.Dim("batch", min=1, max=64)
    return capture(Operators().eval(), _inputs(3), ({0: dynamic},) * 3)


@functools.cache
def _results(opset: int, batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what torch and what ONNX Runtime make of every case."""
    made, inputs = _program(), _inputs(batch)
    expected = Operators()(*inputs)
    named = dict(zip(made.signature.inputs, inputs, strict=True))
    found = ran(opened(emitted(made, opset=opset)), named)
    return (
        dict(zip(CASES, expected, strict=True)),
        dict(zip(CASES, found.values(), strict=True)),
    )


def test_rotary_embeddings_are_single_nodes() -> None:
    assert operators(emitted(_program()))["RotaryEmbedding"] == 4
    assert operators(emitted(_program(), opset=18))["RotaryEmbedding"] == 0


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("name", CASES)
def test_operators_compute_what_torch_does(name: str, opset: int) -> None:
    for batch in (1, 3):
        expected, found = (results[name] for results in _results(opset, batch))
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=LIMIT, atol=LIMIT)
