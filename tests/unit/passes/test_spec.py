from __future__ import annotations

import dataclasses
import re

import pytest

from modelathe.ir.errors import ModelatheError, SpecSyntaxError
from modelathe.passes.describe import describe, undocumented
from modelathe.passes.fields import OptionType
from modelathe.passes.spec import parse, to_spec
from support.specs import REGISTRY, Filtered, Fold, Needy, Prune, Quantize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("fold-norms", (Fold(),)),
        ("fold-norms{}", (Fold(),)),
        ("fold-norms,prune-blocks{blocks=3,4}", (Fold(), Prune(blocks=(3, 4)))),
        ("prune-blocks { count = 2 }", (Prune(count=2),)),
        ("# a recipe\nfold-norms\n\nprune-blocks{count=2}  # why\n", (Fold(), Prune(count=2))),
        ("prune-blocks{\n  blocks=3,\n    4\n  count=2\n}", (Prune(blocks=(3, 4), count=2),)),
        ("fold-norms,\r\nfold-norms", (Fold(), Fold())),
        ("support.specs:Prune{count=2}", (Prune(count=2),)),
    ],
)
def test_text_becomes_objects(text: str, expected: tuple[object, ...]) -> None:
    assert parse(text, REGISTRY) == expected


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("head-bits=none", "head_bits", None),
        ("head-bits=8", "head_bits", 8),
        ("head-bits=bits", "head_bits", "bits"),
        ("clip=none", "clip", "none"),
        ("ratio=none", "ratio", None),
        ("ratio=.05", "ratio", 0.05),
        ("ratio=1e-3", "ratio", 0.001),
        ("ratio=2", "ratio", 2.0),
        ("ratio=-inf", "ratio", float("-inf")),
        ("symmetric=true", "symmetric", True),
        ("label=none", "label", None),
        ('label="none"', "label", "none"),
        ("label='two words'", "label", "two words"),
        (r'label="a \"b\" \u00e9"', "label", 'a "b" é'),
        ("tile=8..4", "tile", "8..4"),
        ("tile=8", "tile", "8"),
        ("only=h.*.mlp", "only", ("h.*.mlp",)),
        ("only=*.mlp.*,lm_head", "only", ("*.mlp.*", "lm_head")),
        ("only=h.[0-3].attn", "only", ("h.[0-3].attn",)),
        ("only=none", "only", ()),
        ("keep=none", "keep", ()),
        ("keep=softmax,norms", "keep", ("softmax", "norms")),
        ("to=bf16", "to", "bfloat16"),
        ("to=fp16", "to", "float16"),
        ("to=fp32", "to", "float32"),
        ("limits=1,.5", "limits", (1.0, 0.5)),
        ("limits=", "limits", ()),
        ("limits=none", "limits", None),
        ("words=none,b", "words", (None, "b")),
        ("words=none", "words", (None,)),
        ("words=", "words", ()),
        ("mixed=3", "mixed", 3),
        ('mixed="3"', "mixed", "3"),
        ("shape=5,6", "shape", (5, 6)),
    ],
)
def test_an_option_becomes_a_value(text: str, field: str, value: object) -> None:
    (parsed,) = parse(f"quantize{{{text}}}", REGISTRY)
    found = getattr(parsed, field)
    assert (type(found), found) == (type(value), value)
    assert parse(to_spec(parsed, REGISTRY), REGISTRY) == (parsed,)


