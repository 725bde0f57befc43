"""Batch norms disappear into the products around them, or stay with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import BatchNorm, Convolution, Linear, Program, TensorWeight, capture
from modelathe.passes import FoldBatchNorms, Pipeline
from support.models import canonical, context, perturb, program
from support.numeric import EXACT, relative_error, rounding, worst_error
from support.small import Build, captured_with_input, chain, outputs
from support.views import views


def assert_exact(before: Program, after: Program, x: Tensor) -> None:
    wide = [outputs(each, x, torch.float64) for each in (after, before)]
    assert worst_error(*wide) <= EXACT
    narrow = [outputs(each, x) for each in (after, before)]
    assert worst_error(*narrow) <= rounding(torch.float32, steps=256)  # 52 convolutions at most


class Tokens(nn.Module):
    """A linear, batch norm over its features, a linear, on ``x: [batch, tokens, features]``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.up(x).transpose(1, 2)).transpose(1, 2)
        return result


class Pooled(nn.Module):
    """A batch norm whose mean over the image, or one pixel of it, a linear reads."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.head, self.pool = nn.BatchNorm2d(4), nn.Linear(4, 3), pool

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.pool(self.norm(torch.relu(x))))
        return result


def pooled(pool: Callable[[Tensor], Tensor]) -> Build:
    return lambda: Pooled(pool)


ONE, TWO, THREE = (2, 4, 7), (2, 4, 5, 6), (2, 4, 3, 4, 3)
BN, RELU = nn.BatchNorm2d, nn.ReLU()
ON_INPUTS = {
    "conv 1d": (chain(nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6)), ONE),
    "conv 3d": (chain(nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6)), THREE),
    "padded": (chain(nn.Conv2d(4, 6, 3, padding=1, stride=2), BN(6)), TWO),
    "groups": (chain(nn.Conv2d(4, 6, 3, groups=2), BN(6)), TWO),
    "depthwise": (chain(nn.Conv2d(4, 8, 3, groups=4), BN(8)), TWO),
    "transposed": (chain(nn.ConvTranspose2d(4, 6, 3, stride=2), BN(6)), TWO),
    "transposed groups": (chain(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), ONE),
    "no gain": (chain(nn.Conv2d(4, 6, 3), BN(6, affine=False)), TWO),
    "linear": (chain(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4)),
    "tokens": (Tokens, (2, 5, 4)),
    "two norms": (chain(nn.Conv2d(4, 6, 3), BN(6), BN(6)), TWO),
}
ON_OUTPUTS = {
    "linear": (chain(nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)), (5, 4)),
    "conv": (chain(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 3, bias=False)), TWO),
    "groups": (chain(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 3, groups=2)), TWO),
    "one tap": (chain(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 1, padding="same")), TWO),
    "reflected": (
        chain(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
        TWO,
    ),
    "mean": (pooled(lambda x: x.mean((2, 3))), TWO),
    "pool": (pooled(lambda x: nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)), TWO),
    "pixel": (pooled(lambda x: x[:, :, 1, 2]), TWO),
    "rows": (pooled(lambda x: x.flatten(2).permute(0, 2, 1)[:, 1:]), TWO),
}


@pytest.mark.parametrize(("build", "shape"), ON_INPUTS.values(), ids=ON_INPUTS)
def test_what_makes_its_input_takes_a_norm_in(build: Build, shape: tuple[int, ...]) -> None:
    before, x = captured_with_input(build, *shape)
    result = FoldBatchNorms()(before)
    assert {remark.kind for remark in result.remarks} == {"applied"}
    assert all("which makes its input" in remark.message for remark in result.remarks)
    assert not views(BatchNorm, result.program)
    assert_exact(before, result.program, x)


@pytest.mark.parametrize(("build", "shape"), ON_OUTPUTS.values(), ids=ON_OUTPUTS)
def test_what_reads_its_result_takes_a_norm_in(build: Build, shape: tuple[int, ...]) -> None:
    before, x = captured_with_input(build, *shape)
    result = FoldBatchNorms()(before)
    assert [remark.kind for remark in result.remarks] == ["applied"]
    assert "which reads it" in result.remarks[0].message
    assert not views(BatchNorm, result.program)
    assert_exact(before, result.program, x)


CHAINS = {
    "both sides": ((nn.ReLU(), BN(4), nn.Conv2d(4, 6, 3), BN(6), nn.ReLU()), 2),
    "one each way": ((nn.Conv2d(4, 6, 3), BN(6), BN(6), nn.Conv2d(6, 4, 2)), 2),
    "three": ((nn.ReLU(), BN(4), BN(4), nn.Conv2d(4, 6, 3), BN(6)), 3),
}


@pytest.mark.parametrize(("parts", "count"), CHAINS.values(), ids=CHAINS)
def test_norms_in_a_row_are_all_folded(parts: tuple[nn.Module, ...], count: int) -> None:
    before, x = captured_with_input(chain(*parts), *TWO)
    result = FoldBatchNorms()(before)
    assert [remark.kind for remark in result.remarks] == ["applied"] * count
    assert not views(BatchNorm, result.program)
    assert_exact(before, result.program, x)


class Twice(nn.Module):
    """What is called twice is made in ``parts``; each call reads another half of the input."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        conv, *rest = self.parts
        first, second = rest if len(rest) == 2 else rest * 2
        return first(conv(x[:, :, :3])), second(conv(x[:, :, 3:]))


