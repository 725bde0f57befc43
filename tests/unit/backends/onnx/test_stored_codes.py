"""What a file holds, read by ``onnx`` alone, is what the pass computed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from modelathe.backends import Onnx
from modelathe.ir import Program, QuantizedLinear
from modelathe.passes import QuantizeWeights
from modelathe.passes.quantization.store import Stored
from support.models import canonical, context

# 24 fills one and a half blocks, so that it is stored with gaps
TYPES = list(itertools.product([2, 3, 4, 8], [-1, 16, 24], [False, True]))


def quantized(bits: Any, group: int, symmetric: bool) -> Program:
    """Return a model with one quantised linear, 48 wide."""
    pass_ = QuantizeWeights(
        bits=bits,
        group_size=group,
        symmetric=symmetric,
        method="gptq-quantease",
        iterations=2,
        only=("layers.0.mlp.down_proj",),
    )
    return pass_(canonical("llama"), context()).program


def computed(program: Program) -> Tensor:
    """Return what the quantised linear's codes stand for."""
    (call,) = filter(None, map(QuantizedLinear.match, program.graph.nodes))
    return Stored.of(program, call).load().dequantize()


def read(path: Path, groups: int) -> Tensor:
    """Return the weight of a file's only product, as ONNX Runtime documents its parts.

    The codes of a byte lie low bits first; so do the zero points, ``[N, ceil(blocks * bits / 8)]``.
    """
    model = onnx.load(path)
    (node,) = (node for node in model.graph.node if node.op_type == "MatMulNBits")
    given = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in model.graph.initializer}
    codes, scales = (tensors[name].reshape(given["N"], -1) for name in node.input[1:3])
    numbers = unpacked(codes, given["bits"]).view(given["N"], -1, given["block_size"])
    zeros: Any = 2 ** (given["bits"] - 1)
    if len(node.input) > 3 and node.input[3]:
        packed = tensors[node.input[3]].view(given["N"], -1)
        zeros = unpacked(packed, given["bits"])[:, : numbers.shape[1], None]
    weight = (numbers - zeros) * scales.unsqueeze(-1)
    return weight.reshape(given["N"], groups, -1)[..., : 48 // groups].flatten(1)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(1).float()


@pytest.mark.parametrize("given", TYPES)
def test_every_number_is_bit_for_bit_what_was_computed(given: Any, tmp_path: Path) -> None:
    program = quantized(*given)
    Onnx().lower(program, check=False).save(tmp_path / "out")
    groups = 1 if given[1] == -1 else 48 // given[1]
    assert read(tmp_path / "out" / "model.onnx", groups).equal(computed(program))


def test_codes_that_take_more_bits_than_asked_for_are_a_remark(tmp_path: Path) -> None:
    remarks = {}
    for bits in (3, 4):
        manifest = Onnx().lower(quantized(bits, -1, False), check=False).save(tmp_path / str(bits))
        remarks[bits] = manifest.get("remarks")
    told = "stored in 4 bits: ONNX Runtime has no fast kernel for them"
    assert remarks == {3: [f"missed: 1 weights of 3 bits per row: {told}"], 4: None}
