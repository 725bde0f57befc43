"""What the names of a graph's inputs and outputs say."""

from __future__ import annotations

import copy

import pytest

from modelathe.backends.signatures import DecoderPlan, GraphSpec
from modelathe.ir import StorageError
from support.artifacts import SIGNATURE


def test_a_step_reads_each_entry_from_the_output_of_its_name() -> None:
    signature = copy.deepcopy(SIGNATURE)
    signature["outputs"][1:] = signature["outputs"][:0:-1]
    plan = DecoderPlan.of("main", GraphSpec.parse(signature))
    assert [(before.name, after.name) for before, after in plan.state] == [
        ("past_key_values.0.key", "present.0.key"),
        ("past_key_values.0.value", "present.0.value"),
    ]


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_an_entry_that_is_read_or_given_only_is_refused(side: str) -> None:
    signature = copy.deepcopy(SIGNATURE)
    signature[side][-1]["name"] = "other"
    with pytest.raises(StorageError, match=r"not both read and give other, present\.0\.value"):
        DecoderPlan.of("main", GraphSpec.parse(signature))
