"""Passes that store weights in fewer bits."""

from .quantize_weights import QuantizeWeights

__all__ = ["QuantizeWeights"]