@pytest.mark.parametrize(
    ("text", "caret", "message"),
    [
        ("fold-norm", 0, "unknown name 'fold-norm'; did you mean 'fold-norms'?"),
        ("fold-norms,prune{count=2}", 11, "did you mean 'prune-blocks'?"),
        ("quantize{bit=4}", 9, "quantize has no option 'bit'; did you mean 'bits'?"),
        ("quantize{head_bits=4}", 9, "did you mean 'head-bits'?"),
        ("fold-norms{x=1}", 11, "fold-norms has no option 'x'"),
        ("quantize{bits=4,head-bits=8}", 15, "options are separated by spaces"),
        ("quantize{bits=4, head-bits=8}", 15, "options are separated by spaces"),
        ("quantize{bits=4 bits=4}", 16, "bits is given twice"),
        ("quantize{bits=5}", 14, "bits takes 2|3|4|8, not '5'"),
        ("quantize{bits=none}", 14, "bits takes 2|3|4|8, not 'none'"),
        ("quantize{bits=4,8}", 14, "bits takes 2|3|4|8, not '4,8'"),
        ('quantize{bits="4"}', 14, "bits takes 2|3|4|8, not '4'"),
        ("quantize{bits= head-bits=4}", 9, "bits takes 2|3|4|8, and got no value"),
        ("quantize{head-bits=5}", 19, "head-bits takes bits|2|3|4|8|none, not '5'"),
        ("quantize{to=float15}", 12, "did you mean 'float16'?"),
        ("quantize{symmetric=1}", 19, "symmetric takes true|false, not '1'"),
        ("quantize{text=true}", 14, 'for the text, write "true" with its quotes'),
        ("quantize{keep=norms,softmx}", 20, "not 'softmx'; did you mean 'softmax'?"),
        ("quantize{shape=1}", 15, "takes integer,integer: 2 values, not 1"),
        ("quantize{ratio=nan}", 15, "ratio takes number|none, not 'nan'"),
        ("prune-blocks{blocks=3,x}", 22, "blocks takes integer,..., not 'x'"),
        ("prune-blocks{blocks=3.5}", 20, "blocks takes integer,..., not '3.5'"),
        ("prune-blocks{count=-1}", 0, "prune-blocks: count is 0 or more, got -1"),
        ("prune-blocks{count=2,}", 21, "expected a value"),
        ("prune-blocks{blocks=3 4}", 23, "several values key=a,b"),
        ("prune-blocks{count=2", 12, "this '{' is never closed"),
        ("prune-blocks{fold-norms{}", 12, "this '{' is never closed"),
        ("needy", 0, "needy needs first-one= and second="),
        ("needy{second=3}", 0, "needy needs first-one="),
        ("fold-norms prune-blocks", 11, "expected ',' or a new line"),
        ("fold-norms}", 10, "expected ',' or a new line"),
        ("=", 0, "expected a name"),
        ("quantize{=4}", 9, "expected an option"),
        ("quantize{symmetric}", 18, "expected '=' after 'symmetric'"),
        ('quantize{text="a}', 14, "this quote is never closed"),
        (r'quantize{text="\d"}', 14, "escapes of JSON only"),
        ("quantize{text=a^b}", 15, "unexpected '^'"),
        ("support.missing:Fold", 0, "No module named 'support.missing'"),
        ("support.specs:Missing", 0, "has no attribute 'Missing'"),
        ("support.specs:DType", 0, "is not a name: it must be a frozen dataclass"),
        (":Fold", 0, "write package.module:Class"),
    ],
)
def test_an_error_points_at_the_place_and_says_what_is_right(
    text: str, caret: int, message: str
) -> None:
    with pytest.raises(SpecSyntaxError, match=re.escape(message)) as caught:
        parse(text, REGISTRY)
    assert caught.value.position == caret
    assert str(caught.value).splitlines()[1:] == [f"  {text}", "  " + " " * caret + "^"]


def test_an_error_in_a_recipe_names_the_line() -> None:
    with pytest.raises(SpecSyntaxError) as caught:
        parse("fold-norms\n\tprune{count=2}\n", REGISTRY)
    assert str(caught.value).splitlines() == [
        "line 2: unknown name 'prune'; did you mean 'prune-blocks'?",
        "  \tprune{count=2}",
        "  \t^",
    ]


def test_an_unclosed_brace_in_a_recipe_is_shown_where_it_opens() -> None:
    with pytest.raises(SpecSyntaxError, match=r"^line 1: this '{' is not closed before 'fold"):
        parse("quantize{bits=4\nfold-norms\nprune-blocks{count=1}", REGISTRY)


def test_an_unknown_name_lists_the_known_ones_as_remedy() -> None:
    with pytest.raises(SpecSyntaxError) as caught:
        parse("zzz", REGISTRY)
    assert caught.value.remedy == "known: fold-norms, needy, prune-blocks, quantize"
    assert "did you mean" not in str(caught.value)


