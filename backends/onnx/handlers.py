"""The table of translations: ATen call to function.

A function takes the emitter, the node and the node's own arguments, and returns one ONNX value, a
tuple of them for a call with several results, or ``NotImplemented`` for arguments that it leaves to
others.  Calls that are not here go to torchlib.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import attention, cached, elementwise, integers, norms, products, quantized, rotary, shaping

HANDLERS: dict[Any, Callable[..., Any]] = {
    **elementwise.HANDLERS,
    **shaping.HANDLERS,
    **norms.HANDLERS,
    **products.HANDLERS,
    **attention.HANDLERS,
    **rotary.HANDLERS,
    **cached.HANDLERS,
    **quantized.HANDLERS,
    **integers.HANDLERS,
}
