"""RepBN disappears into the products around it, or becomes one product and one sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import BatchNorm, Linear, Program, TensorWeight, capture
from modelathe.passes import FoldRepBatchNorms, Pipeline
from support.batch_norms import RepBN, rep_tokens
from support.models import canonical, context, perturb
from support.numeric import EXACT, worst_error
from support.small import captured_with_input, outputs
from support.views import calls, views

SHAPE = (2, 5, 6)


def assert_exact(before: Program, after: Program, x: Tensor) -> None:
    assert worst_error(*(outputs(each, x, torch.float64) for each in (after, before))) <= EXACT


class Written(nn.Module):
    """``BN(x) + alpha x`` in one of several ways, between an activation and a linear."""

    def __init__(self, form: Callable[[nn.BatchNorm1d, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.alpha, self.bn = nn.Parameter(torch.ones(1)), nn.BatchNorm1d(6)
        self.form, self.head = form, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.form(self.bn, self.alpha, torch.relu(x)))
        return result


def inside(bn: nn.BatchNorm1d, alpha: Tensor, x: Tensor) -> Tensor:
    z = x.transpose(1, 2)
    return (bn(z) + alpha * z).transpose(1, 2)


def outside(bn: nn.BatchNorm1d, alpha: Tensor, x: Tensor) -> Tensor:
    return x * alpha + bn(x.transpose(1, 2)).transpose(1, 2)


def apart(bn: nn.BatchNorm1d, alpha: Tensor, x: Tensor) -> Tensor:
    z = x.permute(0, 2, 1)
    return (bn(x.mT) + z * alpha).mT


def flat(bn: nn.BatchNorm1d, alpha: Tensor, x: Tensor) -> Tensor:
    rows = x.reshape(-1, 6)
    return (bn(rows) + alpha * rows).reshape(x.shape)


def constant(bn: nn.BatchNorm1d, alpha: Tensor, x: Tensor) -> Tensor:
    return 0.25 * x + bn(x.mT).mT


def itself(bn: nn.BatchNorm1d, alpha: Tensor, x: Tensor) -> Tensor:
    return x + bn(x.mT).mT


FORMS = (inside, outside, apart, flat, constant, itself)


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_write_it_is_folded(
    form: Callable[[nn.BatchNorm1d, Tensor, Tensor], Tensor],
) -> None:
    before, x = captured_with_input(lambda: Written(form), *SHAPE)
    result = FoldRepBatchNorms()(before)
    assert [remark.kind for remark in result.remarks] == ["applied"]
    products = {"aten.relu", "aten.linear"}
    assert set(calls(result.program)) <= products | {"aten.reshape"}
    assert_exact(before, result.program, x)


def other_input(bn: nn.BatchNorm1d, alpha: Tensor, x: Tensor) -> Tensor:
    return bn(x.mT).mT + alpha * x.flip(1)


def many_alphas(bn: nn.BatchNorm1d, alpha: Tensor, x: Tensor) -> Tensor:
    return bn(x.mT).mT + bn.weight * x


def crossed(bn: nn.BatchNorm1d, alpha: Tensor, x: Tensor) -> Tensor:
    square = torch.cat([x, x[:, :1]], 1)
    return bn(square.mT) + square


@pytest.mark.parametrize("form", [other_input, many_alphas, crossed])
def test_another_sum_is_no_rep_batch_norm(
    form: Callable[[nn.BatchNorm1d, Tensor, Tensor], Tensor],
) -> None:
    before, _ = captured_with_input(lambda: Written(form), *SHAPE)
    assert FoldRepBatchNorms()(before).remarks == ()


class Before(nn.Module):
    """A linear, RepBN, an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(6, 4), RepBN(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.up(x)))


