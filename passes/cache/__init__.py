"""Keys and values that a decoder keeps: rounding them, and making them easier to round."""

from .quantize_cache import QuantizeCache
from .smooth_keys import SmoothKeys

__all__ = ["QuantizeCache", "SmoothKeys"]
