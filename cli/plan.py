"""What ``run --dry-run`` says: the passes, and about how large the result will be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .screen import Screen, count_text, size_text

if TYPE_CHECKING:
    from ..backends import Backend
    from ..ir import Program
    from ..passes import Pass, Pipeline

_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


@dataclass(frozen=True, slots=True)
class Estimate:
    """About how much there is of what, by the rule of thumb.

    Attributes:
        blocks: transformer layers.
        unique: how many of them have weights of their own.
        inside: parameters of the linears in all unique blocks.
        outside: parameters of linears elsewhere, the head for one.
        rest: parameters of everything else.
        linear_bytes: of one parameter of a linear.
        rest_bytes: of one other parameter.
    """

    blocks: int
    unique: int
    inside: float
    outside: float
    rest: float
    linear_bytes: float
    rest_bytes: float

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        linear = (self.inside + self.outside) * self.linear_bytes
        return round(linear + self.rest * self.rest_bytes)

    @classmethod
    def of(cls, program: Program) -> Estimate:
        """Count a program's weights; reads none of them."""
        from ..backends.sizes import program_sizes
        from ..ir import Linear, block_of

        sizes = program_sizes(program)
        inside: dict[str, int] = {}
        outside: dict[str, int] = {}
        for graph in program.graphs.values():
            for node in graph.nodes:
                if (linear := Linear.match(node)) is None or linear.weight.op != "get_attr":
                    continue
                weight = program.weight(linear.weight)
                place = outside if block_of(node) is None else inside
                place[str(linear.weight.target)] = weight.shape[0] * weight.shape[-1]
        linears = sum(inside.values()) + sum(outside.values())
        each = sizes.bytes / max(1, sizes.parameters)
        rest = max(0, sizes.parameters - linears)
        return cls(
            sizes.blocks,
            sizes.blocks,
            sum(inside.values()),
            sum(outside.values()),
            rest,
            each,
            each,
        )

    def after(self, pass_: Pass) -> Estimate:
        """Return the estimate behind a pass; one that is not known here changes nothing."""
        rule = _RULES.get(pass_.name)
        return self if rule is None else rule(self, pass_)

    def with_blocks(self, blocks: int, unique: int) -> Estimate:
        """Return the estimate for another number of blocks."""
        share = unique / self.unique if self.unique else 1.0
        return replace(self, blocks=blocks, unique=unique, inside=self.inside * share)


def _prune(now: Estimate, pass_: Any) -> Estimate:
    gone = len(pass_.blocks) or pass_.count or 0
    left = max(0, now.blocks - gone)
    return now.with_blocks(left, min(left, now.unique))


def _tie(now: Estimate, pass_: Any) -> Estimate:
    return now.with_blocks(now.blocks, min(now.unique, pass_.unique))


def _quantize(now: Estimate, pass_: Any) -> Estimate:
    group = pass_.group_size if pass_.group_size > 0 else 1024
    bits = pass_.usual_bits
    zero = 0.0 if pass_.symmetric else bits / 8
    each = bits / 8 + (now.rest_bytes + zero) / group
    head = bits if pass_.head_bits == "bits" else pass_.head_bits
    if head is None:
        return replace(now, outside=0.0, rest=now.rest + now.outside, linear_bytes=each)
    # The head counts as so many more or fewer of the other linears' parameters.
    return replace(now, outside=now.outside * head / bits, linear_bytes=each)


def _convert(now: Estimate, pass_: Any) -> Estimate:
    each = _BYTES.get(str(pass_.to).removeprefix("torch."), now.rest_bytes)
    whole = now.linear_bytes == now.rest_bytes
    return replace(now, rest_bytes=each, linear_bytes=each if whole else now.linear_bytes)


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

    _check_required(program, pipeline)
    estimate = Estimate.of(program)
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
    return {
        "dry_run": True,
        "model": program.origin.model,
        "kind": program.kind,
        "blocks": before.blocks,
        "bytes": before.bytes,
        "parameters": round(before.inside + before.outside + before.rest),
        "passes": steps,
        "estimated_blocks": estimate.blocks,
        "estimated_bytes": estimate.bytes,
        "backend": to_spec(backend),
        "out": out,
    }


def _check_required(program: Program, pipeline: Pipeline) -> None:
    """Ask the passes that meet the model as it is, but for rounding, whether they take it.

    Those behind the first lossy pass meet another model, with fewer blocks or codes for weights.
    """
    from ..passes import Canonicalize, Fidelity

    found = Canonicalize()(program, pipeline.context).program
    for pass_ in pipeline.passes:
        pass_.requires(found)
        if pass_.fidelity is Fidelity.LOSSY:
            return


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
    screen.table(["pass", "outputs", "blocks", "about"], rows, right=["blocks", "about"])
    for step in found["passes"]:
        words = " ".join(f"{name}={value}" for name, value in step["options"].items())
        screen.say(f"  {step['pass'].partition('{')[0]}: {words or 'no options'}")
    screen.say(f"  then {found['backend']}, into {found['out'] or '(no -o given)'}")
    screen.say("nothing was written: this is a dry run")
