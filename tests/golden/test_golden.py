"""Each ``*.golden`` file names a model and a pipeline, and holds what the pipeline changes.

First the remarks, then the diff of the two programs as text.  ``pytest --accept`` rewrites files
that differ; read every ``+``, ``-`` and ``missed:`` line before you commit them.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from modelathe.ir import to_text
from modelathe.passes import ALL_PASSES, Pipeline
from support.models import context, program

FILES = sorted(Path(__file__).parent.glob("*.golden"))
LONGEST = 40


def header(path: Path) -> tuple[str, str]:
    """Return the model and the pipeline that a file is about."""
    lines = dict(line.split(": ", 1) for line in path.read_text().splitlines()[:2])
    return lines["model"], lines["pipeline"]


def render(model: str, pipeline: str) -> str:
    """Return what the file of a model and a pipeline should hold."""
    before = program(model)
    result = Pipeline.parse(pipeline, context=context(), check=False)(before)
    remarks = [str(remark) for step in result.steps for remark in step.remarks]
    old, new = (to_text(each).splitlines() for each in (before, result.program))
    diff = list(difflib.unified_diff(old, new, lineterm="", n=0))[2:]
    body = [line for line in diff if not line.startswith("@@")]
    return "\n".join([f"model: {model}", f"pipeline: {pipeline}", *remarks, *body, ""])


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_golden(path: Path, accept: bool) -> None:
    actual = render(*header(path))
    if accept:
        path.write_text(actual)
    assert actual == path.read_text(), "read the difference, then run: pytest tests/golden --accept"
    assert actual.count("\n") <= LONGEST, "choose a smaller model"


def test_every_pass_has_a_golden_file() -> None:
    pipelines = " ".join(header(path)[1] for path in FILES)
    assert not [kind.name for kind in ALL_PASSES if kind.name not in pipelines]
