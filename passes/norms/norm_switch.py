"""A norm in training that is live at first, and divides by a constant from some step on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import Norm
from ..analysis.norm_deviations import Deviation, deviation, usual_tokens
from ..training.switches import Switch
from .freezing import Constant
from .paths import ORDER, Path

_MEMORY = 0.9  # share of the running mean that a step keeps
_START, _END = 0.05, 0.4  # shares of a run between which the norms are switched off
_GAPS = {"mlp": 2.0, "query-key": 2.0, "value": 3.0, "final": 2.0}  # relative
_ENDS, _FIRST = (
    2.0,
    10.0,
)  # gaps before end-of-text tokens, then first ones, lose their own constant


class NormSwitch(Switch):
    """One norm; while it is live, a running mean of its deviation is kept.

    Args:
        norm: the call that it replaces.
        path: which of the paths it is on.
        start: the deviation to begin with; first tokens begin with a constant of their own where it
            has one for them.
        ends: whether end-of-text tokens have that too.
        end: the end-of-text tokens.
    """

    def __init__(
        self, norm: Norm, path: Path, start: Deviation, ends: bool, end: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.kind, self.eps, self.path, self.end = norm.kind, norm.eps, path, end
        first = start.first is not None
        value = start.usual if start.first is None else start.first
        self.register_buffer("usual", torch.tensor(start.usual, dtype=torch.float64))
        self.register_buffer("special", torch.tensor(value, dtype=torch.float64))
        self.register_buffer("frozen", torch.tensor(False))
        self.register_buffer("has_first", torch.tensor(first))
        self.register_buffer("has_ends", torch.tensor(first and ends and bool(end)))

    usual: Tensor
    special: Tensor
    frozen: Tensor
    has_first: Tensor
    has_ends: Tensor

    @property
    def turned(self) -> float:
        if not self.frozen:
            return 0.0
        return 0.5 if self.has_first or self.has_ends else 1.0

    @property
    def live(self) -> bool:
        return not self.frozen

    @property
    def constant(self) -> Constant:
        """What it divides by, once it is frozen."""
        first = float(self.special) if self.has_first else None
        return Constant(float(self.usual), first, bool(self.has_ends))

    def forward(self, x: Tensor, sizes: Any, *rest: Any) -> Tensor:
        """Take the arguments of ``layer_norm`` or ``rms_norm``."""
        gain: Tensor | None = rest[0] if rest else None
        bias: Tensor | None = rest[1] if self.kind == "layer" and len(rest) > 1 else None
        divisor = deviation(x, self.kind, self.eps)
        if self.frozen:
            divisor = self._constants(divisor)
        elif torch.is_grad_enabled():
            self._measure(divisor.detach())
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        y = x / divisor[..., None]
        y = y if gain is None else y * gain
        return y if bias is None else y + bias

    def _usual(self, like: Tensor) -> Tensor:
        """Return which tokens are none of the special ones."""
        if self.tokens is not None and self.tokens.shape == like.shape:
            return usual_tokens(self.tokens, self.end)
        return torch.ones_like(like, dtype=torch.bool)

    def _measure(self, divisor: Tensor) -> None:
        plain = self._usual(divisor)
        self.usual.lerp_(divisor[plain].double().mean(), 1 - _MEMORY)
        if self.has_first:
            self.special.lerp_(divisor[:, 0].double().mean(), 1 - _MEMORY)

    def _constants(self, like: Tensor) -> Tensor:
        value = torch.full_like(like, float(self.usual))
        if self.has_first:
            value[:, 0] = float(self.special)
        if self.has_ends and self.tokens is not None and self.tokens.shape == like.shape:
            value[torch.isin(self.tokens, self.tokens.new_tensor(self.end))] = float(self.special)
        return value


def turn(
    switches: Mapping[fx.Node, NormSwitch], step: int, steps: int, target: float | None, loss: float
) -> None:
    """Freeze what is due before a step, in the paper's order.

    MLP norms from the first block to the last, then the paths to queries and keys, then those to
    values, then the final norm.  Last, end-of-text tokens and then first tokens lose their own
    constants.

    Args:
        switches: by node, in graph order.
        step: from 0.
        steps: of the whole run; switching takes its first two fifths.
        target: what is due waits, one by one, for a step with a loss at or below it; none: nothing
            waits.
        loss: of the step before.
    """
    due = _due(list(switches.values()))
    for time, switch, name in due:
        if step < steps * (_START + (_END - _START) * time / due[-1][0]):
            return
        flag: Tensor = getattr(switch, name)
        wanted = name == "frozen"
        if bool(flag) is wanted:
            continue
        if target is not None and loss > target:
            return
        flag.fill_(wanted)
        if target is not None:
            return


def _due(switches: list[NormSwitch]) -> list[tuple[float, NormSwitch, str]]:
    """Return when, on a scale of its own, which flag of which switch is turned."""
    time, events = 0.0, []
    for path in ORDER:
        for switch in switches:
            if switch.path == path:
                events.append((time, switch, "frozen"))
                time += _GAPS[path]
    for name, gap in (("has_ends", _ENDS), ("has_first", _FIRST)):
        time += gap
        events += [(time, switch, name) for switch in switches]
    return events
