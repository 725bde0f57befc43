from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelathe.ir.errors import SpecSyntaxError
from modelathe.passes.spec import parse, to_spec
from support.specs import REGISTRY, Needy, Prune, Quantize

# Text that could be taken for something else, beside any text at all.
TRICKY = st.sampled_from(
    ["", "none", "true", "false", "inf", "-inf", "nan", "1", "1e5", ".5", "8..4", "a,b", "a b", "#"]
)
TEXT = st.one_of(TRICKY, st.text(st.characters(exclude_categories=["Cs"])))
FLOAT = st.floats(allow_nan=False)
QUANTIZE = st.builds(
    Quantize,
    only=st.lists(TEXT).map(tuple),
    bits=st.sampled_from([2, 3, 4, 8]),
    head_bits=st.sampled_from(["bits", 2, 3, 4, 8, None]),
    clip=st.sampled_from(["none", "weight"]),
    symmetric=st.booleans(),
    ratio=st.none() | FLOAT,
    label=st.none() | TEXT,
    text=TEXT,
    tile=TEXT,
    to=st.sampled_from(["float32", "float16", "bfloat16"]),
    keep=st.lists(st.sampled_from(["norms", "softmax"])).map(tuple),
    shape=st.tuples(st.integers(), st.integers()),
    limits=st.none() | st.lists(FLOAT).map(tuple),
    words=st.lists(st.none() | TEXT).map(tuple),
    mixed=st.integers() | TEXT,
    flag=st.booleans() | st.sampled_from([0, 1]),
    modes=st.lists(st.sampled_from(["none", "all"])).map(tuple),
    made=st.lists(st.integers()).map(tuple),
)
NEEDY = st.builds(Needy, first_one=st.integers(), second=TEXT)
PRUNE = st.builds(Prune, blocks=st.lists(st.integers()).map(tuple), count=st.integers(min_value=0))


@given(st.lists(st.one_of(QUANTIZE, NEEDY, PRUNE)), st.sampled_from([",", "\n", " , ", ",\n# x\n"]))
def test_objects_survive_being_written_and_read(
    values: list[Quantize | Needy | Prune], separator: str
) -> None:
    text = separator.join(to_spec(value, REGISTRY) for value in values)
    found = parse(text, REGISTRY)
    assert found == tuple(values)
    # Equality takes 1 for 1.0 and for True; the text does not.
    assert [repr(value) for value in found] == [repr(value) for value in values]


@given(st.text(st.sampled_from(list("ab{}=,# \n\"'\\.*1-:quantize"))))
def test_any_text_is_read_or_refused_with_a_place_in_it(text: str) -> None:
    places = [0]
    try:
        parse(text, REGISTRY)
    except SpecSyntaxError as error:
        places.append(error.position)
    assert 0 <= places[-1] <= len(text)
