"""Files that runs find again: what a stopped one goes on from, and text that a model wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def write_whole(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that is there with all its content, or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be writing the same file.
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    try:
        save_file(dict(tensors), partial, dict(metadata or {}))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
