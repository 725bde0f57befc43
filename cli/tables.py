"""Read the tables of passes and backends from their source.

Importing them imports torch, which takes a second or more; a list of names should not.  A test
compares what is read here with what the classes say.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def read_table(layer: str, table: str) -> list[dict[str, str]] | None:
    """Return name, summary and, of passes, fidelity of each class in a table, in its order.

    Args:
        layer: ``passes`` or ``backends``.
        table: the name of the tuple of classes in the layer's ``__init__.py``.

    Returns:
        None where installed packages add to the table: those have to be imported.
    """
    if entry_points(group=f"modelathe.{layer}"):
        return None
    folder = _PACKAGE / layer
    return [_entry(_class(folder, name)) for name in _names(_parse(folder), table)]


def _parse(path: Path) -> ast.Module:
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _names(tree: ast.Module, table: str) -> Iterator[str]:
    """Yield the elements of the tuple that is assigned to ``table``."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == table for t in targets):
            value = getattr(node, "value", None)
            assert isinstance(value, ast.Tuple)
            yield from (element.id for element in value.elts if isinstance(element, ast.Name))


def _class(path: Path, name: str) -> ast.ClassDef:
    """Return the definition of a class that a package or module holds or imports."""
    tree = _parse(path)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return _class(path / Path(*str(node.module).split(".")), name)
    raise LookupError(f"{path} holds no class {name}")


def _entry(node: ast.ClassDef) -> dict[str, str]:
    values = {
        statement.target.id: statement.value
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    name, fidelity = values.get("name"), values.get("fidelity")
    assert isinstance(name, ast.Constant)
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    entry = {"name": str(name.value), "summary": summary}
    if isinstance(fidelity, ast.Attribute):
        entry["fidelity"] = fidelity.attr.lower()
    return entry
