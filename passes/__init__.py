"""Passes, and what runs them.

``ALL_PASSES`` is the table of ours; ``all_passes`` adds those that installed packages offer under
the entry-point group ``modelathe.passes``.
"""

from __future__ import annotations

from ..ir import PassError
from .base import Fidelity, Pass, PassResult, Remark
from .cache import QuantizeCache, SmoothKeys
from .canonicalize import Canonicalize
from .context import PassContext
from .data import TokenWindows
from .depth import PruneBlocks
from .fidelity import Budget, Measured
from .norms import (
    CenterResidual,
    FoldBatchNorms,
    FoldNorms,
    FoldRepBatchNorms,
    RemoveNorms,
    ReplaceNorms,
)
from .pipeline import Pipeline, PipelineResult, Step
from .precision import ConvertDtype
from .progress import Progress, SilentProgress
from .quantization import (
    AssignBits,
    Equalize,
    QuantizeActivations,
    QuantizeWeights,
    SearchBits,
)
from .spec import parse, to_spec, with_installed
from .training import Heal
from .tying import TieBlocks

ALL_PASSES: tuple[type[Pass], ...] = (
    Canonicalize,
    FoldNorms,
    CenterResidual,
    FoldBatchNorms,
    FoldRepBatchNorms,
    ReplaceNorms,
    RemoveNorms,
    PruneBlocks,
    TieBlocks,
    Equalize,
    AssignBits,
    SearchBits,
    QuantizeWeights,
    QuantizeActivations,
    SmoothKeys,
    QuantizeCache,
    ConvertDtype,
    Heal,
)
REGISTRY: dict[str, type[Pass]] = {kind.name: kind for kind in ALL_PASSES}


def all_passes() -> dict[str, type[Pass]]:
    """Return every pass by its name: ours, and those of installed packages.

    Raises:
        PassError: an installed pass has a name that is taken, or is no pass.
    """
    return with_installed(REGISTRY, "modelathe.passes", Pass, PassError)


__all__ = [
    "ALL_PASSES",
    "REGISTRY",
    "AssignBits",
    "Budget",
    "Canonicalize",
    "CenterResidual",
    "ConvertDtype",
    "Equalize",
    "Fidelity",
    "FoldBatchNorms",
    "FoldNorms",
    "FoldRepBatchNorms",
    "Heal",
    "Measured",
    "Pass",
    "PassContext",
    "PassResult",
    "Pipeline",
    "PipelineResult",
    "Progress",
    "PruneBlocks",
    "QuantizeActivations",
    "QuantizeCache",
    "QuantizeWeights",
    "Remark",
    "RemoveNorms",
    "ReplaceNorms",
    "SearchBits",
    "SilentProgress",
    "SmoothKeys",
    "Step",
    "TieBlocks",
    "TokenWindows",
    "all_passes",
    "parse",
    "to_spec",
]
