"""How far a capture is, told by what torch does on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

Report = Callable[[float], None]
Step = Callable[..., None]  # takes a number of steps; 1 unless it is given

# Shares of the seconds that a capture takes, measured on a decoder of 12 blocks; for an
# encoder-decoder they are within 0.05.  Half of it is making the graph functional.
BUILD, TRACE, DECOMPOSE, INFER = 0.08, 0.31, 0.54, 0.07


class Watch:
    """Reports the share of long work that is done, stage by stage.

    Args:
        report: called with shares from 0 to 1 that never fall; None when nobody asks.
    """

    def __init__(self, report: Report | None = None) -> None:
        self._report, self._done = report, 0.0

    @contextlib.contextmanager
    def stage(self, share: float, steps: int = 1) -> Iterator[Step]:
        """Account for a stage of the work; its value is to be called with the steps it took.

        Args:
            share: of all the work, 0 to 1.
            steps: how many are expected; the share ends there, whatever comes after.
        """
        start, taken = self._done, 0

        def step(count: int = 1) -> None:
            nonlocal taken
            taken = min(taken + count, steps)
            self._tell(start + share * taken / steps)

        yield step
        self._done = start + share
        self._tell(self._done)

    def _tell(self, done: float) -> None:
        if self._report is not None:
            self._report(min(1.0, done))

    @contextlib.contextmanager
    def tracing(self, share: float, module: nn.Module) -> Iterator[None]:
        """Account for tracing a module: a step is a call of one of its modules."""
        with self.stage(share, sum(1 for _ in module.modules())) as step:
            if self._report is None:
                yield
                return
            handle = nn.modules.module.register_module_forward_hook(lambda *_: step())
            try:
                yield
            finally:
                handle.remove()

    @contextlib.contextmanager
    def decomposing(self, share: float, exported: ExportedProgram) -> Iterator[None]:
        """Account for ``run_decompositions``: every node is interpreted twice.

        The second time takes three times as long.
        """
        once = len(exported.graph.nodes)
        with self.stage(share, 4 * once) as step:
            if self._report is None:
                yield
                return
            # It takes no observer, and interprets with a class of its own.
            original, seen = fx.Interpreter.run_node, 0

            def run_node(self: fx.Interpreter, n: fx.Node) -> Any:
                nonlocal seen
                result = original(self, n)
                seen += 1
                step(1 if seen <= once else 3)
                return result

            fx.Interpreter.run_node = run_node  # type: ignore[method-assign]
            try:
                yield
            finally:
                fx.Interpreter.run_node = original  # type: ignore[method-assign]
