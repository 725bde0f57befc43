"""Why a block cannot be taken out of a graph."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from ...ir import Block


def obstacles(blocks: tuple[Block, ...]) -> dict[int, str]:
    """Return the reason for each block that cannot be removed, by its number."""
    calls = Counter(block.path for block in blocks)
    found = {}
    for block in blocks:
        reason = _obstacle(block, calls[block.path])
        if reason:
            found[block.index] = f"block {block.index} ({block.key}) {reason}"
    return found


def _obstacle(block: Block, calls: int) -> str:
    if calls > 1:
        return f"is one of {calls} calls of one module, which cannot be deleted for one of them"
    if block.output is None:
        names = ", ".join(f"%{node.name}" for node in block.writes) or "nothing"
        return f"writes no one residual value: what calls outside read is {names}"
    if block.input is None:
        reads = sorted({_type(node) for node in block.reads if _is_floating(node)})
        return (
            f"writes {_type(block.output)} and reads no one value of that shape"
            f" ({', '.join(reads)}), so input and output cannot be joined"
        )
    if block.writes:
        names = ", ".join(f"%{node.name} {_type(node)}" for node in block.writes)
        return f"makes {names} for calls outside of it besides the residual value"
    return ""


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _type(node: fx.Node) -> str:
    sizes = [str(size) if isinstance(size, int) else "*" for size in node.meta["val"].shape]
    return f"[{', '.join(sizes)}]"
