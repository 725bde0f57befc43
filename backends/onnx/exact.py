"""An artifact with the runtime's approximations switched off, for checking what was lowered.

Roundings that the program itself asks for are no approximations.  They stay, and are told: see
``Session.codes``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..manifest import read_manifest
from .integers import CODES
from .session import OnnxSession, load_without_data

_EXACT = 1  # the accuracy level that computes in float32
_UINT8 = 2  # ONNX's number of the type


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
        yield OnnxSession(beside, {**manifest, "files": {}}, told=CODES)


def _put(path: Path, copy: Path) -> None:
    if path.suffix == ".onnx" and _rewrite(path, copy):
        return
    try:
        os.link(path, copy)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, copy)


def _rewrite(path: Path, copy: Path) -> bool:
    """Write a graph that computes in float32 and gives its codes; tell whether it differs."""
    model = load_without_data(path)
    codes = [o for node in model.graph.node for o in node.output if o.startswith(CODES)]
    for name in codes:
        output = model.graph.output.add(name=name)
        output.type.tensor_type.elem_type = _UINT8
    levels = [
        attribute
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    for level in levels:
        level.i = _EXACT
    if levels or codes:
        copy.write_bytes(model.SerializeToString())
    return bool(levels or codes)
