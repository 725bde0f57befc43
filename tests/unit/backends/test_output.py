"""Output folders: whole or not there, and nothing of anybody else's lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest

from modelathe.backends import output
from modelathe.backends.manifest import read_manifest, write_manifest
from modelathe.backends.output import check_free, check_writable, resumable, writing
from modelathe.ir import StorageError
from support.artifacts import manifest_fields


def make(out: Path, *, force: bool = False, **files: str) -> None:
    with writing(out, force=force) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)
        write_manifest(folder, manifest_fields())


def fail(out: Path, error: type[BaseException]) -> None:
    """Begin to write and do not get to the end."""
    with writing(out, force=True) as folder:
        (folder / "a").write_text("half")
        raise error


def contents(out: Path) -> dict[str, str]:
    """Return name to text of every file but the manifest."""
    return {
        path.relative_to(out).as_posix(): path.read_text()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with writing(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
        assert folder.is_relative_to(out.with_name("out.partial"))
    assert contents(out) == {"a": "1"}
    assert sorted(os.listdir(out.parent)) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "full"), SystemExit])
def test_after_an_error_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises((KeyboardInterrupt, OSError, SystemExit)):
        fail(tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    make(tmp_path / "out", a="1")
    for attempt in (
        lambda: make(tmp_path / "out", a="2"),
        lambda: check_writable(tmp_path / "out"),
    ):
        with pytest.raises(StorageError, match="exists already") as error:
            attempt()
        assert "--force" in error.value.remedy
    assert contents(tmp_path / "out") == {"a": "1"}


def test_force_replaces_our_files_and_keeps_all_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, a="1", b="2")
    (out / "notes.txt").write_text("mine")
    (out / "inner").mkdir()
    (out / "inner" / "deep.txt").write_text("mine too")
    (out / "link").symlink_to("notes.txt")
    (out / "empty").mkdir()
    make(out, force=True, a="3", c="4")
    assert contents(out) == {
        "a": "3",
        "c": "4",
        "inner/deep.txt": "mine too",
        "link": "mine",
        "notes.txt": "mine",
    }
    assert (out / "empty").is_dir()
    assert (out / "link").is_symlink()
    assert "notes.txt" not in read_manifest(out)["files"]
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_force_into_a_folder_that_is_not_ours_keeps_everything_in_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "photo.jpg").write_text("holiday")
    make(out, force=True, a="1")
    assert contents(out) == {"a": "1", "photo.jpg": "holiday"}


def test_force_refuses_to_write_over_a_file_of_somebody_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, a="1")
    (out / "b").write_text("mine")
    with pytest.raises(StorageError, match="b: is not a file that modelathe wrote"):
        make(out, force=True, a="2", b="2")
    assert contents(out) == {"a": "1", "b": "mine"}
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_a_file_of_somebody_else_is_found_before_the_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_free(out, ["b"])
    make(out, a="1")
    (out / "b").write_text("mine")
    check_free(out, ["a", "c"])
    with pytest.raises(StorageError, match="b: is not a file that modelathe wrote"):
        check_free(out, ["a", "b"])


def test_a_failing_replacement_leaves_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, a="1")
    with pytest.raises(KeyboardInterrupt):
        fail(out, KeyboardInterrupt)
    assert contents(out) == {"a": "1"}


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    make(tmp_path / "real", a="1")
    (tmp_path / "out").symlink_to("real")
    make(tmp_path / "out", force=True, a="2")
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "real") == {"a": "2"}


def test_a_file_in_the_way_is_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StorageError, match="is a file"):
        make(tmp_path / "out", force=True, a="1")


def test_a_mount_point_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    for force in (False, True):
        with pytest.raises(StorageError, match="a file system is mounted") as error:
            check_writable(tmp_path / "out", force=force)
        assert error.value.remedy.endswith(f"-o {tmp_path / 'out' / 'model'}")
    check_writable(tmp_path / "out" / "model")


def test_a_partial_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match="was not written by modelathe"):
        make(tmp_path / "out", a="1")
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "mine"


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left on device") as caught, writing(out):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(out)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as caught, resumable(out, {}):
        pass
    assert caught.value.filename == str(out)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_a_run_holds_is_refused_before_any_work(tmp_path: Path) -> None:
    with resumable(tmp_path / "out", {}), pytest.raises(StorageError, match="another run is"):
        check_writable(tmp_path / "out")
    check_writable(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_to_one_place_are_told_apart(tmp_path: Path) -> None:
    with writing(tmp_path / "out"), pytest.raises(StorageError, match="another run is writing"):
        make(tmp_path / "out", a="1")


@pytest.mark.parametrize("claim", [writing, lambda out: resumable(out, {})], ids=["new", "state"])
@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_lock_that_a_run_takes_away_as_it_ends_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claim: Any, moment: str
) -> None:
    ended: list[Path] = []
    opened, locked = Path.open, output._lock

    def end(lock: Path) -> None:
        if lock.name == "lock" and not ended:
            ended.append(lock)
            shutil.rmtree(lock.parent)

    def late_open(path: Path, *words: Any, **more: Any) -> Any:
        if moment == "before it is opened":
            end(path)
        return opened(path, *words, **more)

    def late_lock(file: IO[str]) -> bool:
        end(Path(file.name))
        return locked(file)

    monkeypatch.setattr(Path, "open", late_open)
    monkeypatch.setattr(output, "_lock", late_lock)
    with claim(tmp_path / "out"):
        assert ended
        with pytest.raises(StorageError, match="another run is writing"), claim(tmp_path / "out"):
            pass


# Where a killed run can have stopped: what is in out, in out.partial/old and in out.partial/new.
STOPPED = {
    "while writing": (True, False, True),
    "between the renames": (False, True, True),
    "before clearing away": (True, True, False),
    "before anything": (True, False, False),
}


@pytest.mark.parametrize("state", STOPPED.values(), ids=STOPPED)
def test_the_next_run_clears_up_after_a_killed_one(
    tmp_path: Path, state: tuple[bool, bool, bool]
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    has_out, has_old, has_new = state
    if has_out:
        make(out, a="replaced" if has_old else "first")
    if has_old:
        make(partial / "old", a="first")
        (partial / "old" / "notes.txt").write_text("mine")
    elif has_out:
        (out / "notes.txt").write_text("mine")
    if has_new:
        (partial / "new").mkdir(parents=True)
        (partial / "new" / "half").write_text("x")
    partial.mkdir(exist_ok=True)
    (partial / "lock").touch()
    make(out, force=True, a="last")
    assert contents(out) == {"a": "last", "notes.txt": "mine"}
    assert sorted(os.listdir(tmp_path)) == ["out"]


# One process that forks the runs: importing the package anew for each would take seconds.
KILLER = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from support.artifacts import manifest_fields
from modelathe.backends.manifest import write_manifest
from modelathe.backends.output import check_writable, resumable, writing

out = Path(sys.argv[1])
for attempt in range(12):
    child = os.fork()
    while not child:
        with writing(out, force=True) as folder:
            for name in "abcd":
                (folder / name).write_text(str(time.monotonic_ns()))
            (folder / "d").write_text((folder / "a").read_text())
            write_manifest(folder, manifest_fields())
    time.sleep(0.02 + 0.0037 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen = sorted(os.listdir(out)) if out.exists() else []
    check_writable(out, force=True)
    print(json.dumps([seen, sorted(os.listdir(out)), sorted(os.listdir(out.parent)),
        (out / "a").read_text() == (out / "d").read_text(), (out / "notes").read_text()]))
"""


def test_kill_at_any_moment_leaves_a_whole_folder_and_the_foreign_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, a="x", b="x", c="x", d="x")
    (out / "notes").write_text("mine")
    tests = str(Path(__file__).parents[2])
    command = [sys.executable, "-P", "-c", KILLER, str(out), tests]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    states = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(states) == 12
    whole = ["a", "b", "c", "d", "manifest.json", "notes"]
    for seen, after, beside, equal, notes in states:
        assert seen in (whole, [])  # between the two renames there is no folder
        assert (after, beside, equal, notes) == (whole, ["out"], True, "mine")
