"""Models whose rotary positions are one call each: their positions stay right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modelathe.ir import Program, Rotary, capture
from modelathe.passes import Canonicalize
from support.feeds import SHAPES, feed
from support.models import LENGTH, VOCABULARY, Transformer, perturb, program
from support.numeric import EXACT, worst_error
from support.views import views

_SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
_NEOX = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_MORE: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": LENGTH},
    "gpt_neox": {**_NEOX, "intermediate_size": 48, "max_position_embeddings": LENGTH},
}


def captured(name: str) -> Program:
    if name not in _MORE:
        return program(name)
    torch.manual_seed(0)
    model = Transformer("AutoModelForCausalLM", name, {**_SIZES, **_MORE[name]})()
    perturb(model, seed=1)
    return capture(model.eval())


@pytest.mark.parametrize(("name", "turned"), [("llama", 8), ("gptj", 4), ("gpt_neox", 2)])
def test_positions_stay_right_with_a_cache_and_behind_padding(name: str, turned: int) -> None:
    before = captured(name)
    result = Canonicalize()(before)
    assert "4 rotaries raised" in {remark.message for remark in result.remarks}
    assert [view.turned for view in views(Rotary, result.program)] == [turned] * 4
    padded = [feed(before, pads=3), feed(before, sequence=2, past=4, pads=2)]
    for inputs in (*padded, *(feed(before, batch=b, sequence=s, past=p) for b, s, p in SHAPES)):
        wide = [each.run(inputs, dtype=torch.float64) for each in (result.program, before)]
        assert worst_error(*wide) <= EXACT
