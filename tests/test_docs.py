"""What the documents show works: README's Python blocks, and the doctests of the package."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
import types
from pathlib import Path

import pytest

from modelathe.passes import all_passes
from support.artifacts import WORDS
from support.word_models import write_llama

ROOT = Path(__file__).parents[1]
LAYERS = ("ir", "passes", "backends", "cli", "demo")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
WITH_DOCTESTS = sorted(
    path for layer in LAYERS for path in (ROOT / layer).rglob("*.py") if ">>> " in path.read_text()
)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as README assumes it: a model and a text; the current one."""
    write_llama(tmp_path / "path" / "to" / "model", attention_bias=True)
    sentence = " ".join(WORDS[:10])
    (tmp_path / "text.txt").write_text("\n".join([sentence, sentence[::-1]] * 600))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_in_the_readme_runs(
    number: int, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block by itself, as a module, from the first line to the last."""
    source = BLOCKS[number]
    module = types.ModuleType(f"readme_{number}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, f"README.md, Python block {number}", "exec"), module.__dict__)  # noqa: S102
    for folder in re.findall(r'\.save\("(\w+)"\)', source):
        assert (workplace / folder / "manifest.json").is_file()


def test_the_readme_shows_python() -> None:
    assert BLOCKS


def test_the_readme_names_every_pass() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in all_passes() if f"`{name}`" not in text]


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("modelathe", *(part for part in parts if part != "__init__")))


@pytest.mark.parametrize("path", WITH_DOCTESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_doctests_pass(path: Path) -> None:
    result = doctest.testmod(importlib.import_module(_module(path)))
    assert result.attempted
    assert not result.failed
