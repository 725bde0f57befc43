"""Training a transformed model back towards what it was."""

from .heal import Heal

__all__ = ["Heal"]
