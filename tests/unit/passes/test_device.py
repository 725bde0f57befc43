"""Work on a GPU comes to what it comes to on the CPU, and what it makes lies in memory."""

from __future__ import annotations

import functools

import pytest
import torch

from modelathe.ir import QuantizedLinear
from modelathe.passes import Pipeline, PipelineResult, QuantizeWeights
from modelathe.passes.quantization.store import Stored
from support.models import context, program
from support.views import views

pytestmark = pytest.mark.gpu


@functools.cache
def quantized(device: str) -> PipelineResult:
    """Choose the codes of a tiny decoder, and measure its fidelity, on a device."""
    passes = [QuantizeWeights(method="gptq", bits=3, group_size=8)]
    return Pipeline(passes, context=context(device=device))(program("llama"))


def codes(device: str) -> list[torch.Tensor]:
    """Return the codes of all linears, less those of zero: scales differ in their last bits."""
    found = quantized(device).program
    stored = [Stored.of(found, call).load() for call in views(QuantizedLinear, found)]
    return [tensor.levels(torch.float32) for tensor in stored]


def test_the_work_is_done_there() -> None:
    quantized("cuda")
    assert torch.cuda.max_memory_allocated() > 0


def test_text_chooses_the_same_codes_but_for_a_few() -> None:
    pairs = list(zip(codes("cuda"), codes("cpu"), strict=True))
    assert len(pairs) == 2 * 7 + 1
    same = sum(int((there == here).sum()) for there, here in pairs)
    # sums in another order tip a number that lies between two codes, and the columns behind it
    assert same >= 0.98 * sum(here.numel() for _, here in pairs)


def test_fidelity_is_the_same() -> None:
    there, here = (quantized(device).measured for device in ("cuda", "cpu"))
    assert here.kl is not None
    assert there.kl == pytest.approx(here.kl, rel=0.05)
    assert there.tokens == here.tokens
    assert there.reference_perplexity == pytest.approx(here.reference_perplexity, rel=1e-4)


def test_weights_come_back_into_memory() -> None:
    found = quantized("cuda").program
    assert {found.weights[name].load().device.type for name in found.weights} == {"cpu"}
