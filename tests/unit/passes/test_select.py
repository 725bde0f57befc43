from __future__ import annotations

import pytest

from modelathe.ir import PassError
from modelathe.passes.select import check_globs, check_matches, chosen, matches

PATH = "transformer.h.3.mlp.c_fc"


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("h.*.mlp", True),
        ("transformer.h.3.mlp.c_fc", True),
        ("c_fc", True),
        ("c_*", True),
        ("h.[1-3]", True),
        ("h.[4-9]", False),
        ("h.?.mlp.c_fc", True),
        ("*.*.*.*.*", True),
        ("*.*.*.*.*.*", False),
        ("mlp.c", False),  # half a component
        ("h.mlp", False),  # not neighbours
        ("H.*.mlp", False),
    ],
)
def test_a_glob_matches_any_run_of_whole_components(glob: str, expected: bool) -> None:
    assert matches(PATH, glob) is expected


def test_a_thing_read_twice_is_chosen_by_any_reader_and_ignored_by_any() -> None:
    assert chosen(("embed", "head"), (), ())
    assert chosen(("embed", "head"), ("head",), ())
    assert not chosen(("embed", "head"), ("mlp",), ())
    assert not chosen(("embed", "head"), ("head",), ("embed",))


def test_a_glob_that_matches_nothing_is_an_error_with_an_example() -> None:
    with pytest.raises(PassError, match=r'only="h\.\*\.mpl" matches none of the 1 modules.*c_fc'):
        check_matches([PATH], ["c_fc", "h.*.mpl"], "only")


@pytest.mark.parametrize("globs", ["h.*", ["h"], ("",), (1,)])
def test_globs_are_a_tuple_of_texts(globs: object) -> None:
    with pytest.raises(ValueError, match="only is a tuple of globs"):
        check_globs("only", globs)
