"""Passes that store weights in a few bits, or make that cost less."""

from .assign_bits import AssignBits
from .equalize import Equalize
from .quantize_weights import QuantizeWeights

__all__ = ["AssignBits", "Equalize", "QuantizeWeights"]
