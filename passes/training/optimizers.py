"""Optimizers of healing, and how their rate moves over a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """Adam whose step is rescaled, tensor by tensor, to the length of the tensor.

    With Adam's direction ``u = m / (sqrt(v) + eps) + decay * w``::

        w <- w - rate * (|w| / |u|) * u

    where the ratio is 1 if either length is 0.

    Source: LAMB (arXiv 1904.00962), algorithm 2, with Adam's bias corrections.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-6})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make one step with the gradients that there are."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group, self.state[weight])

    def _move(self, weight: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        assert weight.grad is not None
        first, second = group["betas"]
        state["step"] += 1
        count = float(state["step"])
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(weight.grad, 1 - first)
        square.mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
        scale = (square / (1 - second**count)).sqrt_().add_(group["eps"])
        move = mean / (1 - first**count) / scale + group["weight_decay"] * weight
        lengths = weight.norm(), move.norm()
        ratio = torch.where((lengths[0] > 0) & (lengths[1] > 0), lengths[0] / lengths[1], 1.0)
        weight.sub_(move * ratio * group["lr"])


def make_optimizer(
    kind: str,
    parameters: Mapping[str, Tensor],
    shares: Mapping[str, float],
    rate: float,
    weight_decay: float,
    undecayed: Container[str] = (),
) -> torch.optim.Optimizer:
    """Return an optimizer with one group for each share of the learning rate.

    Args:
        kind: ``adamw`` or ``lamb``.
        parameters: by name.
        shares: share of the rate that each gets; 1 where it is not named.
        rate: the peak of the schedule.
        weight_decay: of matrices; vectors have none.
        undecayed: names of those that have none either.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in parameters.items():
        decay = weight_decay if parameter.dim() > 1 and name not in undecayed else 0.0
        groups.setdefault((shares.get(name, 1.0), decay), []).append(parameter)
    described = [
        {"params": members, "share": share, "weight_decay": decay}
        for (share, decay), members in groups.items()
    ]
    if kind == "lamb":
        return Lamb(described, lr=rate)
    return torch.optim.AdamW(described, lr=rate, betas=(0.9, 0.95))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def cosine(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak rate at a step: linear up, then half a cosine down to a tenth.

    Args:
        step: from 0.
        steps: of the whole run.
        warmup: share of the run over which the rate rises.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
