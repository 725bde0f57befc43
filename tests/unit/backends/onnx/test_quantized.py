"""Quantised weights in ONNX Runtime's layout, and its kernels on them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelathe.backends.onnx.pack import Layout, layout
from modelathe.ir import LoweringError, Program, capture
from modelathe.ir.quant import QuantizedTensor, QuantType, quantize
from modelathe.passes import PassContext, QuantizeWeights
from modelathe.passes.data import TokenWindows
from modelathe.passes.outputs import graph_inputs, runner
from support.models import canonical
from support.numeric import relative_error
from support.onnx_models import emitted, opened, operators, ran

# bits, group size, symmetric, width of a row
TYPES = [
    (4, 32, False, 96),
    (4, 16, True, 48),
    (8, 32, False, 64),
    (2, 32, False, 64),
    (2, 16, True, 64),  # no fast kernel: 4 bits
    (2, 16, False, 64),
    (2, 256, True, 256),  # too wide for the kernel: two blocks
    (3, 32, False, 64),  # no kernel: 4 bits
    (3, 32, True, 64),
    (4, 96, False, 192),  # three blocks of 32
    (4, 8, False, 40),  # too narrow a group: filled up to 16
    (8, 24, True, 72),
    (4, -1, False, 50),  # rows that no block fills
    (8, -1, True, 384),  # repeated scales
    (3, -1, False, 72),
]


def _quantized(bits: int, group: int, symmetric: bool, width: int) -> QuantizedTensor:
    weight = torch.randn(24, width, generator=torch.Generator().manual_seed(width))
    return quantize(weight, QuantType(bits, group, symmetric))


def _read(stored: Layout, tensor: QuantizedTensor) -> Tensor:
    """Return the weight as ONNX Runtime reads what is stored: its own documentation, word by word.

    The codes of a byte lie low bits first; so do the zero points, ``[n, ceil(blocks * bits / 8)]``.
    """
    codes = _unpacked(stored.codes(tensor.codes), stored.bits)
    blocks = codes.view(codes.shape[0], stored.blocks, stored.block).double()
    scales = stored.scales(tensor.scales).double()
    middle = 2 ** (stored.bits - 1)
    zeros: Any = middle
    if tensor.zeros is not None:
        zeros = _unpacked(stored.zeros(tensor.zeros), stored.bits)[:, : stored.blocks, None]
    return ((blocks - zeros) * scales[..., None]).flatten(1)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(1)


@pytest.mark.parametrize("given", TYPES)
def test_what_is_stored_stands_for_the_same_weight(given: tuple[int, int, bool, int]) -> None:
    tensor = _quantized(*given)
    stored = layout(tensor.qtype, tensor.in_features)
    found = _read(stored, tensor).view(24, stored.groups, stored.filled)
    expected = tensor.dequantize(torch.float64).view(24, stored.groups, stored.group)
    torch.testing.assert_close(found[..., : stored.group], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", TYPES)
def test_layouts_are_legal(given: tuple[int, int, bool, int]) -> None:
    bits, group, symmetric, width = given
    stored = layout(QuantType(bits, group, symmetric), width)
    assert stored.bits in (2, 4, 8)
    assert stored.block >= 16
    assert stored.block & (stored.block - 1) == 0
    assert stored.bits != 2 or 32 <= stored.block <= 128


def test_a_layout_of_ours_is_stored_without_being_touched() -> None:
    tensor = _quantized(4, 32, False, 96)
    stored = layout(tensor.qtype, 96)
    assert stored.codes(tensor.codes) is tensor.codes
    assert tensor.zeros is not None
    assert stored.zeros(tensor.zeros) is tensor.zeros


class _Quantized(nn.Module):
    """A quantised linear with a bias, and an embedding of the same weight."""

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        self.register_buffer("codes", tensor.codes)
        self.register_buffer("scales", tensor.scales)
        self.register_buffer("zeros", tensor.zeros)
        self.register_buffer("bias", torch.linspace(-1, 1, 24))
        self.type = (tensor.qtype.bits, tensor.qtype.group_size, tensor.in_features)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.codes, self.scales, self.zeros
        return (
            torch.ops.modelathe.quantized_linear(x, *weight, self.bias, *self.type),
            torch.ops.modelathe.quantized_embedding(ids, *weight, *self.type),
        )


def _program(given: tuple[int, int, bool, int]) -> Program:
    batch = torch.export.Dim("batch", min=1, max=64)
    model = _Quantized(_quantized(*given)).eval()
    inputs = (torch.zeros(3, 2, given[3]), torch.zeros(3, 2, dtype=torch.int64))
    return capture(model, inputs, ({0: batch}, {0: batch}))


@pytest.mark.parametrize("given", TYPES)
def test_products_and_lookups_agree_with_eager(given: tuple[int, int, bool, int]) -> None:
    made = _program(given)
    session = opened(emitted(made))
    for batch in (1, 4):
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, 2, given[3], generator=generator)
        ids = torch.randint(24, (batch, 2), generator=generator)
        inputs = dict(zip(made.signature.inputs, (x, ids), strict=True))
        expected, found = made.run(inputs), ran(session, inputs)
        for name, value in expected.items():
            assert relative_error(value, found[name]) < 1e-5, name


def test_a_weight_with_both_kinds_of_readers_is_one_initializer() -> None:
    model = emitted(_program((4, 32, False, 96)))
    parts = Counter(str(name).rpartition(".")[2] for name in model.graph.initializers)
    assert (parts["codes"], parts["scales"], parts["zeros"]) == (1, 1, 1)
    (product,) = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert product.inputs[1].producer().op_type == "Reshape"


def test_the_accuracy_level_is_written_out() -> None:
    model = emitted(_program((4, 32, False, 96)), accuracy_level=4)
    (product,) = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert product.attributes["accuracy_level"].value == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_keep_their_dtype(dtype: torch.dtype) -> None:
    tensor = _quantized(4, 32, False, 96)
    narrow = QuantizedTensor(tensor.qtype, 96, tensor.codes, tensor.scales.to(dtype), tensor.zeros)
    model = _Quantized(narrow).to(dtype).eval()
    inputs = (torch.zeros(3, 2, 96, dtype=dtype), torch.zeros(3, 2, dtype=torch.int64))
    made = emitted(capture(model, inputs))
    scales = next(v for name, v in made.graph.initializers.items() if name.endswith("scales"))
    assert scales.dtype.itemsize == 2
    opened(made)


@pytest.mark.parametrize("head_bits", [3, 8])
def test_a_tied_model_stores_the_pair_once(head_bits: int) -> None:
    quantize_weights = QuantizeWeights(bits=4, group_size=16, head_bits=head_bits)
    made = quantize_weights(canonical("gpt2"), PassContext()).program
    model = emitted(made)
    counts = operators(model)
    assert counts["GatherBlockQuantized"] == 1
    assert counts["MatMulNBits"] == 2 * 4 + 1
    shapes = [tuple(v.shape) for v in model.graph.initializers.values() if v.dtype.itemsize == 1]
    codes = [shape for shape in shapes if shape[:1] == (48,) and shape[-1] > 4]
    assert codes == [(48, 32 * max(head_bits, 4) // 8)]  # 3 bits are stored as 4


def test_structured_outliers_are_a_gather_and_a_thin_product() -> None:
    windows = TokenWindows.of(torch.arange(24).view(2, 12), "test")
    made = QuantizeWeights(bits=3, group_size=-1, outliers=0.1, only=("h.0",), iterations=2)
    program = made(canonical("gpt2"), PassContext(calibration=windows)).program
    inputs = graph_inputs(program, "main", windows.tokens, runner(program))
    model = emitted(program)
    expected, found = program.run(inputs), ran(opened(model), inputs)
    for name, value in expected.items():
        assert relative_error(value, found[name]) < 1e-5, name
    stored = {str(name): value.shape for name, value in model.graph.initializers.items()}
    assert sum(name.endswith("outlier_columns") for name in stored) == 4


def test_unstructured_outliers_are_refused_with_the_remedy() -> None:
    windows = TokenWindows.of(torch.arange(24).view(2, 12), "test")
    made = QuantizeWeights(
        bits=3, group_size=-1, outliers=0.1, outlier_kind="unstructured", only=("h.0.attn",)
    )
    program = made(canonical("gpt2"), PassContext(calibration=windows)).program
    with pytest.raises(LoweringError, match=r"single entries @.*outlier_values") as refused:
        emitted(program)
    assert "outlier-kind=structured" in refused.value.remedy
