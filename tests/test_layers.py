"""Which folder may import which.  Reading the imports is enough, except for the slow ones."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# demo is a leaf: data and its readers, which use nobody; `ir` knows the model's folder as a path.
MAY_IMPORT = {
    "demo": {"demo"},
    "ir": {"ir"},
    "passes": {"passes", "ir"},
    "backends": {"backends", "passes", "ir"},
    "cli": {"cli", "backends", "passes", "ir", "demo"},
}
BANNED = {*MAY_IMPORT, "tests", "support", "benchmarks", "modelathe"}
SLOW = ("onnx", "onnxruntime", "onnxscript", "transformers", "triton")
EMPTY_NAMES = {"utils", "helpers", "common", "misc", "core", "manager"}
FILES = sorted(path for layer in MAY_IMPORT for path in (ROOT / layer).rglob("*.py"))


def imported_layers(package: tuple[str, ...], source: str) -> set[str]:
    """Return the layers that `source`, a file of `package`, imports; absolute ones by name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [(*base, *(node.module or alias.name).split(".")) for alias in node.names]
            found |= {name[0] for name in names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            plain = [alias.name for alias in node.names]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else plain
            found |= {f"absolute {name}" for name in names if name.split(".")[0] in BANNED}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    package = path.relative_to(ROOT).parent.parts
    assert imported_layers(package, path.read_text()) <= MAY_IMPORT[package[0]]


@pytest.mark.parametrize(
    ("source", "layers"),
    [
        ("from ..ir import Program", {"ir"}),
        ("from .. import cli", {"cli"}),
        ("from .spec import parse", {"passes"}),
        ("def f():\n    from ..backends import Onnx", {"backends"}),
        ("import ir", {"absolute ir"}),
        ("import numpy, passes.spec", {"absolute passes.spec"}),
        ("from modelathe.ir import Program", {"absolute modelathe.ir"}),
        ("from support import models", {"absolute support"}),
        ("import irrelevant", set()),
    ],
)
def test_every_form_of_import_is_seen(source: str, layers: set[str]) -> None:
    assert imported_layers(("passes",), source) == layers


def test_a_file_further_down_needs_one_dot_more() -> None:
    found = imported_layers(
        ("passes", "norms"), "from ...ir import Program\nfrom ..base import Pass"
    )
    assert found == {"ir", "passes"}


def test_root_package_holds_a_docstring_only() -> None:
    assert [type(node) for node in ast.parse((ROOT / "__init__.py").read_text()).body] == [ast.Expr]


def test_slow_packages_are_imported_where_they_are_used() -> None:
    layers = [layer for layer in MAY_IMPORT if (ROOT / layer / "__init__.py").exists()]
    program = (
        f"import importlib, sys\nfor layer in {layers}:\n"
        f"    importlib.import_module('modelathe.' + layer)\n"
        f"print([name for name in {SLOW} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.strip() == "[]"


def test_names_explain_something() -> None:
    paths = [path.relative_to(ROOT) for path in FILES]
    assert not [path for path in paths if EMPTY_NAMES & {*path.parts, path.stem}]
