"""A program as a Hugging Face model folder."""

from .backend import Checkpoint

__all__ = ["Checkpoint"]
