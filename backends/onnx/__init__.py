"""The ONNX backend.

Only ``export`` is imported here: what needs onnx_ir or ONNX Runtime is imported when it is used.
"""

from .export import Onnx

__all__ = ["Onnx"]
