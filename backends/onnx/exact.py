"""An artifact with the runtime's approximations switched off, for checking what was lowered."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..manifest import read_manifest
from .session import OnnxSession, load_without_data

_EXACT = 1  # the accuracy level that computes in float32


@contextlib.contextmanager
def exact_session(folder: Path) -> Iterator[OnnxSession]:
    """Open an artifact so that quantised products do not round activations to 8 bits.

    Beside the files, which are linked and not copied, lies a second version of each graph.
    """
    manifest: dict[str, Any] = read_manifest(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".exact-") as name:
        beside = Path(name)
        for path in folder.iterdir():
            if path.is_file():
                _put(path, beside / path.name)
        yield OnnxSession(beside, {**manifest, "files": {}})


def _put(path: Path, copy: Path) -> None:
    if path.suffix == ".onnx" and _rewrite(path, copy):
        return
    try:
        os.link(path, copy)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, copy)


def _rewrite(path: Path, copy: Path) -> bool:
    """Write a graph with its accuracy levels lowered; tell whether it has any."""
    model = load_without_data(path)
    levels = [
        attribute
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    for level in levels:
        level.i = _EXACT
    if levels:
        copy.write_bytes(model.SerializeToString())
    return bool(levels)