def test_a_shared_weight_stays_shared_where_all_calls_take_one_norm_in() -> None:
    before, x = captured_with_input(lambda: Twice(nn.Conv1d(4, 6, 2), nn.BatchNorm1d(6)), *ONE)
    after = FoldBatchNorms()(before).program
    assert not views(BatchNorm, after)
    left, right = views(Convolution, after)
    assert left.weight.target == right.weight.target
    assert_exact(before, after, x)


def test_a_shared_weight_in_front_of_two_norms_is_refused_or_untied() -> None:
    before, x = captured_with_input(
        lambda: Twice(nn.Conv1d(4, 6, 2), nn.BatchNorm1d(6), nn.BatchNorm1d(6)), *ONE
    )
    result = FoldBatchNorms()(before)
    assert [remark.kind for remark in result.remarks] == ["missed", "missed"]
    assert "the weight of %conv1d is also read by %conv1d_1" in result.remarks[0].message
    assert "untie=true to force" in result.remarks[0].message
    forced = FoldBatchNorms(untie=True)(before)
    assert not views(BatchNorm, forced.program)
    assert "untied parts.0 from %conv1d_1: 192 bytes" in str(forced.remarks)
    assert_exact(before, forced.program, x)


class BothWays(nn.Module):
    """One weight, read by a convolution and by a transposed one, both with the same norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.zeros(4, 4, 2)), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left = nn.functional.conv1d(x, self.weight)
        right = nn.functional.conv_transpose1d(x, self.weight)
        return self.norm(left), self.norm(right)


def test_a_weight_with_its_axes_in_two_orders_cannot_stay_shared() -> None:
    before, x = captured_with_input(BothWays, *ONE)
    result = FoldBatchNorms()(before)
    assert [remark.kind for remark in result.remarks] == ["missed", "missed"]
    assert_exact(before, FoldBatchNorms(untie=True)(before).program, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_computed_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    before, _ = captured_with_input(chain(nn.Linear(4, 6), nn.BatchNorm1d(6)), 5, 4, dtype=dtype)
    after = FoldBatchNorms()(before).program
    state = {name: before.weights[name].load().double() for name in before.weights}
    scale = state["1.weight"] / (state["1.running_var"] + 1e-5).sqrt()
    (linear,) = views(Linear, after)
    assert linear.bias is not None
    weight = (state["0.weight"] * scale[:, None]).to(dtype)
    assert torch.equal(after.weight(linear.weight).load(), weight)
    bias = state["1.bias"] + scale * (state["0.bias"] - state["1.running_mean"])
    assert relative_error(bias.to(dtype), after.weight(linear.bias).load()) <= 1e-7
    assert after.weight(linear.bias).dtype == dtype


def test_nothing_is_computed_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    before = canonical("conv-norms")
    monkeypatch.setattr(TensorWeight, "load", None)
    assert FoldBatchNorms()(before).modified


def test_a_pipeline_measures_next_to_nothing() -> None:
    result = Pipeline([FoldBatchNorms()], context=context())(program("conv-norms"))
    error = result.steps[-1].measured.error
    assert error is not None
    assert error <= EXACT


@pytest.mark.parametrize("kind", ["resnet", "mobilenet_v2"])
def test_a_transformers_model_keeps_no_batch_norm(kind: str) -> None:
    import transformers

    options = {
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "mobilenet_v2": {"depth_multiplier": 0.1},
    }[kind]
    config = transformers.AutoConfig.for_model(kind, image_size=32, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    perturb(model)
    before = capture(model)
    result = FoldBatchNorms()(before)
    assert len(result.remarks) == len(views(BatchNorm, before)) >= 8
    assert not views(BatchNorm, result.program)
    x = torch.randn(2, 3, 32, 32)
    assert_exact(before, result.program, x)
