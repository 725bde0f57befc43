"""A configuration says the same about the blocks that are left, or the pass refuses."""

from __future__ import annotations

from typing import Any

import pytest

from modelathe.ir import PassError
from modelathe.passes.depth.block_config import without_blocks

FULL, SLIDING = "full_attention", "sliding_attention"
EIGHT = list("abcdefgh")


@pytest.mark.parametrize(
    ("config", "removed", "total", "role", "expected"),
    [
        ({"num_hidden_layers": 3}, [1], 3, "decoder", {"num_hidden_layers": 2}),
        # as many heads as blocks: a number says nothing without its name
        (
            {"model_type": "gpt2", "n_layer": 4, "n_head": 4},
            [0, 2],
            4,
            "decoder",
            {"n_layer": 2, "n_head": 4},
        ),
        # what transformers would derive from the count must be said
        (
            {"model_type": "gemma2", "num_hidden_layers": 4},
            [0],
            4,
            "decoder",
            {"num_hidden_layers": 3, "layer_types": [FULL, SLIDING, FULL]},
        ),
        (
            {"model_type": "gemma2", "num_hidden_layers": 2, "layer_types": [FULL, SLIDING]},
            [0],
            2,
            "decoder",
            {"num_hidden_layers": 1, "layer_types": [SLIDING]},
        ),
        (
            {
                "model_type": "qwen2",
                "num_hidden_layers": 4,
                "use_sliding_window": True,
                "max_window_layers": 2,
            },
            [0],
            4,
            "decoder",
            {"max_window_layers": 1},
        ),
        (
            {
                "model_type": "gpt_neo",
                "num_layers": 4,
                "attention_types": [[["global", "local"], 2]],
            },
            [1],
            4,
            "decoder",
            {"num_layers": 3, "attention_types": [[["global", "global", "local"], 1]]},
        ),
        (
            {"model_type": "qwen3_moe", "num_hidden_layers": 6, "mlp_only_layers": [0, 2, 5]},
            [2, 3],
            6,
            "decoder",
            {"num_hidden_layers": 4, "mlp_only_layers": [0, 3]},
        ),
        (
            {"model_type": "t5", "num_layers": 4},
            [3],
            4,
            "encoder",
            {"num_layers": 3, "num_decoder_layers": 4},
        ),
        (
            {
                "model_type": "bart",
                "encoder_layers": 4,
                "decoder_layers": 3,
                "num_hidden_layers": 4,
            },
            [1],
            3,
            "decoder",
            {"encoder_layers": 4, "decoder_layers": 2, "num_hidden_layers": 4},
        ),
        (
            {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 5}},
            [0],
            3,
            "decoder",
            {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 5}},
        ),
        (
            {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "eos_token_ids": [1, 2, 3, 4]},
            [2],
            4,
            "decoder",
            {"num_hidden_layers": 3, "num_kv_shared_layers": 1, "eos_token_ids": [1, 2, 3, 4]},
        ),
        (
            {"num_hidden_layers": 8, "widths": EIGHT, "the_pattern": "MMMMMMM*"},
            [0, 1],
            8,
            "decoder",
            {"num_hidden_layers": 6, "widths": EIGHT[2:], "the_pattern": "MMMMM*"},
        ),
        ({"num_hidden_layers": 3, "scale": [1, 2, 3]}, [0], 3, "decoder", {"scale": [1, 2, 3]}),
        (
            {"model_type": "dinov2", "num_hidden_layers": 3, "out_indices": [1, 3]},
            [0],
            3,
            "vision",
            {"num_hidden_layers": 2, "out_indices": [0, 2]},
        ),
        # every second block is of a kind, and those that are left keep theirs
        (
            {"num_hidden_layers": 6, "decoder_sparse_step": 2},
            [2, 3],
            6,
            "decoder",
            {"num_hidden_layers": 4, "decoder_sparse_step": 2},
        ),
        (
            {"n_layer": 4, "scale_attn_by_inverse_layer_idx": True},
            [3],
            4,
            "decoder",
            {"n_layer": 3, "scale_attn_by_inverse_layer_idx": True},
        ),
        ({}, [0], 3, "module", {}),
    ],
)
def test_what_is_said_of_blocks_is_said_of_those_left(
    config: dict[str, Any],
    removed: list[int],
    total: int,
    role: str,
    expected: dict[str, Any],
) -> None:
    before = repr(config)
    found = without_blocks(config, removed, total, role)
    assert {key: found.get(key) for key in expected} == expected
    assert repr(config) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 5}, "no key that says there are 4 blocks"),
        ({"num_hidden_layers": 4, "decoder_sparse_step": 2}, "decoder_sparse_step: 2"),
        ({"n_layer": 4, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ({"num_layers": 4, "depths": [1, 1, 2, 1]}, r"stages, of \[1, 1, 2, 1\] layers"),
    ],
)
def test_what_no_configuration_can_say_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        without_blocks(config, [1], 4, "decoder")
    assert caught.value.remedy
