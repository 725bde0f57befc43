"""What rounding a block costs: to second order, and measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import Linear, PassError, Program, Weight
from ...ir.execute import Place, interpret
from ...ir.quant import QuantizedTensor, QuantType
from ..context import PassContext
from ..data import TokenWindows
from ..fidelity import Reference
from ..outputs import batches, predictions, rows_of, token_batch
from ..probes import Inputs
from ..progress import SilentProgress
from .outliers import Solved
from .store import Dequantized, Stored, store_rounded
from .units import Unit


def has_logits(program: Program) -> bool:
    """Tell whether what a model predicts are tokens, so that there is a KL."""
    return program.kind in ("decoder", "encoder-decoder")


class RoundedUnits:
    """The weights of units, each rounded to nearest in a width when that is first asked for.

    Args:
        program: is not changed.
        units: whose weights.
        group_size: neighbours that share a scale; -1: the whole row.
        symmetric: without zero points.
    """

    def __init__(
        self, program: Program, units: Sequence[Unit], group_size: int, symmetric: bool
    ) -> None:
        self.program, self.units = program, units
        self.group_size, self.symmetric = group_size, symmetric
        self._made: dict[tuple[str, int], Stored] = {}

    def tensor(self, name: str, bits: int) -> QuantizedTensor:
        """Return a weight in some width.

        Raises:
            PassError: it is not finite.
        """
        if (name, bits) not in self._made:
            stored = store_rounded(name, self.program.weight(name), self._type(bits), "none")
            self._made[name, bits] = stored
        return self._made[name, bits].load()

    def weight(self, name: str, bits: int) -> Weight:
        """Return what takes a weight's place in some width."""
        weight = self.program.weight(name)
        return Dequantized(weight, self._type(bits), lambda: Solved(self.tensor(name, bits)))

    def error(self, name: str, bits: int) -> Tensor:
        """Return what rounding adds to a weight, float32 [out, in]."""
        weight = self.program.weight(name).load(torch.float32)
        return self.tensor(name, bits).dequantize(torch.float32) - weight

    def bytes(self, unit: Unit, bits: int) -> int:
        """Return the bytes of a unit's codes, scales and zero points."""
        weights = [self.program.weight(shared.name) for shared in unit.weights]
        qtype = self._type(bits)
        return sum(qtype.nbytes(w.shape[0], w.shape[1], w.dtype) for w in weights)

    def _type(self, bits: int) -> QuantType:
        return QuantType(bits, self.group_size, self.symmetric)


class Cost:
    """Measures what widths cost on windows of text, each choice once.

    The cost is ``KL(not rounded || rounded)`` in nats per token, or for models without logits one
    minus the mean cosine of their outputs.

    Args:
        rounded: the weights.
        context: device.
        windows: int64 [windows, length].
    """

    def __init__(self, rounded: RoundedUnits, context: PassContext, windows: Tensor) -> None:
        self.rounded = rounded
        self._known: dict[tuple[tuple[int, int], ...], float] = {}
        text = TokenWindows.of(windows, "calibration")
        quiet = replace(context.fresh(), check_text=text, progress=SilentProgress())
        self._reference = Reference(rounded.program, quiet)

    def __call__(self, bits: Mapping[int, int]) -> float:
        """Return the cost of rounding some units: the number of each, and its width.

        Raises:
            PassError: outputs are not finite.
        """
        key = tuple(sorted(bits.items()))
        if key not in self._known:
            program = self.rounded.program
            trial = replace(program, weights=program.weights.copy())
            for index, width in key:
                for shared in self.rounded.units[index].weights:
                    weight = self.rounded.weight(shared.name, width)
                    trial.weights.put(shared.name, weight)
            found = self._reference.measure(trial)
            cost = found.kl if found.kl is not None else 1.0 - (found.cosine or 0.0)
            _check_finite(math.isfinite(cost))
            self._known[key] = cost
        return self._known[key]


