"""What ``run --dry-run`` says: the passes, and about how large the result will be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .screen import Screen, count_text, size_text

if TYPE_CHECKING:
    from ..backends import Backend
    from ..ir import Program
    from ..passes import Pass, Pipeline
    from ..passes.quantization.readers import Shared

_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


@dataclass(frozen=True, slots=True)
class Part:
    """A weight, or all those that the passes known here leave as they are.

    Attributes:
        shared: the weight and its readers; None for the rest.
        inside: whether it lies in a transformer block.
        count: its parameters.
        row: how many of them lie side by side along the input axis.
        width: bytes of one number that is not quantised.
        bytes: of all.
        coded: whether it is quantised.
    """

    shared: Shared | None
    inside: bool
    count: float
    row: int
    width: float
    bytes: float
    coded: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """About how much there is of what, by the rule of thumb.

    Attributes:
        blocks: transformer layers.
        unique: how many of them have weights of their own.
        parts: the weights.
    """

    blocks: int
    unique: int
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return round(sum(part.bytes for part in self.parts))

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return round(sum(part.count for part in self.parts))

    @classmethod
    def of(cls, program: Program) -> Estimate:
        """Count the weights of a program in canonical form; reads none of them."""
        from ..backends.sizes import program_sizes
        from ..ir import block_of
        from ..passes.quantization.readers import find_shared

        sizes = program_sizes(program)
        parts = []
        for shared in find_shared(program):
            weight = program.weight(shared.name)
            inside = any(block_of(node) is not None for _, node in shared.readers)
            count, row = math.prod(weight.shape), weight.shape[1]
            size = weight.dtype.itemsize
            parts.append(Part(shared, inside, count, row, size, weight.bytes))
        left = max(0, sizes.parameters - round(sum(part.count for part in parts)))
        bytes_left = max(0.0, sizes.bytes - sum(part.bytes for part in parts))
        width = max((part.width for part in parts), default=4.0)
        rest = Part(None, False, left, 1, width, bytes_left)
        return cls(sizes.blocks, sizes.blocks, (*parts, rest))

    def after(self, pass_: Pass) -> Estimate:
        """Return the estimate behind a pass; one that is not known here changes nothing."""
        rule = _RULES.get(pass_.name)
        return self if rule is None else rule(self, pass_)

    def with_blocks(self, blocks: int, unique: int) -> Estimate:
        """Return the estimate for another number of blocks."""
        share = unique / self.unique if self.unique else 1.0
        parts = (
            replace(part, count=part.count * share, bytes=part.bytes * share)
            if part.inside
            else part
            for part in self.parts
        )
        return Estimate(blocks, unique, tuple(parts))

    def in_dtype(self, dtype: str) -> Estimate:
        """Return the estimate with all numbers that are not quantised in another dtype."""
        parts = (
            replace(part, width=wide, bytes=part.bytes * wide / part.width)
            if (wide := _BYTES.get(dtype)) and not part.coded
            else part
            for part in self.parts
        )
        return replace(self, parts=tuple(parts))


def _prune(now: Estimate, pass_: Any) -> Estimate:
    gone = len(pass_.blocks) or pass_.count or 0
    left = max(0, now.blocks - gone)
    return now.with_blocks(left, min(left, now.unique))


def _tie(now: Estimate, pass_: Any) -> Estimate:
    return now.with_blocks(now.blocks, min(now.unique, pass_.unique))


def _quantize(now: Estimate, pass_: Any) -> Estimate:
    return replace(now, parts=tuple(_coded(part, pass_) for part in now.parts))


def _coded(part: Part, pass_: Any) -> Part:
    from ..passes.select import chosen

    shared = part.shared
    if shared is None or part.coded or shared.obstacle:
        return part
    bits = pass_.width_of(shared)
    if bits is None or not chosen(shared.paths, pass_.only, pass_.ignore):
        return part
    group = pass_.group_size if pass_.group_size > 0 else part.row
    zero = 0.0 if pass_.symmetric else bits / 8
    beside = 0.0 if shared.embedding else (pass_.outliers or 0.0) * part.width
    each = bits / 8 + (part.width + zero) / group + beside
    return replace(part, bytes=part.count * each, coded=True)


def _convert(now: Estimate, pass_: Any) -> Estimate:
    return now.in_dtype(str(pass_.to).removeprefix("torch."))


_RULES = {
    "prune-blocks": _prune,
    "tie-blocks": _tie,
    "quantize-weights": _quantize,
    "convert-dtype": _convert,
}


def plan(program: Program, pipeline: Pipeline, backend: Backend, out: str | None) -> dict[str, Any]:
    """Return what a run would do; nothing is computed and no weight is read.

    Raises:
        PassError: a pass refuses the model outright.
    """
    from ..passes import to_spec

    estimate = Estimate.of(_canonical(program, pipeline))
    before = estimate
    steps = []
    for pass_ in pipeline.passes:
        estimate = estimate.after(pass_)
        steps.append(
            {
                "pass": to_spec(pass_),
                "fidelity": pass_.fidelity.value,
                "options": _options(pass_),
                "blocks": estimate.blocks,
                "bytes": estimate.bytes,
            }
        )
    texts = [*program.origin.passes, *map(to_spec, pipeline.passes)]
    if dtype := backend.converts_to(texts):
        estimate = estimate.in_dtype(dtype)
    return {
        "dry_run": True,
        "model": program.origin.model,
        "kind": program.kind,
        "blocks": before.blocks,
        "bytes": before.bytes,
        "parameters": before.parameters,
        "passes": steps,
        "estimated_blocks": estimate.blocks,
        "estimated_bytes": estimate.bytes,
        "backend": to_spec(backend),
        "out": out,
    }


def _canonical(program: Program, pipeline: Pipeline) -> Program:
    """Return the program in canonical form, which its first passes take.

    Asked are those that meet the model as it is, but for rounding.  Those behind the first lossy
    pass meet another model, with fewer blocks or codes for weights.
    """
    from ..passes import Canonicalize, Fidelity

    found = Canonicalize()(program, pipeline.context).program
    for pass_ in pipeline.passes:
        pass_.requires(found)
        if pass_.fidelity is Fidelity.LOSSY:
            break
    return found


def _options(pass_: Pass) -> dict[str, str]:
    from ..passes.fields import options_of

    options = options_of(type(pass_)).values()
    return {o.name: o.type.write(getattr(pass_, o.attribute)) for o in options}


def show_plan(screen: Screen, found: dict[str, Any]) -> None:
    """Print the plan for people."""
    screen.facts(
        {
            "model": f"{found['model']} ({found['kind']})",
            "blocks": found["blocks"],
            "parameters": count_text(found["parameters"]),
            "size": size_text(found["bytes"]),
        },
        title="would start from",
    )
    rows = [["(as captured)", "", found["blocks"], size_text(found["bytes"])]]
    rows += [
        [s["pass"], s["fidelity"], s["blocks"], size_text(s["bytes"])] for s in found["passes"]
    ]
    rows += [["(as written)", "", found["estimated_blocks"], size_text(found["estimated_bytes"])]]
    screen.table(["pass", "outputs", "blocks", "about"], rows, right=["blocks", "about"])
    for step in found["passes"]:
        words = " ".join(f"{name}={value}" for name, value in step["options"].items())
        screen.say(f"  {step['pass'].partition('{')[0]}: {words or 'no options'}")
    screen.say(f"  then {found['backend']}, into {found['out'] or '(no -o given)'}")
    screen.say("nothing was written: this is a dry run")