def test_the_bias_of_a_linear_before_it_keeps_alpha_b() -> None:
    before, x = captured_with_input(Before, *SHAPE)
    after = FoldRepBatchNorms()(before).program
    state = {name: before.weights[name].load().double() for name in before.weights}
    slope = state["norm.bn.weight"] / (state["norm.bn.running_var"] + 1e-5).sqrt()
    bias, alpha = state["up.bias"], state["norm.alpha"]
    published = slope * (bias - state["norm.bn.running_mean"]) + state["norm.bn.bias"]
    (linear,) = views(Linear, after)
    assert linear.bias is not None
    folded = after.weight(linear.bias).load(torch.float64)
    torch.testing.assert_close(folded - published, alpha * bias)
    assert (alpha * bias).abs().min() > 0.01  # what the published code is off by
    assert_exact(before, after, x)


def test_weights_are_computed_in_float64_and_rounded_once() -> None:
    before, _ = captured_with_input(Before, *SHAPE, dtype=torch.bfloat16)
    after = FoldRepBatchNorms()(before).program
    state = {name: before.weights[name].load().double() for name in before.weights}
    scale = state["norm.bn.weight"] / (state["norm.bn.running_var"] + 1e-5).sqrt()
    weight = (scale + state["norm.alpha"])[:, None] * state["up.weight"]
    (linear,) = views(Linear, after)
    assert torch.equal(after.weight(linear.weight).load(), weight.bfloat16())


def test_what_stays_is_one_product_and_one_sum() -> None:
    before, x = captured_with_input(lambda: nn.Sequential(nn.ReLU(), RepBN(), nn.ReLU()), *SHAPE)
    result = FoldRepBatchNorms()(before)
    missed, applied = result.remarks
    assert missed.kind == "missed"
    assert "its result is read by %relu_1 (aten.relu)" in missed.message
    assert str(applied).endswith("computed as one product and one sum")
    assert calls(result.program) == ["aten.relu", "aten.mul.Tensor", "aten.add.Tensor", "aten.relu"]
    assert_exact(before, result.program, x)


class Images(nn.Module):
    """RepBN of ``x: [batch, channels, length]``, nothing to fold into."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.bn = nn.Parameter(torch.ones(1)), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(x) + self.alpha * x)


def test_channels_need_not_be_last() -> None:
    before, x = captured_with_input(Images, *SHAPE)
    after = FoldRepBatchNorms()(before).program
    assert calls(after) == ["aten.mul.Tensor", "aten.add.Tensor", "aten.relu"]
    assert_exact(before, after, x)


class TiedTokens(nn.Module):
    """Embedding, RepBN, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, 6), RepBN()
        self.head = nn.Linear(6, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.embed(ids)))
        return result


def test_a_tied_head_keeps_a_product_and_a_sum_unless_untied() -> None:
    torch.manual_seed(0)
    model = TiedTokens().eval()
    perturb(model)
    ids = torch.arange(10).reshape(2, 5)
    before = capture(model, (ids,))
    kept, untied = FoldRepBatchNorms()(before), FoldRepBatchNorms(untie=True)(before)
    assert "head is tied; untie=true to force" in str(kept.remarks)
    assert "aten.mul.Tensor" in calls(kept.program)
    assert calls(untied.program) == ["aten.embedding", "aten.linear"]
    assert "untied head from %embedding: 384 bytes" in str(untied.remarks)
    for result in (kept, untied):
        assert_exact(before, result.program, ids)


def test_no_batch_norm_and_one_transposition_are_left_of_a_model_with_four() -> None:
    result = FoldRepBatchNorms()(canonical("rep-tokens"))
    kinds = [remark.kind for remark in result.remarks]
    assert kinds == ["applied", "applied", "missed", "applied", "applied"]
    assert not views(BatchNorm, result.program)
    assert calls(result.program).count("aten.transpose.int") == 1


def test_a_factory_gives_the_model_to_a_pipeline() -> None:
    module, inputs, sizes = rep_tokens()
    before = capture(module, inputs, sizes)
    result = Pipeline([FoldRepBatchNorms()], context=context())(before)
    error = result.steps[-1].measured.error
    assert error is not None
    assert error <= EXACT
    expected = module(*inputs)
    found = outputs(result.program, inputs[0])["output"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_computed_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    before = canonical("rep-tokens")
    monkeypatch.setattr(TensorWeight, "load", None)
    assert FoldRepBatchNorms()(before).modified
