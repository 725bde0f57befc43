"""What no configuration of the architecture says is refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx

from modelathe.backends import Checkpoint
from modelathe.backends.checkpoint import lower
from modelathe.ir import Linear, LoweringError, Norm, Program, TensorWeight, insert_call
from modelathe.passes import ConvertDtype, FoldNorms, QuantizeWeights, TieBlocks
from support.checkpoints import retarget
from support.models import canonical, program


@pytest.fixture(scope="module", autouse=True)
def _captured_once() -> Iterator[None]:
    """Capture each architecture once: that is most of the time that a refusal takes."""
    known: dict[str, Program] = {}
    architecture = lower.architecture

    def remembered(config: dict[str, object]) -> Program:
        key = str(config)
        known[key] = known.get(key) or architecture(config)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "architecture", remembered)
        yield


def _edited(name: str, edit: Callable[[Program], None]) -> Program:
    made = canonical(name).editable()
    edit(made)
    made.clean()
    return made


def _remove_norm(made: Program) -> None:
    norm = next(node for node in made.graph.nodes if Norm.match(node))
    norm.replace_all_uses_with(norm.args[0])


def _scale(made: Program) -> None:
    linear = next(node for node in made.graph.nodes if Linear.match(node))
    users = list(linear.users)
    after = linear.next
    scaled = insert_call(
        made.graph, torch.ops.aten.mul.Tensor, (linear, 2.0), before=after, like=linear
    )
    for user in users:
        user.replace_input_with(linear, scaled)


def _other_eps(made: Program) -> None:
    norm = next(node for node in made.graph.nodes if Norm.match(node))
    norm.args = (*norm.args[:4], 0.25)


def _last_token(made: Program) -> None:
    pooled = next(n for n in made.graph.nodes if n.target is torch.ops.aten.select.int)
    pooled.args = (*pooled.args[:2], -1)


def _other_frequencies(made: Program) -> None:
    (name,) = [name for name in made.weights if name.endswith("inv_freq")]
    value = made.weights[name].load()
    retarget(made, name, made.add_weight(f"{name}.scaled", TensorWeight(2 * value)))


def _narrower(made: Program) -> None:
    made.config["intermediate_size"] = 40


def _other_names(made: Program) -> None:
    made.signatures = {"main": made.signature.renamed({"pooler_output": "pooled"})}


def _no_class(made: Program) -> None:
    made.origin = replace(made.origin, model="my_module:make")


def _tied_by_hand(made: Program) -> None:
    first, second = (f"encoder.layer.{n}.output.dense.weight" for n in (0, 1))
    retarget(made, second, first)


def _with_a_wide_gain() -> Program:
    made = ConvertDtype(to="bfloat16")(canonical("bert")).program.editable()
    norm = next(node for node in made.graph.nodes if Norm.match(node))
    old = norm.args[2]
    assert isinstance(old, fx.Node)
    wide = TensorWeight(made.weight(old).load(torch.float32))
    with made.graph.inserting_before(old):
        gain = made.graph.get_attr(made.add_weight("gain.wide", wide))
    gain.meta["val"] = old.meta["val"].to(torch.float32)
    norm.replace_input_with(old, gain)
    made.clean()
    return made


REFUSED: dict[str, tuple[Callable[[], Program], str]] = {
    "quantised": (
        lambda: QuantizeWeights(bits=8, group_size=16)(canonical("bert")).program,
        "reads quantised weights",
    ),
    "no configuration": (
        lambda: program("norm-mlp"),
        "NormMlp has no configuration of a transformers model",
    ),
    "no class": (lambda: _edited("bert", _no_class), "does not name a class of transformers"),
    "tied blocks": (
        lambda: TieBlocks(unique=1)(canonical("bert")).program,
        r"@encoder\.layer\.0\..* is shared, and BertModel has a weight of its own",
    ),
    "a tied weight": (
        lambda: _edited("bert", _tied_by_hand),
        r"shared.*: encoder\.layer\.[01]\.output.dense.weight, encoder\.layer\.[01]\.output",
    ),
    "a norm removed": (
        lambda: _edited("gpt2", _remove_norm),
        r"GPT2LMHeadModel cannot express .* has %layer_norm\w* \(.* of transformer.h.0.ln_1\) in",
    ),
    "a call added": (
        lambda: _edited("gpt2", _scale),
        r"%mul\w* \(aten.mul.*: the architecture has %linear\w* .* in its place",
    ),
    "another constant": (lambda: _edited("bert", _other_eps), "its eps is 0.25, not 1e-12"),
    "another number": (lambda: _edited("bert", _last_token), "its index is -1, not 0"),
    "another size": (
        lambda: _edited("bert", _narrower),
        r"@encoder.layer.0.intermediate.dense.weight is \[48, 32\], .* says \[40, 32\]",
    ),
    "other names": (lambda: _edited("bert", _other_names), "outputs have other names"),
    "another buffer": (
        lambda: _edited("llama", _other_frequencies),
        "inv_freq.scaled: the architecture makes model.rotary_emb.inv_freq itself",
    ),
    "several dtypes": (
        _with_a_wide_gain,
        "LayerNorm.* is float32, and from_pretrained would make it bfloat16",
    ),
    "norms kept wide": (
        lambda: ConvertDtype(to="bfloat16", keep=("norms",))(canonical("bert")).program,
        "LayerNorm.: it computes in float32, and the architecture in bfloat16",
    ),
    "softmax kept wide": (
        lambda: ConvertDtype(to="bfloat16", keep=("softmax",))(canonical("gpt2")).program,
        "attn.: it computes in float32, and the architecture in bfloat16",
    ),
    "a bias without place": (
        lambda: FoldNorms(untie=True)(canonical("gpt2")).program,
        "lm_head.bias: the program has this bias, GPT2LMHeadModel has none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_the_reason(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(LoweringError, match=reason) as caught:
        Checkpoint().lower(make())
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_a_folder_that_computes_something_else_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Checkpoint().lower(canonical("bert"))
    names = [f"encoder.layer.{n}.output.dense.weight" for n in (0, 1)]
    weights = artifact.program.weights
    monkeypatch.setitem(weights._weights, names[0], weights[names[1]])
    with pytest.raises(LoweringError, match="of its largest value in float64; 1e-09 is rounding"):
        artifact.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
