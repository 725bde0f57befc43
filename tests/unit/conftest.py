from __future__ import annotations

from pathlib import Path

import pytest

from support.artifacts import write_decoder


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder artifact; not to be changed."""
    return write_decoder(tmp_path_factory.mktemp("toy") / "out")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder artifact with other weights; not to be changed."""
    return write_decoder(tmp_path_factory.mktemp("other") / "out", seed=1)
