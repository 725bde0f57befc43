"""What configurations say, whatever the family calls it."""

from __future__ import annotations

from typing import Any

import pytest

from modelathe.ir.config import end_tokens


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"eos_token_id": 0}, (0,)),
        ({"eos_token_id": [128001, 128008]}, (128001, 128008)),
        ({"text_config": {"eos_token_id": [1, 106]}}, (1, 106)),
        ({"eos_token_id": None, "text_config": {"eos_token_id": 3}}, (3,)),
        ({"eos_token_id": []}, ()),
        ({}, ()),
    ],
)
def test_end_tokens_are_all_that_a_configuration_names(
    config: dict[str, Any], tokens: tuple[int, ...]
) -> None:
    assert end_tokens(config) == tokens
