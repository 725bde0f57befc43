"""What an ONNX file holds, read without ONNX Runtime: initialisers, their hashes, operators."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .session import check_external_data, load_without_data

if TYPE_CHECKING:
    import onnx

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Initializer:
    """One stored tensor: name, element type in ONNX's words, sizes, hash of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class FileContents:
    """What one ONNX file holds."""

    opsets: dict[str, int]
    operators: dict[str, int]
    initializers: tuple[Initializer, ...]


def read_contents(path: Path, *, hashes: bool = False) -> FileContents:
    """Read an ONNX file whose external data lies in its own folder.

    Args:
        path: the file.
        hashes: hash every initialiser; it means reading all the data.

    Raises:
        StorageError: it is no ONNX file, or names data outside of its folder.
    """
    check_external_data(path)
    model = load_without_data(path)
    operators = Counter(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for node in model.graph.node
    )
    return FileContents(
        {entry.domain: entry.version for entry in model.opset_import},
        dict(operators.most_common()),
        tuple(_initializers(model, path.parent, hashes)),
    )


def graph_lines(path: Path) -> Iterator[str]:
    """Yield a line for each node: ``%y = MatMulNBits(%x, @w)``; ``@`` marks initialisers."""
    model = load_without_data(path)
    stored = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        inputs = [f"{'@' if name in stored else '%'}{name}" for name in node.input]
        outputs = ", ".join(f"%{name}" for name in node.output if name)
        yield f"{outputs} = {node.op_type}({', '.join(inputs)})"


def _initializers(model: onnx.ModelProto, folder: Path, hashes: bool) -> Iterator[Initializer]:
    import onnx

    for tensor in model.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        digest = _sha256(tensor, folder) if hashes else ""
        yield Initializer(tensor.name, kind, tuple(tensor.dims), digest)


def _sha256(tensor: onnx.TensorProto, folder: Path) -> str:
    """Return the hash of a tensor's values, wherever they are stored."""
    if tensor.data_location != tensor.EXTERNAL:
        import onnx

        raw = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        return hashlib.sha256(raw).hexdigest()
    where = {entry.key: entry.value for entry in tensor.external_data}
    path = folder / where["location"]
    offset = int(where.get("offset") or 0)
    left = int(where.get("length") or path.stat().st_size - offset)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(offset)
        while left > 0 and (chunk := stream.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
