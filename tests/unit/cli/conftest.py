from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from modelathe.cli import main
from support.artifacts import write_decoder
from support.commands import Outcome

Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        status = main([str(word) for word in words])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder artifact; not to be changed."""
    return write_decoder(tmp_path_factory.mktemp("toy") / "out")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder artifact with other weights; not to be changed."""
    return write_decoder(tmp_path_factory.mktemp("other") / "out", seed=1)
