"""The bias of attention's values moves behind attention, or stays with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import Attention, FidelityError, Linear, capture
from modelathe.passes import (
    Canonicalize,
    FoldNorms,
    PassResult,
    Pipeline,
    QuantizeWeights,
    TieBlocks,
)
from modelathe.passes.fidelity import judge_rounding
from modelathe.passes.norms import value_bias
from support.exactness import checked
from support.models import Transformer, canonical, context, module, perturb
from support.numeric import EXACT
from support.small import small

F = nn.functional
FOLD = FoldNorms(gains=False, value_bias=True)
X = torch.ones(1, 1, 4, 2)


def count(result: PassResult, kind: str, text: str) -> int:
    return sum(r.kind == kind and text in r.message for r in result.remarks)


def test_the_bias_is_moved_through_the_output_projection() -> None:
    before = canonical("bert")
    after = checked(before, FOLD).program
    state = {name: value.detach().double() for name, value in module("bert").state_dict().items()}
    head = "encoder.layer.0.attention"
    moved = state[f"{head}.output.dense.weight"] @ state[f"{head}.self.value.bias"]
    expected = moved + state[f"{head}.output.dense.bias"]
    found = after.weights[f"{head}.output.dense.bias.folded"].load()
    assert torch.equal(found, expected.float())
    assert f"{head}.self.value.bias" not in after.weights


@pytest.mark.parametrize(("name", "moved"), [("gpt2", 2), ("bert", 2), ("albert", 2), ("vit", 2)])
def test_models_with_value_biases_lose_them(name: str, moved: int) -> None:
    assert count(checked(canonical(name), FOLD), "applied", "value bias of") == moved


def test_blocks_that_share_weights_still_do() -> None:
    before = canonical("albert")
    after = checked(before, FOLD).program
    assert len(after.weights) == len(before.weights) - 1


def test_tied_blocks_still_share_what_is_made() -> None:
    before = TieBlocks(unique=1)(canonical("gpt2")).program
    after = checked(before, FOLD).program
    assert len(after.weights) == len(before.weights)


def test_cached_values_lose_the_bias_and_nothing_else_moves() -> None:
    before = canonical("gpt2")
    after = checked(before, FOLD).program
    with pytest.raises(FidelityError, match=r"output present.0.value is off"):
        judge_rounding(before, after, "here")


def test_with_a_cache_or_padding_other_checks_judge() -> None:
    outputs = {"logits": torch.ones(1, 1, 2), "present.0.key": X, "present.0.value": X}
    mask = torch.ones(1, 4)
    plain = {"attention_mask": mask, "past_key_values.0.value": X[:, :, :0]}
    assert set(FOLD.kept(plain, outputs)) == {"logits", "present.0.key"}
    assert FOLD.kept({**plain, "attention_mask": mask - 1}, outputs) == {}
    assert FOLD.kept({**plain, "past_key_values.0.value": X}, outputs) == {}
    assert set(FoldNorms().kept(plain, outputs)) == set(outputs)


def test_a_pipeline_judges_what_is_kept() -> None:
    result = Pipeline([FoldNorms(value_bias=True)], context=context())(canonical("gpt2"))
    error = result.steps[-1].measured.error
    assert error is not None
    assert error <= EXACT


def test_only_the_part_of_the_values_is_zero() -> None:
    after = checked(canonical("fused-attention"), FOLD).program
    old = module("fused-attention").state_dict()["qkv.bias"]
    new = after.weights["qkv.bias.values_folded"].load()
    assert torch.equal(new[:16], old[:16])
    assert torch.equal(new[16:], torch.zeros(8))


GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 32,
}


def test_grouped_heads_repeat_their_bias() -> None:
    model = Transformer("AutoModelForCausalLM", "qwen2", GROUPED)().eval()
    perturb(model)
    before = Canonicalize()(capture(model)).program
    assert any(a.grouped for node in before.graph.nodes if (a := Attention.match(node)))
    assert count(checked(before, FOLD), "applied", "value bias of") == 2


class Net(nn.Module):
    """Attention of two heads; ``form`` makes the result of queries, keys and values."""

    def __init__(self, form: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(2, 3, 2, 4).transpose(1, 2)

    def mixed(self, x: Tensor, v: Tensor) -> Tensor:
        q, k = self.heads(self.q(x)), self.heads(self.k(x))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 3, 8)


def plain(m: Net, x: Tensor) -> Tensor:
    result: Tensor = m.out(m.mixed(x, m.heads(m.v(x))))
    return result


def shuffled(m: Net, x: Tensor) -> Tensor:
    """Heads and channels in another order on the way in, and again on the way out."""
    v = m.v(x).view(2, 3, 4, 2).permute(0, 3, 1, 2)
    q, k = m.heads(m.q(x)), m.heads(m.k(x))
    mixed = F.scaled_dot_product_attention(q, k, v)
    result: Tensor = m.out(mixed.permute(0, 2, 3, 1).reshape(2, 3, 8))
    return result


def one_head_for_all(m: Net, x: Tensor) -> Tensor:
    v = m.v(x)[..., :4].unsqueeze(1).expand(2, 2, 3, 4)
    result: Tensor = m.out(m.mixed(x, v))
    return result


def partly_used(m: Net, x: Tensor) -> Tensor:
    """Half of the linear makes the values, the other half something else."""
    v = m.v(x)
    both = torch.cat([v[..., :4], v[..., :4]], -1)
    result: Tensor = m.out(m.mixed(x, m.heads(both))) + v[..., 4:].relu().sum()
    return result


@pytest.mark.parametrize("form", [plain, shuffled, one_head_for_all, partly_used])
def test_channels_are_followed_wherever_they_go(form: Callable[[Net, Tensor], Tensor]) -> None:
    assert count(checked(small(lambda: Net(form)), FOLD), "applied", "value bias of") == 1


def unlike_rows(m: Net, x: Tensor) -> Tensor:
    """The values are not the same outputs of the linear at every position."""
    v = m.v(x)
    v = torch.cat([v[:, :1], v[:, 1:].flip(-1)], 1)
    result: Tensor = m.out(m.mixed(x, m.heads(v)))
    return result


def mixed_positions(m: Net, x: Tensor) -> Tensor:
    v = m.v(x).reshape(2, 8, 3).transpose(1, 2).reshape(2, 3, 8)
    result: Tensor = m.out(m.mixed(x, m.heads(v)))
    return result


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (lambda m, x: m.out(m.mixed(x, m.heads(m.v(x).relu()))), "values come from %relu"),
        (lambda m, x: m.out(m.mixed(x, m.heads(x))), "values come from input x"),
        (lambda m, x: m.out(m.mixed(x, m.heads(m.v(x))).relu()), "result is read by %relu"),
        (lambda m, x: plain(m, x) + m.mixed(x, m.heads(m.v(x))), "result is read by %add"),
        (lambda m, x: m.out(y := m.mixed(x, m.heads(m.v(x)))) + m.q(y), "read by 2 linears"),
        (lambda m, x: m.out(m.mixed(x, m.heads(v := m.v(x)))) + v, "also read by %add"),
        (
            lambda m, x: m.out(m.mixed(x, m.heads(torch.cat([m.v(x)[:, :1], m.k(x)[:, 1:]], 1)))),
            "values come from 2 linears",
        ),
        (unlike_rows, "values come from %flip"),
        (mixed_positions, "values are not one output of the linear each"),
    ],
)
def test_a_bias_that_cannot_be_moved_says_why(
    form: Callable[[Net, Tensor], Tensor], reason: str
) -> None:
    result = FOLD(small(lambda: Net(form)))
    assert count(result, "missed", reason) >= 1


def test_values_that_are_keys_too_are_refused() -> None:
    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            v = self.heads(self.v(x))
            mixed = F.scaled_dot_product_attention(self.heads(self.q(x)), v, v)
            result: Tensor = self.out(mixed.transpose(1, 2).reshape(2, 3, 8))
            return result

    result = FOLD(small(lambda: Shared(plain)))
    assert count(result, "missed", "its values are queries or keys, too") == 1


def test_values_that_are_an_output_are_refused() -> None:
    class Returned(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            v = self.heads(self.v(x))
            return self.out(self.mixed(x, v)), v

    result = FOLD(small(lambda: Returned(plain)))
    assert count(result, "missed", "its values are also read by an output of the graph") == 1


def test_quantised_linears_keep_their_biases() -> None:
    quantized = QuantizeWeights(group_size=8)(canonical("bert")).program
    result = FOLD(quantized)
    assert not result.modified
    assert count(result, "missed", "is quantised already") == 2


@pytest.mark.parametrize("name", ["llama", "norm-mlp", "t5"])
def test_nothing_to_move_is_a_remark(name: str) -> None:
    result = FOLD(canonical(name))
    assert not result.modified
    assert count(result, "missed", "value-bias: ") >= 1


def test_a_wrong_fold_is_blamed_on_the_output_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weight: Tensor, values: Tensor, channels: Tensor, bias: Tensor) -> Tensor:
        return bias.double() - torch.mv(weight.double(), values.double()[channels])

    monkeypatch.setattr(value_bias, "_moved", wrong)
    with pytest.raises(FidelityError, match=r"first wrong at .*\(aten.linear of .*0.attn.c_proj\)"):
        Pipeline([FOLD], context=context())(canonical("gpt2"))


def test_biases_of_norms_move_along() -> None:
    """A norm's bias folded into a linear that makes values becomes one of theirs."""
    after = checked(canonical("fused-attention"), FoldNorms(value_bias=True)).program
    first, second = (x for node in after.graph.nodes if (x := Linear.match(node)))
    assert first.bias is not None
    assert second.bias is not None
    assert str(first.bias.target) == "qkv.bias.folded.values_folded"
    assert not bool(after.weight(first.bias).load()[16:].any())
