"""Exact rewrites in float64: by how much each moves the outputs of every architecture.

    python benchmarks/exactness.py [NAME ...] [--markdown]

For each tiny random model of ``architectures.py``, with gains and biases that are not 1 and 0 and
a residual stream that has a mean: the largest difference of an output, relative to the largest
value of that output, on small inputs with and without a cache and with padding.  Each pass is
judged against its own input, on what it promises to keep.

``frozen`` compares a model with itself after its norms were replaced by constants, on texts so
short that the constants can be what each norm divides by there.  ``folded`` compares norms replaced
by constants of calibration text and folded into the weights with norms that divide by the same
constants when the model runs.

Where a rewrite does not apply there is a dash, and the reason is printed below.  Exits with 1 when
a figure is above 1e-10, or an identity applies to none of the models.  ``canonicalize`` may move
outputs by 1e-9: some models write the constants of gelu with nine digits.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from architectures import ARCHITECTURES, Architecture
from tables import print_table
from torch import Tensor, fx

from modelathe.ir import ModelatheError, Norm, Program, capture
from modelathe.passes import Pass, PassContext, PassResult, all_passes
from modelathe.passes.analysis.norm_deviations import deviation, norm_deviations
from modelathe.passes.analysis.norm_placement import is_query_key_norm
from modelathe.passes.context import reads_tokens, vocabulary
from modelathe.passes.data import random_tokens
from modelathe.passes.fidelity import relative_error
from modelathe.passes.norms.first_tokens import knows_first
from modelathe.passes.norms.freezing import Constant
from modelathe.passes.norms.remove_norms import frozen, norms_by_key, refusals
from modelathe.passes.probes import Inputs, probe, probes
from modelathe.passes.spec import parse

LIMIT = 1e-10
LIMITS = {"canonicalize": 1e-9}
MEAN = 0.5  # of what writes the residual stream, whose entries deviate by about as much


class NotApplicable(Exception):  # noqa: N818
    """Why an identity has nothing to do in a model; nodes are left without their names."""

    def __init__(self, reasons: Iterable[str]) -> None:
        found = dict.fromkeys(re.sub(r"%\w+", "%..", reason) for reason in reasons)
        super().__init__("; ".join(found) or "finds nothing to do")


class Subject:
    """A model, and what passes make of it; each sequence of passes runs once."""

    def __init__(self, program: Program) -> None:
        tokens = random_tokens(vocabulary(program) or 2, 4, 12, seed=1)
        self.context = PassContext(calibration=tokens)
        self._made = {"": PassResult(program)}

    def after(self, text: str) -> Program:
        """Return the program after the passes of a text."""
        return self.result(text).program

    def result(self, text: str) -> PassResult:
        """Return what the last pass of a text makes behind the others."""
        if text not in self._made:
            result = self._made[""]
            for pass_ in parse(text, all_passes(), base=Pass):
                result = pass_(result.program, self.context)
            self._made[text] = result
        return self._made[text]


Identity = Callable[[Subject], float]


def rewrite(before: str, text: str) -> Identity:
    """Return the identity that a pass claims behind others."""

    def measure(subject: Subject) -> float:
        (pass_,) = parse(text, all_passes(), base=Pass)
        assert isinstance(pass_, Pass)
        source = subject.after(before)
        result = subject.result(f"{before},{text}" if before else text)
        if not result.modified:
            raise NotApplicable(remark.message for remark in result.remarks)
        found = result.program
        worst, compared = 0.0, 0
        for graph, inputs in probes(source):
            runs = (p.run(inputs, graph, dtype=torch.float64) for p in (source, found))
            expected, made = (pass_.kept(inputs, outputs) for outputs in runs)
            worst, compared = max(worst, movement(expected, made)), compared + len(expected)
        assert compared, f"{text} keeps nothing"
        return worst

    return measure


def movement(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Return the largest relative difference of outputs with the same names."""
    assert list(expected) == list(found)
    return max((relative_error(value, found[name]) for name, value in expected.items()), default=0)