def test_an_error_calls_a_spec_by_the_base_class() -> None:
    with pytest.raises(SpecSyntaxError, match="unknown filtered 'zzz'"):
        parse("zzz", REGISTRY, base=Filtered)
    with pytest.raises(SpecSyntaxError, match=r"not a filtered: .* that derives from Filtered"):
        parse("support.specs:Fold", REGISTRY, base=Filtered)


def test_the_reason_of_a_refused_value_is_kept() -> None:
    with pytest.raises(SpecSyntaxError) as caught:
        parse("prune-blocks{count=-1}", REGISTRY)
    assert isinstance(caught.value.__cause__, ValueError)
    assert isinstance(caught.value, ModelatheError)


@dataclasses.dataclass
class Thawed:
    name = "thawed"


class Forgot(Prune):
    extra: int = 1


@pytest.mark.parametrize("kind", [Thawed, Forgot])
def test_a_class_that_is_no_frozen_dataclass_is_refused(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.specs.Given", kind, raising=False)
    with pytest.raises(SpecSyntaxError, match="must be a frozen dataclass"):
        parse("support.specs:Given", REGISTRY)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Fold(), "fold-norms"),
        (Prune(blocks=(3, 4)), "prune-blocks{blocks=3,4}"),
        (Quantize(head_bits=None), "quantize{head-bits=none}"),
        (Quantize(clip="none"), "quantize{clip=none}"),
        (Quantize(ratio=None, label="none"), 'quantize{ratio=none label="none"}'),
        (Quantize(ratio=1e-7), "quantize{ratio=1e-07}"),
        (Quantize(text="a b", tile="8..4"), 'quantize{text="a b" tile=8..4}'),
        (Quantize(only=("h.*.mlp", "lm_head")), "quantize{only=h.*.mlp,lm_head}"),
        (Quantize(keep=(), limits=(), words=()), "quantize{keep=none limits= words=}"),
        (Quantize(to="bfloat16", mixed="1"), 'quantize{to=bfloat16 mixed="1"}'),
        (Quantize(made=(1, 2)), "quantize"),
        (Quantize(flag=True), "quantize{flag=true}"),
        (Quantize(modes=("none",)), "quantize{modes=none}"),
        (Quantize(modes=()), "quantize{modes=}"),
        (Needy(first_one=1, second="x"), "needy{first-one=1 second=x}"),
    ],
)
def test_text_is_canonical_and_leaves_defaults_out(value: Prune, text: str) -> None:
    assert to_spec(value, REGISTRY) == text


def test_a_class_from_elsewhere_is_written_by_its_import_path() -> None:
    assert to_spec(Prune(count=1)) == "support.specs:Prune{count=1}"


def test_a_class_that_cannot_be_imported_is_written_by_its_name() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Local(Prune):
        pass

    assert to_spec(Local(count=1)) == "prune-blocks{count=1}"


@pytest.mark.parametrize("hint", [int | tuple[int, ...], tuple[str, ...] | str | None])
def test_an_ambiguous_field_is_a_mistake_of_its_author(hint: object) -> None:
    with pytest.raises(TypeError, match="as a tuple or as itself"):
        OptionType.of(hint)


def test_a_field_without_text_form_can_be_shown_and_not_written() -> None:
    kind = OptionType.of(dict[str, int])
    assert kind.describe() == "(from Python only)"
    assert kind.write({"a": 1}) == "\"{'a': 1}\""


def test_a_class_describes_itself() -> None:
    found = describe(Prune)
    assert (found.name, found.summary) == (
        "prune-blocks",
        "Remove blocks; give one of the two options.",
    )
    assert found.details == "The text after the first line.\n\nSource: a paper."
    assert [(o.name, o.type, o.default, o.doc) for o in found.options] == [
        ("blocks", "integer,...", "none", "which blocks, counted from 0."),
        ("count", "integer", "0", "how many."),
    ]


def test_options_of_a_parent_are_described_too() -> None:
    options = {option.name: option for option in describe(Quantize).options}
    assert options["only"].doc == "globs of module paths."
    assert (options["head-bits"].type, options["head-bits"].default) == (
        "bits|2|3|4|8|none",
        "bits",
    )
    assert "clip" in undocumented(Quantize)
    assert undocumented(Prune) == ()


def test_a_required_option_has_no_default() -> None:
    assert [option.default for option in describe(Needy).options] == [None, None]
