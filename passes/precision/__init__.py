"""Passes that change the dtype that a model computes in."""

from .convert_dtype import ConvertDtype

__all__ = ["ConvertDtype"]