def norms_of(program: Program) -> dict[str, Norm]:
    """Return the norms that can be replaced by constants, by key of their call.

    Raises:
        NotApplicable: the model reads no text, or there are none.
    """
    if not reads_tokens(program):
        raise NotApplicable(["reads no text"])
    refused = refusals(program, untie=True)
    found = {key: norm for key, norm in norms_by_key(program).items() if key not in refused}
    if not found:
        raise NotApplicable(refused.values())
    return found


def true_deviations(subject: Subject) -> float:
    """Compare norms with constants that are what they divide by, on texts of one or two tokens."""
    program = subject.after("canonicalize")
    norms, plan = norms_of(program), {}
    texts = {
        name: probe(program, name, batch=1, sequence=1 + knows_first(graph), source=2, past=0)
        for name, graph in program.graphs.items()
    }
    for name, inputs in texts.items():
        readers = defaultdict(list)
        for key, norm in norms.items():
            if norm.node.graph is program.graphs[name]:
                readers[norm.input].append((key, norm))

        def observe(node: fx.Node, value: Any, readers: Any = readers) -> None:
            for key, norm in readers.get(node, ()):
                found = deviation(value, norm.kind, norm.eps)
                if found.shape[:-1] == (1,) and found.shape[-1] <= 2:
                    first, *rest = found[0].tolist()
                    plan[key] = Constant(rest[0], first) if rest else Constant(first)

        program.run(inputs, name, observe, torch.float64)
    if not plan:
        raise NotApplicable(["each norm divides by several deviations at one token"])
    found = frozen(program.editable(), plan, untie=True).program
    pairs = [
        [p.run(inputs, name, dtype=torch.float64) for p in (program, found)]
        for name, inputs in texts.items()
    ]
    return max(movement(*pair) for pair in pairs)


def folded(subject: Subject) -> float:
    """Compare constants that were folded with norms that divide by them when the model runs."""
    program = subject.after("canonicalize")
    norms = norms_of(program)
    measured = norm_deviations(program, subject.context).norms
    plan = {
        key: Constant(
            measured[key].usual, measured[key].first if knows_first(norm.node.graph) else None
        )
        for key, norm in norms.items()
        if key in measured
    }
    found = frozen(program.editable(), plan, untie=True).program
    worst = 0.0
    for graph, inputs in probes(program):
        divided = Unfolded(program, {norms[key].node: plan[key] for key in plan}, inputs)
        expected = program.run(inputs, graph, dtype=torch.float64, amend=divided.amend)
        worst = max(worst, movement(expected, found.run(inputs, graph, dtype=torch.float64)))
    return worst


@dataclass(eq=False)
class Unfolded:
    """Lets norms divide by constants while a program runs."""

    program: Program
    plan: Mapping[fx.Node, Constant]
    inputs: Inputs
    values: dict[fx.Node, Tensor] = field(default_factory=dict)

    def amend(self, node: fx.Node, value: Any) -> Any:
        """Return what a norm gives with its constant; any other value as it is."""
        self.values[node] = self._divided(node) if node in self.plan else value
        return self.values[node]

    def _divided(self, node: fx.Node) -> Tensor:
        norm, constant = Norm.match(node), self.plan[node]
        assert norm is not None
        x = self.values[norm.input]
        divisor = torch.tensor(constant.usual, dtype=torch.float64)
        if constant.first is not None:
            divisor = torch.where(self._first(x)[..., None], constant.first, divisor)
        y = (x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x) / divisor
        gain, bias = (
            None if part is None else self.program.weight(part).load(torch.float64)
            for part in (norm.gain, norm.bias)
        )
        y = y if gain is None else y * gain
        return y if bias is None else y + bias

    def _first(self, x: Tensor) -> Tensor:
        if (positions := self.inputs.get("position_ids")) is not None:
            return positions == 0
        return torch.arange(x.shape[1]) == 0


