"""Passes that store weights in a few bits, or make that cost less."""

from .assign_bits import AssignBits
from .equalize import Equalize
from .quantize_weights import QuantizeWeights
from .search_bits import SearchBits

__all__ = ["AssignBits", "Equalize", "QuantizeWeights", "SearchBits"]
