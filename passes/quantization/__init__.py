"""Passes that store weights in a few bits, make that cost less, or round what weights meet."""

from .assign_bits import AssignBits
from .equalize import Equalize
from .quantize_activations import QuantizeActivations
from .quantize_weights import QuantizeWeights
from .search_bits import SearchBits

__all__ = ["AssignBits", "Equalize", "QuantizeActivations", "QuantizeWeights", "SearchBits"]
