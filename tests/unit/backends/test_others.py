"""A backend from outside: lowered to, checked, opened and measured as ours are."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from modelathe.backends import Backend, Session, open_artifact
from modelathe.backends.bench import bench
from modelathe.backends.manifest import write_manifest
from modelathe.backends.program_session import ProgramSession
from modelathe.ir import Program, StorageError, load_program, save_program
from modelathe.passes import PassContext, spec
from modelathe.passes.progress import Progress
from support.artifacts import manifest_fields
from support.models import program


@dataclass(frozen=True, kw_only=True)
class Boxed(Backend):
    """A program in a folder of its own."""

    name: ClassVar[str] = "boxed"
    box: str = "box"

    def write(self, program: Program, folder: Path, context: PassContext) -> dict[str, Any]:
        (folder / self.box).mkdir()
        save_program(program, folder / self.box)
        return {"box": self.box}

    @classmethod
    def open(
        cls, folder: Path, manifest: Mapping[str, Any], *, threads: int, progress: Progress
    ) -> Session:
        inner = load_program(folder / manifest["box"])
        return ProgramSession(inner, folder, manifest, threads=threads)


@dataclass(frozen=True)
class Point:
    name: str = "boxed"
    value: str = "their_package:Boxed"

    def load(self) -> type[Boxed]:
        return Boxed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    manifest = Boxed(box="crate").lower(program("norm-linears")).save(folder)
    assert manifest["backend"] == f"{__name__}:Boxed{{box=crate}}"
    assert manifest["lowering"]["error"] == 0
    assert manifest["fidelity"]["cosine"] == pytest.approx(1)
    return folder


def _output(session: Session) -> Any:
    shape = session.graphs["main"].inputs[0].shape
    feeds = {"x": np.ones([int(size) for size in shape], dtype=np.float32)}
    return next(iter(session.run(feeds).values()))


def test_its_artifacts_are_opened_by_import_path(made: Path) -> None:
    assert np.array_equal(
        _output(open_artifact(made)), _output(ProgramSession.of(program("norm-linears")))
    )
    assert bench(open_artifact(made), repeats=1, memory=False)["latency"] > 0


def test_its_artifacts_are_opened_by_installed_name(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    monkeypatch.setattr(
        spec, "entry_points", lambda group: [Point()] * (group == "modelathe.backends")
    )
    fields = dict(open_artifact(made).manifest) | {"backend": "boxed{box=crate}"}
    write_manifest(copy, fields)
    assert _output(open_artifact(copy)).size


def test_what_a_manifest_names_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somebodys.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    write_manifest(tmp_path, manifest_fields(backend="somebodys:Backend"))
    with pytest.raises(StorageError, match="backend 'somebodys:Backend'") as error:
        open_artifact(tmp_path)
    assert "import it" in error.value.remedy
    assert "somebodys" not in sys.modules
