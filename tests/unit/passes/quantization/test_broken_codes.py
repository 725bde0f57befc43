"""What is checked of rounded weights: that the rest of the program is as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from modelathe.ir import PassError, Program, QuantizedLinear
from modelathe.passes import PassContext, QuantizeWeights
from support.tiny import tiny
from support.views import quantized_calls


@dataclass(frozen=True, kw_only=True)
class Broken(QuantizeWeights):
    """Quantises, then spoils the result as ``how`` says."""

    how: str = ""

    def run(self, program: Program, context: PassContext) -> Any:
        result = super().run(program, context)
        calls = quantized_calls(program)
        up = calls["layers.0.up"]
        assert isinstance(up, QuantizedLinear)
        scales, codes = program.weight(up.scales).load(), program.weight(up.codes).load()
        spoiled: Any = {
            "groups": (up.scales, scales.roll(1, 1)),
            "rows": (up.scales, scales.roll(1, 0)),
            "codes": (up.codes, codes + 1),
            "step": (up.scales, scales * 1.05),
        }
        if self.how in spoiled:
            node, value = spoiled[self.how]
            name = program.add_weight("spoiled", value)
            up.node.replace_input_with(
                node, program.weight_node(program.graph, name, before=up.node)
            )
        elif self.how == "bias":
            up.node.args = (*up.node.args[:4], None, *up.node.args[5:])
        elif self.how == "untied":
            head = calls["head"]
            name = program.add_weight("copy", program.weight(head.codes))
            other = program.weight_node(program.graph, name, before=head.node)
            head.node.replace_input_with(head.codes, other)
        elif self.how == "elsewhere":
            norm = next(n for n in program.graph.nodes if "layer_norm" in str(n.target))
            norm.args = (*norm.args[:4], 1e-3, *norm.args[5:])
        return result


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("groups", r"@layers\.0\.up\.weight: .*(moved by|do not stand)"),
        ("rows", r"@layers\.0\.up\.weight: .*(moved by|do not stand)"),
        ("codes", r"@layers\.0\.up\.weight: the stored codes do not stand"),
        ("step", r"@layers\.0\.up\.weight: .*(moved by|do not stand)"),
        ("bias", r"%quantized_linear\w*: does not do what %linear did"),
        ("untied", "was shared, and is stored twice"),
        ("elsewhere", "%layer_norm: does not do what %layer_norm did"),
    ],
)
def test_a_broken_pass_is_caught_and_the_place_is_named(how: str, message: str) -> None:
    program = tiny(2)
    with pytest.raises(PassError, match=message):
        Broken(group_size=16, how=how)(program)
