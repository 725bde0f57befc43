"""Widths for weights that a model does not have are said to do nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest

from modelathe.passes import QuantizeWeights
from support.models import canonical, context


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            "llama",
            {"embedding_bits": 8},
            "embedding-bits=8: @.* is a linear's too",
        ),
        ("bert", {"head_bits": 8}, "head-bits=8: no weight to round is a head's"),
        ("bert", {"embedding_bits": 8, "only": ("layer.0",)}, "embedding-bits=8: no weight"),
        ("llama", {"head_bits": 8, "only": ("layers.0",)}, "head-bits=8: no weight"),
    ],
)
def test_a_width_that_no_weight_takes_is_remarked_on(
    model: str, options: Any, message: str
) -> None:
    pass_ = QuantizeWeights(method="rtn", group_size=8, **options)
    remarks = pass_(canonical(model), context()).remarks
    (told,) = [r for r in remarks if "-bits=8" in r.where]
    assert told.kind == "missed"
    assert re.match(message, f"{told.where}: {told.message}")


def test_widths_that_weights_take_are_not_remarked_on() -> None:
    pass_ = QuantizeWeights(method="rtn", group_size=8, head_bits=8)
    assert not [r for r in pass_(canonical("llama"), context()).remarks if "bits=" in r.where]
