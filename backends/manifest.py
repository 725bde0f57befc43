"""manifest.json: how an artifact was made and which files belong to it.

The manifest is written last.  A folder that has one is complete, and lists every file that it owns
with its size and SHA-256; a file that it does not list belongs to somebody else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..ir.errors import StorageError
from ..passes.progress import Advance, Progress, SilentProgress

if TYPE_CHECKING:
    from ..ir import Program

MANIFEST = "manifest.json"
FORMAT = "modelathe-artifact"
FORMAT_VERSION = 1
_CHUNK = 1 << 20
_SILENT = SilentProgress()
_MODEL_FILES = (".onnx", ".data", ".safetensors", "program.json")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an artifact folder.

    Raises:
        StorageError: there is no folder, no manifest in it, or one that this version cannot read.
    """
    if not folder.is_dir():
        what = "is a file, not an artifact folder" if folder.exists() else "no such folder"
        raise StorageError(f"{folder}: {what}", remedy="give the folder that `run -o` wrote")
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(
            f"{folder}: has no {MANIFEST}, so it is not a finished artifact",
            remedy="give a folder that `modelathe run` wrote, or make one from this model first",
        ) from None
    except ValueError as error:
        raise StorageError(f"{path}: is not JSON ({error})", remedy="make it again") from error
    _check_format(path, manifest)
    return dict(manifest)


def is_artifact(folder: Path) -> bool:
    """Tell whether ``folder`` holds a manifest of ours, readable by this version or not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def write_manifest(
    folder: Path, fields: Mapping[str, Any], files: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the manifest of a folder whose other files are complete, and return it.

    A figure that is nan or infinite is null.

    Args:
        folder: where the files are.
        fields: everything but ``format``, ``format_version`` and ``files``, which are set here.
        files: their ``file_table``, if it was made already.
    """
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    files = file_table(folder, file_names(folder)) if files is None else files
    manifest = json_numbers({**head, **fields, "files": files})
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    partial = folder / f"{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(folder / MANIFEST)
    return dict(manifest)


def json_numbers(value: Any) -> Any:
    """Return a value with None for every number that JSON has no word for: nan and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_numbers(each) for key, each in value.items()}
    return [json_numbers(each) for each in value] if isinstance(value, list | tuple) else value


def file_table(
    folder: Path, names: Iterable[str], progress: Progress = _SILENT
) -> dict[str, dict[str, Any]]:
    """Return bytes and SHA-256 of files in ``folder`` by name; every byte is read."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    with progress.task("hashing files", total=sum(sizes.values())) as advance:
        return {
            name: {"bytes": size, "sha256": _sha256(folder / name, advance)}
            for name, size in sizes.items()
        }


def _sha256(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check that each file of the manifest lies inside ``folder`` with the size it should have.

    Raises:
        StorageError: a file is missing, has another size, or lies elsewhere.
    """
    for name, entry in manifest["files"].items():
        path = contained(folder, name)
        if not path.is_file():
            raise StorageError(f"{folder}: {name} is missing", remedy="make the artifact again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise StorageError(
                f"{path}: has {size} bytes, the manifest says {entry['bytes']}",
                remedy="copy the folder again, or make the artifact again",
            )


def contained(folder: Path, name: str) -> Path:
    """Return the path of ``name`` below ``folder``.

    Raises:
        StorageError: ``name`` is absolute, climbs with ``..``, or leads outside through a link.
    """
    pure = PurePosixPath(name)
    inside = bool(name) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in name
    path = folder / name
    if not inside or not path.resolve().is_relative_to(folder.resolve()):
        raise StorageError(
            f"{folder}: refers to {name!r}, which lies outside the folder",
            remedy="do not use this folder: a model must not read files from elsewhere",
        )
    return path


def listed_files(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the files that the artifact owns, manifest included."""
    return (*manifest.get("files", {}), MANIFEST)


def model_bytes(manifest: Mapping[str, Any]) -> int:
    """Return the bytes of the files that hold graphs and weights."""
    files = manifest.get("files", {}).items()
    return sum(entry["bytes"] for name, entry in files if name.endswith(_MODEL_FILES))


def _check_format(path: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StorageError(
            f"{path}: is not a {FORMAT} manifest", remedy="give a folder that modelathe wrote"
        )
    version = manifest.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StorageError(
            f"{path}: format version {version}, this modelathe reads up to {FORMAT_VERSION}",
            remedy="upgrade modelathe",
        )
    missing = [key for key in ("backend", "kind", "signatures", "files") if key not in manifest]
    if missing:
        raise StorageError(f"{path}: lacks {', '.join(missing)}", remedy="make the artifact again")


def file_names(folder: Path) -> list[str]:
    """Return the names of all files below ``folder``, manifest left out."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in (MANIFEST, f"{MANIFEST}.partial"))


def program_signatures(program: Program) -> dict[str, Any]:
    """Return what the manifest says of each graph: name, dtype and sizes of inputs and outputs.

    ``sizes`` are those that a user's own module was captured with.
    """
    return {name: _graph_entries(program, name) for name in program.graphs}


def _graph_entries(program: Program, name: str) -> dict[str, Any]:
    from ..ir.infer import size_hints

    signature, graph = program.signatures[name], program.graphs[name]
    placeholders = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    names: dict[str, str] = {}
    inputs = []
    for key in signature.inputs:
        value = placeholders[key].meta["val"]
        dims = signature.dims.get(key) or tuple(map(_size_text, value.shape))
        for size, dim in zip(value.shape, dims, strict=True):
            if isinstance(dim, str) and "+" not in dim and not isinstance(size, int):
                names[str(size)] = dim
        inputs.append(_entry(key, value, dims))
    (results,) = graph.find_nodes(op="output")
    values = [node.meta["val"] for node in results.args[0]]
    outputs = [
        _entry(key, value, [_named(size, names) for size in value.shape])
        for key, value in zip(signature.outputs, values, strict=True)
    ]
    sizes = size_hints(graph, signature) if program.kind == "module" else {}
    return {"inputs": inputs, "outputs": outputs, **({"sizes": sizes} if sizes else {})}


def _entry(name: str, value: Any, dims: Iterable[int | str]) -> dict[str, Any]:
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(dims)}


def _named(size: Any, names: Mapping[str, str]) -> int | str:
    """Return a size with its symbols (``s27 + s3``) called by the names that the inputs have."""
    if isinstance(size, int):
        return size
    return re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), str(size))


def _size_text(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)
