"""Passes about LayerNorm and RMSNorm."""

from .fold_norms import FoldNorms

__all__ = ["FoldNorms"]
