"""Passes in any legal order, and then ONNX; and orders that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelathe.backends import Onnx
from modelathe.backends.checks import check_lowering
from modelathe.backends.onnx.exact import exact_session
from modelathe.ir import PassError
from modelathe.passes import Pipeline, SilentProgress
from support.models import canonical, context

ROUND = "quantize-weights{group-size=8 iterations=2}"
EIGHT = "quantize-weights{bits=8 group-size=-1 method=gptq}"
LEGAL = [
    f"fold-norms,prune-blocks{{blocks=1}},{ROUND}",
    f"{ROUND},prune-blocks{{blocks=0}}",
    f"prune-blocks{{blocks=0}},equalize{{group-size=8 grid=2 refine=1}},{ROUND}",
    f"tie-blocks{{unique=1}},{ROUND}",
    f"{ROUND},tie-blocks{{unique=1}}",
    f"tie-blocks{{unique=1}},fold-norms,{EIGHT},quantize-activations",
    f"assign-bits{{score=zd low=2 high=4}},prune-blocks{{blocks=1}},{ROUND}",
    f"smooth-keys,tie-blocks{{unique=1}},{ROUND},quantize-cache{{key-bits=4}}",
    f"quantize-cache,{EIGHT},quantize-activations{{mode=static}},prune-blocks{{blocks=1}}",
    "prune-blocks{blocks=1},quantize-weights{group-size=8 iterations=2 outliers=0.1}",
]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("text", LEGAL)
def test_a_legal_order_computes_the_same_in_onnx_runtime(
    text: str, model: str, tmp_path: Path
) -> None:
    result = Pipeline.parse(text, context=context())(canonical(model))
    for step in result.steps[1:]:  # the first one makes it canonical, which it is
        assert any(remark.kind == "applied" for remark in step.remarks), step.pass_
    Onnx().lower(result.program, check=False).save(tmp_path / "out")
    with exact_session(tmp_path / "out") as session:
        found = check_lowering(result.program, session, "float32", SilentProgress())
    assert found["error"] < 1e-5


@pytest.mark.parametrize(
    ("late", "reason"),
    [
        ("fold-norms", "is quantised already: fold before quantising"),
        ("equalize{group-size=8}", "quantised already: equalise before quantising"),
        ("smooth-keys", "is quantised already: smooth keys before"),
        ("quantize-weights{group-size=8}", "quantised to 4 bits already"),
    ],
)
def test_what_comes_too_late_is_refused_with_the_reason(late: str, reason: str) -> None:
    (quantize, after) = Pipeline.parse(f"{ROUND},{late}", context=context()).passes
    result = after(quantize(canonical("llama"), context()).program, context())
    assert not result.modified
    assert any(reason in remark.message for remark in result.remarks)


@pytest.mark.parametrize(
    ("late", "reason"),
    [
        ("assign-bits{score=zd}", "are quantised already"),
        ("search-bits{target-bits=4}", "are quantised already"),
        ("tie-blocks{unique=1 init=average}", "reads codes, which have no average"),
    ],
)
def test_choices_that_come_too_late_are_errors_with_a_remedy(late: str, reason: str) -> None:
    (quantize, after) = Pipeline.parse(f"{ROUND},{late}", context=context()).passes
    with pytest.raises(PassError, match=reason) as caught:
        after(quantize(canonical("llama"), context()).program, context())
    assert caught.value.remedy
