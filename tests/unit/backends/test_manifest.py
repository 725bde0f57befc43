"""Manifests: what belongs to an artifact, and that nothing outside of it does."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from modelathe.backends import Eager
from modelathe.backends import manifest as manifest_module
from modelathe.backends.manifest import (
    check_files,
    contained,
    is_artifact,
    listed_files,
    read_manifest,
    write_manifest,
)
from modelathe.ir import StorageError
from modelathe.passes import PassContext, Pipeline, TokenWindows
from modelathe.passes.progress import Advance
from support.artifacts import manifest_fields
from support.listener import Listener
from support.models import program


def test_every_file_is_listed_with_its_hash(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"abc")
    manifest = write_manifest(tmp_path, manifest_fields(extra=1))
    digest = hashlib.sha256(b"abc").hexdigest()
    assert manifest["files"] == {"inner/a": {"bytes": 3, "sha256": digest}}
    assert manifest["extra"] == 1
    assert read_manifest(tmp_path) == manifest
    assert is_artifact(tmp_path)
    assert listed_files(manifest) == ("inner/a", "manifest.json")
    check_files(tmp_path, manifest)


def test_writing_again_lists_what_is_there_now(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    write_manifest(tmp_path, manifest_fields())
    (tmp_path / "a").rename(tmp_path / "b")
    assert set(write_manifest(tmp_path, manifest_fields())["files"]) == {"b"}


@pytest.mark.parametrize("check", [True, False])
def test_files_are_hashed_once_and_visibly(
    check: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, hashed = manifest_module._sha256, list[str]()

    def noted(path: Path, advance: Advance) -> str:
        hashed.append(path.name)
        return right(path, advance)

    monkeypatch.setattr(manifest_module, "_sha256", noted)
    listener = Listener()
    context = PassContext(progress=listener)
    lowered = Eager().lower(program("norm-mlp"), check=check, context=context)
    made = lowered.save(tmp_path / "out")
    assert sorted(hashed) == ["program.json", "weights.safetensors"]
    assert listener.tasks["hashing files"] == 0
    assert made["sizes"]["artifact_bytes"] == sum(e["bytes"] for e in made["files"].values())
    check_files(tmp_path / "out", made)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a", "a/../../b", "", "..", "a\\..\\..\\b", "link/a"]
)
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="outside the folder"):
        contained(folder, name)


def test_names_inside_are_paths(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    assert contained(tmp_path, "a/b") == tmp_path / "a" / "b"
    assert contained(tmp_path, "link/b") == tmp_path / "link" / "b"


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    assert not is_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    assert not is_artifact(tmp_path)


def test_what_the_artifact_was_measured_on_is_in_the_manifest(tmp_path: Path) -> None:
    windows = TokenWindows.of(torch.arange(8).view(2, 4), "four tokens, twice")
    context = PassContext(check_text=windows)
    result = Pipeline([], context=context)(program("bert"))
    assert result.data == {}  # nothing had to be measured on the way
    made = Eager().lower(result.program, context=context).save(tmp_path / "out")
    assert made["fidelity"]["cosine"] == pytest.approx(1)
    assert made["data"]["check"]["source"] == "four tokens, twice"
    assert read_manifest(tmp_path / "out")["data"] == made["data"]


def test_the_weights_of_a_module_without_files_are_identified(tmp_path: Path) -> None:
    found = program("norm-mlp")
    made = Eager().lower(found, check=False).save(tmp_path / "out")
    assert made["source"] == {"weights": found.origin.source}
    assert found.origin.source


def test_a_figure_that_is_no_number_is_null(tmp_path: Path) -> None:
    figures = {"kl": float("nan"), "losses": [1.5, float("-inf")]}
    made = write_manifest(tmp_path, {**manifest_fields(), "fidelity": figures})
    assert made["fidelity"] == {"kl": None, "losses": [1.5, None]}
    assert read_manifest(tmp_path) == made
