"""The training loop of healing: distil, judge, stop early, keep what a stopped run goes on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ir import DataError, PassError, Program, SafetensorsFile
from ...ir.execute import Bound
from ..context import vocabulary
from ..metrics import kl_rows
from ..outputs import Runner, predicting, predictions, token_batch
from ..probes import Inputs
from ..progress import Progress
from ..state import write_whole
from .batches import Batches
from .optimizers import cosine, set_rate
from .switches import Switch

_LOGITS = 1 << 28  # bytes of predictions held at once; a batch beyond it is read in parts
_SAVE_SECONDS = 60.0
_JUDGEMENTS = 12  # how often a run is judged


class Student(nn.Module):
    """A program in training: every graph bound, over one set of float32 parameters.

    Args:
        program: an editable copy; some of its calls may be modules of the training's own.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.graphs = nn.ModuleDict()
        bound: tuple[Bound, ...] = ()
        for name in program.graphs:
            graph = Bound(program, name, torch.float32, bound)
            self.graphs[name] = graph
            bound = (*bound, graph)
        self.calls = nn.ModuleList(
            dict.fromkeys(
                node.target
                for graph in program.graphs.values()
                for node in graph.nodes
                if isinstance(node.target, nn.Module)
            )
        )

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the program's parameters by their names there."""
        return {
            key.replace("/", "."): parameter
            for graph in self.graphs.values()
            for key, parameter in graph.named_parameters()
        }

    def learned(self) -> dict[str, Tensor]:
        """Return all that training changes: parameters with a gradient, and what calls measure."""
        found: dict[str, Tensor] = {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }
        measured = {f"calls.{name}": value for name, value in self.calls.named_buffers()}
        return {**found, **measured}

    def check_gradients(self) -> None:
        """Check that everything trained that has a part in predictions was given a gradient.

        Raises:
            PassError: something was not.
        """
        weights, part = self.weights(), predicting(self.program)
        for node in (node for graph in self.program.graphs.values() for node in graph.nodes):
            held = weights.get(str(node.target)) if node.op == "get_attr" else None
            found = [] if held is None else [held]
            if isinstance(node.target, nn.Module):
                found = list(node.target.parameters())
            if node in part and any(each.requires_grad and each.grad is None for each in found):
                raise PassError(
                    f"heal: no gradient reaches %{node.name}, "
                    "since an operator between it and the predictions has none",
                    remedy="run the pass that put the operator there behind heal",
                )

    def runner(self, observe: Callable[[fx.Node, Any], None] | None = None) -> Runner:
        """Return what runs a graph with gradients; ``observe`` is told every value."""

        def run(inputs: Inputs, graph: str) -> Mapping[str, Tensor]:
            signature = self.program.signatures[graph]
            given = [inputs[name] for name in signature.inputs]
            values = self.graphs[graph](*given, observe=observe)
            return dict(zip(signature.outputs, values, strict=True))

        return run


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does.

    Attributes:
        steps: at most.
        rate: the peak of the learning rate.
        warmup: share of the steps over which it rises.
        patience: judgements without a better one after which a run stops; 0: never.
        before: called before every step, with the step and the loss of the last one.
        switches: what changes on the way.  Judgements are compared only where all of it has.
        penalty: adds to the loss of a part of a batch, or None; it is given the windows, and
            returns what observes the values and what to add afterwards.
        key: identifies the run, so that no other one's state is gone on from.
    """

    steps: int
    rate: float
    warmup: float
    patience: int
    before: Callable[[int, float], None]
    switches: Sequence[Switch]
    penalty: Callable[[Tensor], tuple[Callable[[fx.Node, Any], None], Callable[[], Tensor]]] | None
    key: str


@dataclass
class Record:
    """How far a run is, and how it went; saved with its weights.

    Attributes:
        step: how many steps are done.
        loss: of the last step, per token.
        curve: one point per judgement: step, tokens, training loss, how far switches are turned on
            average and how many are live, held-out loss by source.
        best: the lowest mean held-out loss.
        bad: judgements since then.
        since: sum of the losses since the last judgement, and their number.
    """

    step: int = 0
    loss: float = math.inf
    curve: list[dict[str, float]] = field(default_factory=list)
    best: float = math.inf
    bad: int = 0
    since: tuple[float, int] = (0.0, 0)


class Trainer:
    """Trains a student towards a teacher's predictions.

    Args:
        student: what is trained.
        optimizer: over its parameters.
        teacher: a program that says what inputs there are, and what runs its graphs, without
            gradients.
        batches: what is read.
        plan: the schedule.
        progress: who is told.
        state: a folder to save in; None saves nothing.
    """

    def __init__(
        self,
        student: Student,
        optimizer: torch.optim.Optimizer,
        teacher: tuple[Program, Runner],
        batches: Batches,
        plan: Plan,
        progress: Progress,
        state: Path | None,
    ) -> None:
        self.student, self.optimizer, self.batches = student, optimizer, batches
        self.teacher, self.plan, self.progress = teacher, plan, progress
        self.file = None if state is None else state / f"heal-{plan.key}.safetensors"
        self.record = Record()
        self.best: dict[str, Tensor] = {}
        self.kind = student.program.kind

    def run(self) -> Record:
        """Train to the end, or until it gets no better, and leave the best weights in the student.

        Raises:
            DataError: a loss or a gradient is not finite.
        """
        self._go_on()
        record, steps = self.record, self.plan.steps
        every = max(1, math.ceil(steps / _JUDGEMENTS))
        saved = time.monotonic()
        with self.progress.task("healing", total=steps) as advance:
            advance(record.step)
            if record.step == 0 and not record.curve:
                self._judge()
            while record.step < steps and not self._hopeless():
                self._step()
                advance(1)
                if record.step % every == 0 or record.step == steps:
                    self._judge()
                    self._save()
                    saved = time.monotonic()
                elif time.monotonic() - saved > _SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
        with torch.no_grad():
            for name, value in self.student.learned().items():
                value.copy_(self.best[name])
        return record

    def _hopeless(self) -> bool:
        return 0 < self.plan.patience <= self.record.bad

    def _step(self) -> None:
        record, plan = self.record, self.plan
        plan.before(record.step, record.loss)
        set_rate(self.optimizer, plan.rate * cosine(record.step, plan.steps, plan.warmup))
        windows = self.batches.at(record.step)
        self.student.train()
        total = 0.0
        for part in torch.split(windows, self._rows(windows.shape[1])):
            loss, extra = self._loss(part)
            total += float(loss.detach()) * len(part) / len(windows)
            share = (loss + extra) * (len(part) / len(windows))
            if share.requires_grad:  # else the check below says why not
                torch.autograd.backward([share])
        if record.step == 0:
            self.student.check_gradients()
        self._check_finite("training loss", total)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        length = float(nn.utils.clip_grad_norm_(parameters, 1.0))
        self._check_finite("gradient", length)  # of a loss that is finite it need not be
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        record.step += 1
        record.loss = total
        record.since = (record.since[0] + total, record.since[1] + 1)

    def _check_finite(self, what: str, value: float) -> None:
        """Stop where nothing can be learned from a number.

        Raises:
            DataError: it is not finite.
        """
        if math.isfinite(value):
            return
        if self.record.step == 0:
            raise DataError(
                f"healing: the {what} is {value} before anything was trained",
                remedy="change less at once before heal, norms with schedule=progressive",
            )
        raise DataError(
            f"healing: the {what} is {value} after {self.record.step} steps",
            remedy="use a lower rate: lr="
            + (", or let calls wait: target-kl of remove-norms" if self.plan.switches else ""),
        )

    def _loss(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss per token, and the penalty."""
        expected = self._predict(self.teacher[0], windows, self.teacher[1])
        observe, penalty = self.plan.penalty(windows) if self.plan.penalty else (None, None)
        found = self._predict(self.student.program, windows, self.student.runner(observe))
        loss = distance(self.kind, expected, found).mean()
        return loss, penalty() if penalty else loss.new_zeros(())

    def _predict(self, program: Program, windows: Tensor, run: Runner) -> Tensor:
        for call in self.student.calls:
            call.tokens = windows
        return predictions(program, token_batch(program, windows), run)

    def _rows(self, length: int) -> int:
        width = vocabulary(self.student.program) or 4096
        return max(1, _LOGITS // (4 * width * length))

    @torch.no_grad()
    def _judge(self) -> None:
        """Measure the held-out windows; keep the weights when they are the best so far.

        Raises:
            DataError: the loss is not finite.
        """
        self.student.eval()
        point: dict[str, float] = {"step": self.record.step}
        point["tokens"] = self.record.step * self.batches.tokens
        total, count = self.record.since
        if count:
            point["training"] = total / count
        self.record.since = (0.0, 0)
        losses = {}
        for name, windows in self.batches.held_out.items():
            parts = torch.split(windows, self._rows(windows.shape[1]))
            sums = [float(self._loss(part)[0]) * len(part) for part in parts]
            losses[name] = sum(sums) / len(windows)
        mean = sum(losses.values()) / len(losses)
        self._check_finite("held-out loss", mean)
        turned = 1.0
        if switches := self.plan.switches:
            turned = point["turned"] = sum(switch.turned for switch in switches) / len(switches)
            point["live"] = sum(switch.live for switch in switches)
        self.record.curve.append({**point, **losses})
        if turned == 1.0:
            better = mean < self.record.best
            self.record.bad = 0 if better else self.record.bad + 1
            self.record.best = min(mean, self.record.best)
        if self.record.bad == 0:
            self.best = {n: v.detach().clone() for n, v in self.student.learned().items()}

    def _save(self) -> None:
        if self.file is None:
            return
        tensors = {f"now.{name}": value.detach() for name, value in self.student.learned().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for index, held in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in held.items()}
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        write_whole(self.file, contiguous, {"record": json.dumps(asdict(self.record))})

    def _go_on(self) -> None:
        """Go on from what an earlier run with the same key saved, if there is anything."""
        if self.file is None or not self.file.is_file():
            return
        file = SafetensorsFile(self.file)
        content = json.loads(file.metadata["record"])
        self.record = Record(**{**content, "since": tuple(content["since"])})
        with torch.no_grad():
            for name, value in self.student.learned().items():
                value.copy_(file.load(f"now.{name}"))
                self.best[name] = file.load(f"best.{name}").clone()
        state: dict[int, dict[str, Tensor]] = {}
        for key in file.keys:
            part, _, rest = key.partition(".")
            if part == "optimizer":
                index, _, name = rest.partition(".")
                state.setdefault(int(index), {})[name] = file.load(key).clone()
        described = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**described, "state": state})


def distance(kind: str, expected: Tensor, found: Tensor) -> Tensor:
    """Return the loss per token, [rows, length].

    ``KL(teacher || student)`` of the next token in nats where a decoder makes it, else
    ``1 - cos(h, h') + mean((h - h')**2)``.

    Args:
        kind: of the program.
        expected: the teacher's, [rows, length, width].
        found: the student's.
    """
    if kind not in ("decoder", "encoder-decoder"):
        cosine_ = nn.functional.cosine_similarity(expected, found, dim=-1)
        return 1 - cosine_ + (expected - found).square().mean(-1)
    return kl_rows(torch.log_softmax(expected, -1), torch.log_softmax(found, -1))
