"""Passes about LayerNorm, RMSNorm and batch norm."""

from .center_residual import CenterResidual
from .fold_batch_norms import FoldBatchNorms
from .fold_norms import FoldNorms
from .fold_rep_batch_norms import FoldRepBatchNorms
from .remove_norms import RemoveNorms
from .replace_norms import ReplaceNorms

__all__ = [
    "CenterResidual",
    "FoldBatchNorms",
    "FoldNorms",
    "FoldRepBatchNorms",
    "RemoveNorms",
    "ReplaceNorms",
]
