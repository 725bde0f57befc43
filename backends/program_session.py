"""A Program run by torch, call by call: the oracle, and how `eager` artifacts run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, fx

from ..ir import Program
from ..ir.execute import Place, interpret
from ..passes.progress import Progress, share_task
from .manifest import check_files, program_signatures
from .session import Array, Session
from .signatures import TensorSpec


class ProgramSession(Session):
    """The graphs of a program, interpreted by torch on the CPU; weights stay in memory once read.

    With ``dtype`` all floating-point values are computed in it, whatever the program's own dtype.
    """

    def __init__(
        self,
        program: Program,
        folder: Path | None,
        manifest: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        *,
        threads: int = 0,
    ) -> None:
        super().__init__(folder, manifest, program.config)
        if threads:
            torch.set_num_threads(threads)
        self.program, self.dtype = program, dtype
        self.settings = {
            "runtime": f"torch {torch.__version__}",
            "threads": torch.get_num_threads(),
        }
        self._weights: dict[str, Tensor] = {}

    @classmethod
    def of(
        cls, program: Program, dtype: torch.dtype | None = torch.float32, *, threads: int = 0
    ) -> Self:
        """Open a program that is in memory; its tokenizer comes from where the model came from.

        As a reference it computes in float32: a 16-bit model's own rounding is not the artifact's.
        """
        manifest = {
            "kind": program.kind,
            "model": program.origin.model,
            "backend": "eager",
            "signatures": program_signatures(program),
            "files": {},
        }
        return cls(program, program.origin.folder, manifest, dtype, threads=threads)

    @classmethod
    def open(
        cls,
        folder: Path,
        manifest: Mapping[str, Any],
        *,
        threads: int,
        progress: Progress,
    ) -> Self:
        """Open an artifact folder that holds a program, or a model to capture."""
        from ..ir import capture

        check_files(folder, manifest)
        with share_task(progress, f"opening {folder}") as report:
            return cls(capture(folder, report=report), folder, manifest, threads=threads)

    def _execute(
        self, graph: str, feeds: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> dict[str, Any]:
        signature = self.program.signatures[graph]
        dtypes = {spec.name: getattr(torch, spec.dtype) for spec in self.graphs[graph].inputs}
        inputs = [self._cast(feeds[name], dtypes[name]) for name in signature.inputs]
        with torch.no_grad():
            values = interpret(
                self.program.graphs[graph], inputs, self._load, place=Place(self.dtype)
            )
        return dict(zip(signature.outputs, values, strict=True))

    def _load(self, node: fx.Node) -> Tensor:
        name = str(node.target)
        if name not in self._weights:
            weight = self.program.weight(node)
            dtype = self.dtype if weight.dtype.is_floating_point else None
            self._weights[name] = self.program.weights.as_held(name, weight.load(dtype))
        return self._weights[name]

    def _cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an input in the dtype that is computed in; numpy has no bfloat16 to give."""
        return value.to(self.dtype or dtype) if value.is_floating_point() else value

    def _to_runtime(self, array: Array) -> Tensor:
        return torch.from_numpy(np.asarray(array, order="C"))

    def _to_numpy(self, value: Any) -> Array:
        tensor: Tensor = value.detach()
        wide = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
        array: Array = wide.numpy()
        return array

    def _zeros(self, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype))