FOLDED = "canonicalize,fold-norms{untie=true}"
ALL = "fold-norms{center-readers=true value-bias=true center-logits=true untie=true}"
IDENTITIES: dict[str, Identity] = {
    "canonicalize": rewrite("", "canonicalize"),
    "gains": rewrite("canonicalize", "fold-norms"),
    "untied": rewrite("canonicalize", "fold-norms{untie=true}"),
    "readers": rewrite(FOLDED, "fold-norms{gains=false center-readers=true untie=true}"),
    "values": rewrite("canonicalize", "fold-norms{gains=false value-bias=true}"),
    "logits": rewrite("canonicalize", "fold-norms{gains=false center-logits=true untie=true}"),
    "all folds": rewrite("canonicalize", ALL),
    "center": rewrite("canonicalize,fold-norms", "center-residual"),
    "center, untied": rewrite(FOLDED, "center-residual{untie=true}"),
    "batch norm": rewrite("canonicalize", "fold-batch-norms{untie=true}"),
    "RepBN": rewrite("canonicalize,replace-norms", "fold-rep-batch-norms{untie=true}"),
    "AWQ": rewrite("canonicalize", "equalize{refine=2}"),
    "smooth": rewrite("canonicalize", "equalize{kind=smooth}"),
    "keys": rewrite("canonicalize", "smooth-keys"),
    "keys, run time": rewrite("canonicalize", "smooth-keys{channels=2}"),
    "frozen": true_deviations,
    "folded": folded,
}
HEAD = ["model", "mean", *IDENTITIES]


@dataclass
class Row:
    """What came out for one architecture.

    Attributes:
        mean: of the values that norms read, as a share of their size; the smallest over the norms.
        found: movement by identity.
        reasons: why an identity does not apply.
    """

    name: str
    mean: float | None = None
    found: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """Return the row as texts."""
        mean = "" if self.mean is None else f"{self.mean:.2f}"
        figures = (f"{self.found[i]:.0e}" if i in self.found else "-" for i in IDENTITIES)
        return [self.name, mean, *figures]


def mean_of_stream(program: Program) -> float | None:
    """Return the smallest mean of what a norm reads, as a share of its root mean square."""
    shares: dict[fx.Node, float] = {}
    for name, graph in program.graphs.items():
        found = (norm for node in graph.nodes if (norm := Norm.match(node)))
        read = {norm.input for norm in found if not is_query_key_norm(norm.node)}

        def observe(node: fx.Node, value: Any, read: Any = read) -> None:
            if node in read:
                share = value.mean(-1).abs() / value.square().mean(-1).sqrt()
                shares[node] = float(share.mean())

        program.run(probe(program, name, batch=2, sequence=8, source=5, past=0), name, observe)
    return min(shares.values(), default=None)


def measure(architecture: Architecture) -> Row:
    """Return the row of one architecture."""
    row = Row(architecture.name)
    subject = Subject(capture(architecture.model(mean=MEAN)))
    row.mean = mean_of_stream(subject.after("canonicalize"))
    for name, identity in IDENTITIES.items():
        try:
            row.found[name] = identity(subject)
        except (NotApplicable, ModelatheError) as error:
            row.reasons[name] = str(error)
    return row


def print_summary(rows: list[Row]) -> list[str]:
    """Print how far each identity goes, and why not further; return what is wrong."""
    wrong = []
    for name in IDENTITIES:
        found = {row.name: row.found[name] for row in rows if name in row.found}
        worst = max(found, key=lambda model: found[model], default=None)
        most = f", at most {found[worst]:.1e} ({worst})" if worst else ""
        print(f"\n{name}: applies to {len(found)} of {len(rows)} models{most}")
        reasons = defaultdict(list)
        for row in rows:
            if why := row.reasons.get(name):
                reasons[why].append(row.name)
        for why, models in reasons.items():
            print(f"    {', '.join(models)}: {why}")
        wrong += [
            f"{name} moves {m} by {e:.1e}"
            for m, e in found.items()
            if not e <= LIMITS.get(name, LIMIT)
        ]
        if not found and len(rows) == len(ARCHITECTURES):
            wrong.append(f"{name} applies to no model")
    return wrong


def main() -> int:
    """Print the table; return 1 when something moves by more than rounding in float64."""
    rows = print_table(__doc__, HEAD, measure)
    wrong = print_summary(rows)
    count = sum(len(row.found) for row in rows)
    worst = max((error for row in rows for error in row.found.values()), default=0.0)
    print(f"\n{count} rewrites of {len(rows)} models, at most {worst:.1e}")
    for text in wrong:
        print(f"WRONG: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
