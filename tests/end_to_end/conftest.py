from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelathe import ir
from modelathe.cli import main
from support.commands import Outcome
from support.word_models import write_bert, write_llama, write_t5

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


@pytest.fixture(scope="session", autouse=True)
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for models and artifacts that several tests read.

    What lies in it does not change, so a model there is captured once: that is most of the time
    that a tiny model takes.
    """
    folder = tmp_path_factory.mktemp("work")
    capture = functools.cache(ir.capture)

    def captured(model: Any, *inputs: Any, report: Any = None, **options: Any) -> ir.Program:
        # In force until the session ends, so tests of other folders must not notice it.
        shared = isinstance(model, str | Path) and Path(model).is_relative_to(folder)
        if shared:
            return capture(model, *inputs, **options)
        return capture.__wrapped__(model, *inputs, report=report, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ir, "capture", captured)
        yield folder


@pytest.fixture(scope="session")
def llama(work: Path) -> Path:
    """A tiny decoder's model folder."""
    return write_llama(work / "llama", num_hidden_layers=3)


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


def short(text: Path) -> list[object]:
    return ["--calibration", text, "--calibration-samples", 4, "--calibration-length", 16]


@pytest.fixture(scope="session")
def options(text: Path) -> list[object]:
    """Options that keep measuring short."""
    return [*short(text), "--check-tokens", 64]


@pytest.fixture(scope="session")
def unchecked(text: Path) -> list[object]:
    """Options that measure nothing."""
    return [*short(text), "--no-check"]


@pytest.fixture(scope="session")
def plain(llama: Path, work: Path, options: list[object]) -> Path:
    """The tiny decoder as it is, in ONNX."""
    done = run_cli("run", llama, "-o", work / "plain", *options)
    assert done.status == 0, done.err
    return work / "plain"


@pytest.fixture(scope="session")
def program(llama: Path, work: Path) -> Path:
    """The tiny decoder as a Program folder, which is read at once where a model is captured."""
    folder = work / "program"
    folder.mkdir()
    ir.save_program(ir.capture(str(llama)), folder)
    return folder


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
