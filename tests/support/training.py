"""Short healing runs of tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modelathe.ir import Program
from modelathe.passes import PassContext, PruneBlocks, TokenWindows
from modelathe.passes.training import trainer
from support.models import VOCABULARY, canonical

SHORT: dict[str, Any] = {"steps": 12, "batch": 32, "length": 8, "mix": 0.0, "lr": 3e-3}

_STEP = trainer.Trainer._step


def stop_training(patch: pytest.MonkeyPatch, steps: int | None, error: type[BaseException]) -> None:
    """Have training raise when a run of this process has done so many steps; None: never."""
    done = []

    def step(self: trainer.Trainer) -> None:
        if len(done) == steps:
            raise error
        done.append(1)
        _STEP(self)

    patch.setattr(trainer.Trainer, "_step", step)


def text(windows: int = 12, length: int = 8) -> TokenWindows:
    """Return windows in which every token follows from the one before."""
    start = torch.arange(windows)[:, None]
    return TokenWindows.of((start + 3 * torch.arange(length)) % VOCABULARY, "a test")


def context(**options: Any) -> PassContext:
    """Return a context with those windows as its texts."""
    return PassContext(calibration=text(), check_text=text(4), **options)


def pruned(name: str) -> Program:
    """Return a tiny model without its second block."""
    return PruneBlocks(blocks=(1,))(canonical(name), context()).program
