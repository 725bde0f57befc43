"""Passes that make several places read one weight."""

from .tie_blocks import TieBlocks

__all__ = ["TieBlocks"]