def second_order(
    rounded: RoundedUnits, widths: Sequence[int], context: PassContext, windows: Tensor
) -> Tensor:
    """Return what rounding each unit costs to second order, float64 [units, widths].

    With g: [out] the gradient of log p(y) with respect to what a linear writes, for text y drawn
    from the model's own predictions, the mean of ``g g^T`` is the Fisher matrix, and that is the
    Hessian of the KL.  Rounding errors dW are taken to be uncorrelated, so its diagonal is enough:

        1/2 sum over linears and their numbers (o, i) of  E[g_o**2] E[x_i**2] dW[o, i]**2

    with means over tokens, x: [in] what the linear reads.  For a model without logits a random
    direction v stands for y and ``v . h / norm(h)`` for log p(y), h the mean of its output: the
    Hessian is then that of one minus the cosine.  Tokens count as independent, which they are not
    where h is a mean over them: costs are then too low, all by about the same factor.

    Args:
        rounded: the weights.
        widths: one column for each.
        context: seed, device and progress.
        windows: int64 [windows, length].

    Raises:
        PassError: outputs are not finite.
    """
    slopes = _Slopes(rounded, context.device)
    generator = torch.Generator().manual_seed(context.seed)
    count = 0
    with context.progress.task("measuring sensitivities", total=len(windows)) as advance:
        for batch in batches(windows):
            scalar, predicted = _drawn(rounded.program, batch, slopes, generator)
            scalar.backward()  # type: ignore[no-untyped-call]
            slopes.add()
            count += predicted
            advance(len(batch))
    costs = [[slopes.cost(unit, bits) / count for bits in widths] for unit in rounded.units]
    return torch.tensor(costs, dtype=torch.float64)


def _drawn(
    program: Program, rows: Tensor, slopes: _Slopes, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Return the scalar whose gradients are wanted, and of how many predictions it is a sum."""
    found = predictions(program, token_batch(program, rows), slopes.run)
    if has_logits(program):
        logs = found.log_softmax(-1).flatten(0, -2)
        _check_finite(not bool(logs.isnan().any()))
        drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)
        return logs.gather(-1, drawn.to(logs.device)).sum(), len(logs)
    _check_finite(bool(found.isfinite().all()))
    unit = torch.nn.functional.normalize(rows_of(program.kind, found).double(), dim=-1)
    direction = torch.randn(unit.shape, generator=generator, dtype=torch.float64)
    return (unit * direction.to(unit.device)).sum(), len(unit)


def _check_finite(finite: bool) -> None:
    if not finite:
        raise PassError(
            "the model's outputs are not finite on the calibration text",
            remedy="use another calibration text, or see with inspect which weights are damaged",
        )


class _Slopes:
    """Runs graphs with gradients; sums squares of what linears read, and of gradients there."""

    def __init__(self, rounded: RoundedUnits, device: str) -> None:
        self.rounded = rounded
        self.place = Place(torch.float32, None if device == "cpu" else torch.device(device))
        readers = [node for u in rounded.units for s in u.weights for _, node in s.readers]
        self.linears = {node: view for node in readers if (view := Linear.match(node)) is not None}
        self.inputs = {view.input for view in self.linears.values()}
        self.read: dict[fx.Node, Tensor] = {}
        self.written: dict[fx.Node, Tensor] = {}
        self.sums: dict[fx.Node, tuple[Tensor, Tensor, int]] = {}  # of g**2, x**2; tokens

    def run(self, inputs: Inputs, graph: str) -> dict[str, Tensor]:
        """Run a graph in float32."""
        program = self.rounded.program
        signature = program.signatures[graph]

        def load(node: fx.Node) -> Tensor:
            weight = program.weight(node)
            dtype = torch.float32 if weight.dtype.is_floating_point else None
            return self.place.tensor(weight.load(dtype))

        feed = [self.place.tensor(inputs[name]) for name in signature.inputs]
        with torch.enable_grad():
            values = interpret(program.graphs[graph], feed, load, self._observe, self.place)
        return dict(zip(signature.outputs, values, strict=True))

    def _observe(self, node: fx.Node, value: Any) -> None:
        if node in self.inputs:
            self.read[node] = value.detach()
        if node in self.linears:
            # the first ones depend on nothing that has a gradient: they begin the chain
            value.retain_grad() if value.requires_grad else value.requires_grad_()
            self.written[node] = value

    def add(self) -> None:
        """Add what the last runs left, and forget them."""
        for node, value in self.written.items():
            if value.grad is None:
                continue
            x = self.read[self.linears[node].input].flatten(0, -2)
            found = _power(value.grad.flatten(0, -2)), _power(x), len(x)
            old = self.sums.get(node)
            self.sums[node] = found if old is None else (
                old[0] + found[0], old[1] + found[1], old[2] + found[2]
            )  # fmt: skip
        self.read, self.written = {}, {}

    def cost(self, unit: Unit, bits: int) -> float:
        """Return what rounding a unit adds to the KL of all that was read."""
        total = 0.0
        for shared in unit.weights:
            squares = self.rounded.error(shared.name, bits).double().square()
            for _, node in shared.readers:
                if node in self.sums:
                    gradients, inputs, tokens = self.sums[node]
                    total += float(gradients @ squares @ inputs) / tokens
        return total / 2


def _power(rows: Tensor) -> Tensor:
    """Return the sum of squares of each column: float64 [width]."""
    return rows.double().square().sum(0).cpu()
