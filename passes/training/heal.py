"""Train a transformed model back towards the model it was made from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx, nn

from ...ir import (
    Norm,
    PassError,
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
    TensorWeight,
    find_blocks,
    fingerprint,
    is_weight,
    last_made,
)
from ..base import Fidelity, Pass, PassContext, PassResult, Remark
from ..context import maximum_length, reads_tokens
from ..outputs import runner
from ..spec import to_spec
from .adapters import LowRank, add_low_rank, merged_weight
from .batches import Batches, training_batches
from .optimizers import make_optimizer
from .penalty import deviation_penalty
from .shares import call_shares, depth_shares, size_shares
from .switches import Switch, by_key, marked_passes, put_switches
from .trainer import Plan, Record, Student, Trainer

Trained = Literal["full", "lora", "norms", "scales"]

_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("tokens", "steps", "batch", "rank"), lambda v: v >= 1, "at least 1"),
    (("length",), lambda v: v >= 2, "at least 2"),
    (("lr",), lambda v: v > 0, "above 0"),
    (("mix", "warmup"), lambda v: 0 <= v <= 1, "a share from 0 to 1"),
    (("layer_decay",), lambda v: 0 < v <= 1, "above 0 and at most 1"),
    (("weight_decay", "auxiliary", "patience"), lambda v: v >= 0, "at least 0"),
)


@dataclass(frozen=True, kw_only=True)
class Heal(Pass):
    """Train what earlier passes changed, by distillation from the untouched model.

    With teacher p (the model as it was captured) and student q, per token of a window::

        decoder:  KL(p || q) = sum_v p(v) (log p(v) - log q(v))
        others:   1 - cos(h, h') + mean((h - h')**2)     h: the first output, such as the last
                                                             hidden states of an encoder

    The text is the calibration text without the tenth that checks read, cut anew for every epoch;
    of a decoder's batches the share ``mix`` is text that the untouched model writes itself, at
    temperature 1 after a random token: what heals on one text alone does not heal on others.
    Commands keep that text between runs, in ``~/.cache/modelathe`` or the folder that the variable
    MODELATHE_CACHE names (``none``: nowhere), at most 256 MB of it; the folder may be deleted.  5 %
    of both are never trained on; they judge the run twelve times, and the best weights are kept.

    Training is in float32 whatever the program's dtype, and on the CPU: on another device only the
    untouched model runs.  Trained weights go back rounded to the
    dtype that they had, tied ones still tied.  Calls that an earlier pass marked for it
    (``schedule=progressive``) are turned on the way.  After ``remove-norms`` the loss has a term
    that keeps tokens at one deviation s, which a frozen norm needs, on the residual stream behind
    the last block: ``auxiliary * mean_t (s_t - mean(s))**2``.  A weight that multiplies larger
    values than norms give, such as the residual stream itself, has a lower rate: divided by the
    median of their sizes in the first batch.

    Refuses a program with an operator that has no gradient, one that reads no text, and weights
    to train of which there are none.

    Attributes:
        tokens: to train on, at most.
        steps: instead of ``tokens``.
        batch: tokens in a step, in whole windows.
        length: tokens in a window; none: the context's calibration length, at most the model's.
        lr: peak of the learning rate; none: min(6e-4, 0.3 / width), ten times that for lora, a
            twentieth for scales.  What marked calls learn (a RepBN) gets the rate of full weights:
            a tenth of it with lora, twenty times it with scales.  Scales get a twentieth with
            full, too.
        weights: full: every parameter; lora: a low-rank update of every linear whose weight
            nothing else reads, merged at the end; norms: gains and biases of norms; scales: the
            scales of quantised weights.
        rank: of lora.
        mix: share of every batch that the untouched model wrote, 0 to 1 (the whole of it where no
            text is given); none: 0.5 on decoders, and 0 on others, which write none.
        optimizer: adamw, or lamb, which scales each tensor's step to the tensor's length.
        weight_decay: of matrices that are no scales.
        warmup: share of the steps over which the rate rises; it falls to a tenth, as a cosine.
        layer_decay: factor on the rate for each block further from the end.
        auxiliary: weight of the term for removed norms; none: 0.1 after ``remove-norms``.
        patience: judgements without improvement after which training stops; 0: never.

    Source: distillation, arXiv 1503.02531; the term for removed norms, arXiv 2507.02559; low-rank
    updates, arXiv 2106.09685; LAMB, arXiv 1904.00962.
    """

    name: ClassVar[str] = "heal"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    heals: ClassVar[bool] = True

    tokens: int = 1_000_000
    steps: int | None = None
    batch: int = 2048
    length: int | None = None
    lr: float | None = None
    weights: Trained = "full"
    rank: int = 16
    mix: float | None = None
    optimizer: Literal["adamw", "lamb"] = "adamw"
    weight_decay: float = 0.0
    warmup: float = 0.05
    layer_decay: float = 1.0
    auxiliary: float | None = None
    patience: int = 4

    def __post_init__(self) -> None:
        for names, legal, said in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not (legal(value) and math.isfinite(value)):
                    raise ValueError(f"{name} is {said}, got {value}")
        if self.weights != "lora" and self.rank != type(self).rank:
            raise ValueError(f"rank is of weights=lora, and weights is {self.weights}")
        if self.steps is not None and self.tokens != type(self).tokens:
            raise ValueError("tokens and steps say the same: give one of them")

    def requires(self, program: Program) -> None:
        if not reads_tokens(program):
            raise PassError(
                f"heal: {program.origin.model} ({program.kind}) reads no text to train on",
                remedy="train it with program.bind(), which is a module with gradients",
            )
        if self.mix and program.kind != "decoder":
            raise PassError(
                f"heal: mix={self.mix:g}, and {program.origin.model} ({program.kind}) writes no "
                "text to mix in",
                remedy="leave mix out",
            )
        if self.auxiliary and not _removed_norms(program):
            raise PassError(
                f"heal: auxiliary={self.auxiliary:g} is for norms that were removed, and none was",
                remedy="leave auxiliary out, or put remove-norms before",
            )
        if program.origin.recapture is None:
            raise PassError(
                "heal: the untouched model is not there to learn from",
                remedy="start from the source model, not from a saved result without it",
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        if context.device != "cpu":
            context.progress.note(f"heal trains on the CPU; {context.device} runs the teacher only")
        original = context.reference(program)
        batches = self._batches(program, context)
        trainee = program.editable()
        switches = put_switches(trainee, context)
        updates, left_out = self._updates(trainee, context.seed)
        student = Student(trainee)
        trained = self._chosen(program, student, updates)
        single = {node: switch for group in switches.values() for node, switch in group.items()}
        learned, shares = self._learned(trainee, single)
        scales = _scales(program)
        shares |= self._shares(program, batches, context, scales)
        for name, update in updates.items():
            shares |= {f"{name}.{part}": shares[name] for part, _ in update.named_parameters()}
        steps = self.steps or max(1, self.tokens // batches.tokens)
        rate = self._rate(program)
        optimizer = make_optimizer(
            self.optimizer, {**trained, **learned}, shares, rate, self.weight_decay, scales
        )
        plan = Plan(
            steps=steps,
            rate=rate,
            warmup=self.warmup,
            patience=self.patience,
            before=_turning(program, switches, steps),
            switches=tuple(single.values()),
            penalty=self._penalty(program, trainee),
            key=self._key(program, context, batches),
        )
        trainer = Trainer(
            student,
            optimizer,
            (original, runner(original, context.device)),
            batches,
            plan,
            context.progress,
            context.state,
        )
        record = trainer.run()
        _put_back(program, student, updates, trained)
        remarks = [Remark("applied", "weights", _summary(record, steps, batches, len(trained)))]
        remarks += left_out
        for text, pass_ in marked_passes(program).items():
            settled = pass_.settle(program, by_key(trainee, switches[text]))
            program = settled.program
            remarks += settled.remarks
        details = {"curve": record.curve, "steps": record.step, "rate": rate}
        return PassResult(program, tuple(remarks), details)

    def _batches(self, program: Program, context: PassContext) -> Batches:
        longest = maximum_length(program) or context.calibration_length
        length = min(self.length or context.calibration_length, longest)
        if self.steps is None and self.tokens < length:
            raise PassError(
                f"heal: tokens={self.tokens} are less than one window of {length}",
                remedy="give more tokens, or a smaller length=",
            )
        tokens = self.steps * self.batch if self.steps else self.tokens
        usual = _MIX if program.kind == "decoder" else 0.0
        mix = usual if self.mix is None else self.mix
        return training_batches(
            program, context, tokens=tokens, batch=min(self.batch, tokens), length=length, mix=mix
        )

    def _shares(
        self, program: Program, batches: Batches, context: PassContext, scales: set[str]
    ) -> dict[str, float]:
        """Return the share of the rate that each weight gets."""
        sizes = size_shares(program, batches.at(0), context.device)
        if self.weights == "full":
            sizes |= {name: _RATES["scales"] * sizes.get(name, 1.0) for name in scales}
        depths = depth_shares(program, self.layer_decay)
        return {name: share * sizes.get(name, 1.0) for name, share in depths.items()}

    def _updates(self, trainee: Program, seed: int) -> tuple[dict[str, LowRank], list[Remark]]:
        return add_low_rank(trainee, self.rank, seed) if self.weights == "lora" else ({}, [])

    def _chosen(
        self, program: Program, student: Student, updates: Mapping[str, LowRank]
    ) -> dict[str, nn.Parameter]:
        """Return what is trained, by name, and freeze everything else.

        Raises:
            PassError: there is nothing of that kind.
        """
        weights = student.weights()
        wanted = {"full": set(weights), "norms": _norms(program), "scales": _scales(program)}
        names = wanted.get(self.weights, set())
        for name, parameter in weights.items():
            parameter.requires_grad_(name in names)
        chosen = {name: weights[name] for name in sorted(names & set(weights))}
        for name, update in updates.items():
            chosen |= {f"{name}.{part}": value for part, value in update.named_parameters()}
        if not chosen:
            raise PassError(
                f"heal: {program.origin.model} has no {_MEANT[self.weights]} to train",
                remedy="choose others with weights=full|lora|norms|scales",
            )
        return chosen

    def _learned(
        self, trainee: Program, switches: Mapping[fx.Node, Switch]
    ) -> tuple[dict[str, nn.Parameter], dict[str, float]]:
        """Return what switches learn, by name, and the share of the rate that it gets."""
        depths = call_shares(trainee, self.layer_decay)
        learned, shares = {}, {}
        for number, (node, switch) in enumerate(switches.items()):
            for name, parameter in switch.named_parameters():
                learned[f"switch.{number}.{name}"] = parameter
                shares[f"switch.{number}.{name}"] = depths[node] / _RATES.get(self.weights, 1.0)
        return learned, shares

    def _rate(self, program: Program) -> float:
        if self.lr is not None:
            return self.lr
        return min(6e-4, 0.3 / _width(program)) * _RATES.get(self.weights, 1.0)

    def _penalty(self, program: Program, trainee: Program) -> Any:
        usual = _AUXILIARY if _removed_norms(program) else 0.0
        factor = usual if self.auxiliary is None else self.auxiliary
        return deviation_penalty(program, trainee, factor) if factor else None

    def _key(self, program: Program, context: PassContext, batches: Batches) -> str:
        """Return what tells this run from others: what is trained, on what, and how."""
        digest = hashlib.sha256(f"{to_spec(self)}\n{fingerprint(program)}\n".encode())
        digest.update(f"{program.origin.source}\n{context.seed}\n".encode())
        for windows in batches.sources.values():
            digest.update(windows.tokens.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


_MIX = 0.5
_AUXILIARY = 0.1  # weight of its term, after remove-norms
_RATES = {"lora": 10.0, "scales": 0.05}  # as multiples of the rate of full weights
_MEANT = {
    "full": "parameter",
    "lora": "linear with a weight of its own",
    "norms": "norm with a gain",
    "scales": "quantised weight",
}


def _removed_norms(program: Program) -> bool:
    """Tell whether ``remove-norms`` froze norms, or marked some to be frozen."""
    return any(
        step["pass"].partition("{")[0] == "remove-norms"
        and any(remark.startswith("applied") for remark in step["remarks"])
        for step in program.origin.record.get("steps", ())
    )


def _turning(
    program: Program, switches: Mapping[str, Mapping[fx.Node, Switch]], steps: int
) -> Callable[[int, float], None]:
    passes = marked_passes(program)

    def turn(step: int, loss: float) -> None:
        for text, group in switches.items():
            passes[text].turn(group, step, steps, loss)

    return turn


def _width(program: Program) -> int:
    """Return the width of the residual stream; 512 where no block writes one."""
    return max(
        (
            int(block.output.meta["val"].shape[-1])
            for graph in program.graphs.values()
            for block in find_blocks(graph)
            if block.output is not None
        ),
        default=512,
    )


def _norms(program: Program) -> set[str]:
    found = set()
    for graph in program.graphs.values():
        for node in graph.nodes:
            if (norm := Norm.match(node)) is not None:
                found |= {str(p.target) for p in (norm.gain, norm.bias) if is_weight(p) and p}
    return found


def _scales(program: Program) -> set[str]:
    found = set()
    for graph in program.graphs.values():
        for node in graph.nodes:
            call = QuantizedLinear.match(node) or QuantizedEmbedding.match(node)
            if call is not None:
                found.add(str(call.scales.target))
    return found


def _put_back(
    program: Program,
    student: Student,
    updates: Mapping[str, LowRank],
    trained: Mapping[str, nn.Parameter],
) -> None:
    """Give the program the trained weights, under names of their own."""
    names = {}
    for name, parameter in trained.items():
        if name in program.weights:
            dtype = program.weights[name].dtype
            value = TensorWeight(parameter.detach().to(dtype))
            names[name] = program.add_weight(_healed(name), value)
    for name, update in updates.items():
        names[name] = program.add_weight(_healed(name), merged_weight(program, name, update))
    for graph in program.graphs.values():
        for node in graph.find_nodes(op="get_attr"):
            node.target = names.get(str(node.target), node.target)


def _healed(name: str) -> str:
    return name if last_made(name, "healed") else f"{name}.healed"


def _summary(record: Record, steps: int, batches: Batches, count: int) -> str:
    first, last = _held_out(record.curve[0]), _held_out(record.curve[-1])
    kept = record.best if math.isfinite(record.best) else last
    early = f" (stopped early, of {steps})" if record.step < steps else ""
    return (
        f"trained {count} tensors for {record.step} steps{early} on "
        f"{record.step * batches.tokens} tokens of {' and '.join(batches.sources)}: "
        f"held-out loss {first:.4g} -> {kept:.4g}"
    )


def _held_out(point: Mapping[str, float]) -> float:
    values = [value for name, value in point.items() if name in ("text", "generated")]
    return sum(values) / len(values)
