"""Which remarks of a run are printed."""

from __future__ import annotations

from modelathe.cli.report import remark_lines


def test_what_a_pass_says_of_its_work_as_a_whole_is_printed_and_what_it_did_to_weights_is_not() -> (
    None
):
    remarks = [
        "applied: quantize-weights: rtn: there is no calibration text",
        "applied: @weight: 4 bits",
        "missed: @other: computed",
    ]
    assert remark_lines([{"pass": "quantize-weights{bits=4}", "remarks": remarks}]) == [
        "quantize-weights: rtn: there is no calibration text",
        "quantize-weights: missed: @other: computed",
    ]


def test_of_many_refusals_some_are_printed_and_the_rest_is_counted() -> None:
    remarks = [f"missed: @{number}: computed" for number in range(9)]
    lines = remark_lines([{"pass": "fold-norms", "remarks": remarks}], limit=2)
    assert lines[2:] == ["fold-norms: ... and 7 more that it refused"]
