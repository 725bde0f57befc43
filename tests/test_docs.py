"""What the documents show works: README's blocks, the scripts they name, and doctests."""

from __future__ import annotations

import doctest
import importlib
import re
import shutil
import sys
import types
from pathlib import Path

import pytest

from modelathe.backends import Onnx
from modelathe.demo import MODEL_FOLDER
from modelathe.ir import capture
from modelathe.passes import Pipeline, all_passes
from support.artifacts import WORDS
from support.word_models import write_bert, write_llama

ROOT = Path(__file__).parents[1]
LAYERS = ("ir", "passes", "backends", "cli", "demo")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIGURES = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
BLOCKS = [body for language, body in FENCED if language == "python"]
MODULES = {found[1]: b for b in BLOCKS if (found := re.match(r"# (\w+)\.py\n", b))}
COMMANDS = [body for language, body in FENCED if language == ""]
PIPELINES = [text for body in COMMANDS for text in re.findall(r'-p "([^"]*)"', body)]
WITH_DOCTESTS = sorted(
    path for layer in LAYERS for path in (ROOT / layer).rglob("*.py") if ">>> " in path.read_text()
)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as README assumes it: a model, a text, modules of its own; the current one."""
    write_llama(tmp_path / "path" / "to" / "model")
    sentence = " ".join(WORDS[:10])
    (tmp_path / "text.txt").write_text("\n".join([sentence, sentence[::-1]] * 600))
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(source: str, workplace: Path) -> None:
    """Write the artifacts that a block opens: an encoder, and as ``out`` a decoder of English."""
    if "encoder/" in source:
        encoder = capture(write_bert(workplace / "bert"))
        Onnx().lower(encoder, check=False).save(workplace / "encoder")
    if 'Model("out")' in source:
        decoder = write_llama(workplace / "decoder", num_hidden_layers=1, vocab_size=2048)
        for path in MODEL_FOLDER.glob("tokenizer*.json"):
            shutil.copy(path, decoder)
        Onnx().lower(capture(decoder), check=False).save(workplace / "out")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_in_the_readme_runs(
    number: int, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block by itself, as a module, from the first line to the last."""
    source = BLOCKS[number]
    prepare(source, workplace)
    module = types.ModuleType(f"readme_{number}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, f"README.md, Python block {number}", "exec"), module.__dict__)  # noqa: S102
    for folder in re.findall(r'\.save\("(\w+)"\)', source):
        assert (workplace / folder / "manifest.json").is_file()


def test_the_example_pass_clips_blocks_and_leaves_the_head(workplace: Path) -> None:
    program = capture(workplace / "path" / "to" / "model")
    remarks = Pipeline.parse("clip:ClipWeights{size=2}", check=False)(program).steps[-1].remarks
    assert len([one for one in remarks if one.kind == "applied"]) == 7 * 4
    assert len([one for one in remarks if one.kind == "missed"]) == 1


def test_the_readme_shows_python_and_pipelines() -> None:
    assert BLOCKS
    assert MODULES
    assert PIPELINES


@pytest.mark.parametrize("text", PIPELINES)
def test_pipelines_in_the_readme_are_legal(text: str, workplace: Path) -> None:
    assert Pipeline.parse(text).passes


def test_scripts_that_the_documents_name_are_those_there_are() -> None:
    there = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    in_figures = set(re.findall(r"\b(\w+\.py)\b", FIGURES)) - {"NAME.py"}
    assert in_figures == there
    assert set(re.findall(r"benchmarks/(\w+\.py)", README)) <= there


def test_the_readme_names_every_pass() -> None:
    assert not [name for name in all_passes() if f"`{name}`" not in README]


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("modelathe", *(part for part in parts if part != "__init__")))


@pytest.mark.parametrize("path", WITH_DOCTESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_doctests_pass(path: Path) -> None:
    result = doctest.testmod(importlib.import_module(_module(path)))
    assert result.attempted
    assert not result.failed
