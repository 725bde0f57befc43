"""Passes that change how many blocks a model has."""

from .prune_blocks import PruneBlocks

__all__ = ["PruneBlocks"]
