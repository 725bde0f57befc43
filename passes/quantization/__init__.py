"""Passes that store weights in fewer bits."""

from .assign_bits import AssignBits
from .quantize_weights import QuantizeWeights

__all__ = ["AssignBits", "QuantizeWeights"]
