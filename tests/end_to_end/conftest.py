from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modelathe.cli import main
from support.word_models import write_bert, write_llama, write_t5


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit status, stdout, stderr."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON value on stdout; an error when there is anything else."""
        return json.loads(self.out)


Cli = Callable[..., Outcome]


def run_cli(*words: object) -> Outcome:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    return Outcome(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Cli:
    return run_cli


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models and artifacts that several tests read."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def llama(work: Path) -> Path:
    """A tiny decoder's model folder."""
    return write_llama(work / "llama")


@pytest.fixture(scope="session")
def bert(work: Path) -> Path:
    """A tiny encoder's model folder."""
    return write_bert(work / "bert")


@pytest.fixture(scope="session")
def t5(work: Path) -> Path:
    """A tiny encoder-decoder's model folder."""
    return write_t5(work / "t5")


@pytest.fixture(scope="session")
def text(work: Path) -> Path:
    """Some text of the tiny models' words."""
    path = work / "text.txt"
    path.write_text("a b c d e f g h i j j i h g f e d c b a\n" * 60)
    return path


@pytest.fixture(scope="session")
def options(text: Path) -> list[object]:
    """Options that keep measuring short."""
    return [
        *("--calibration", text, "--calibration-samples", 4, "--calibration-length", 16),
        *("--check-tokens", 64),
    ]


@pytest.fixture(scope="session")
def plain(llama: Path, work: Path, options: list[object]) -> Path:
    """The tiny decoder as it is, in ONNX."""
    done = run_cli("run", llama, "-o", work / "plain", *options)
    assert done.status == 0, done.err
    return work / "plain"


PIPELINE = "fold-norms,prune-blocks{count=1},quantize-weights{bits=4 group-size=32}"


@pytest.fixture(scope="session")
def pipeline() -> str:
    return PIPELINE


@pytest.fixture(scope="session")
def small(llama: Path, work: Path, options: list[object]) -> Path:
    """The tiny decoder after the main job, in ONNX."""
    done = run_cli("run", llama, "-p", PIPELINE, "-o", work / "small", *options)
    assert done.status == 0, done.err
    return work / "small"
