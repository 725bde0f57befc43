"""pyproject.toml says what the folders are."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("ir", "passes", "backends", "cli", "demo")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def folders_with_code() -> set[str]:
    """Return the dotted names of the package's folders that hold Python files."""
    files = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    return {".".join(("modelathe", *path.relative_to(ROOT).parent.parts)) for path in files}


def test_packages_are_the_folders() -> None:
    listed = set(SETUPTOOLS["packages"])
    found = {"modelathe"} | folders_with_code()
    missing, stale = sorted(found - listed), sorted(listed - found)
    where = "[tool.setuptools] packages in pyproject.toml"
    assert not missing, f"add {missing} to {where}, or they are not in the wheel"
    assert not stale, f"remove {stale} from {where}: there is no such folder with Python files"
    assert len(SETUPTOOLS["packages"]) == len(listed), f"{where} lists a package twice"


@pytest.mark.parametrize("package", sorted(folders_with_code()))
def test_every_folder_with_code_is_a_package(package: str) -> None:
    folder = ROOT.joinpath(*package.split(".")[1:])
    assert (folder / "__init__.py").exists(), f"add an __init__.py with a docstring to {folder}"


@pytest.mark.parametrize(
    ("package", "pattern"),
    [(name, glob) for name, globs in SETUPTOOLS["package-data"].items() for glob in globs],
)
def test_package_data_exists(package: str, pattern: str) -> None:
    folder = ROOT.joinpath(*package.split(".")[1:])
    assert list(folder.glob(pattern)), f"no file {pattern} in {folder}"


def test_dependencies_have_a_lower_bound_and_no_cap() -> None:
    project = PYPROJECT["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for line in project["dependencies"] + extras:
        assert ">=" in line, f"{line}: give the oldest release that was tried"
        assert not set("<~!,") & set(line), f"{line}: pins belong into constraints.txt"


def test_the_console_script_exists() -> None:
    module, function = PYPROJECT["project"]["scripts"]["modelathe"].split(":")
    tree = ast.parse((ROOT / Path(*module.split(".")[1:]) / "__init__.py").read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    assert function in names


def test_tests_are_no_package() -> None:
    # With an __init__.py pytest would import the checkout folder as a second copy of the package.
    inits = {path.parent.name for path in (ROOT / "tests").rglob("__init__.py")}
    assert inits == {"support"}
