"""Which files a backend says that it will write, so that what is in their way is found at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelathe.backends import Backend, Checkpoint, Eager, Onnx, ProgramFolder
from modelathe.ir import Program, StorageError
from modelathe.passes import PassContext
from support.models import program

WRITTEN = [
    (Onnx(), "llama"),
    (Onnx(external_data="always"), "norm-mlp"),
    (Eager(), "bert"),
    (ProgramFolder(), "bert"),
    (Checkpoint(), "bert"),
]


@pytest.mark.parametrize(("backend", "model"), WRITTEN)
def test_all_files_of_a_backend_are_named_before_they_are_written(
    backend: Backend, model: str, tmp_path: Path
) -> None:
    made = backend.lower(program(model), check=False).save(tmp_path / "out")
    assert sorted(backend.file_names(program(model))) == sorted(made["files"])


class Late(Eager):
    def write(self, program: Program, folder: Path, context: PassContext) -> dict[str, Any]:
        raise AssertionError("this is the work")


@pytest.mark.parametrize("name", ["manifest.json", "program.json", "weights.safetensors"])
def test_what_is_in_the_way_is_found_before_the_artifact_is_written(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(StorageError, match=f"{name}: is not a file that modelathe wrote"):
        Late().lower(program("norm-mlp"), check=False).save(tmp_path / "out", force=True)
    assert (tmp_path / "out" / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
