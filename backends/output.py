"""Write an output folder so that whatever happens, a folder that looks finished is finished.

Everything is written in ``OUT.partial/new`` beside ``OUT`` and renamed when it is complete::

    OUT.partial/lock    held while somebody writes; says that this folder is ours
    OUT.partial/new     what is being written
    OUT.partial/old     what ``--force`` replaces, between two renames
    OUT.partial/state   what passes keep to go on from; of a run that has not finished
    OUT.partial/state/scratch   values that do not fit into memory; nothing to go on from

A run that was killed leaves ``OUT.partial`` behind; the next run to the same place puts ``old``
back or takes it away, whichever is due, and begins again.  Files in ``OUT`` that no manifest of
ours lists are never deleted: they are linked into the new folder before it takes the old one's
place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..ir.errors import StorageError
from .manifest import MANIFEST, is_artifact, listed_files

_PARTIAL_FILES = {"lock", "new", "old", "state"}
SCRATCH_FOLDER = "scratch"
_NOT_KEPT = {"lock", "run.json", SCRATCH_FOLDER}


@contextlib.contextmanager
def writing(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a folder to write into, which becomes ``out`` when the block ends without an error.

    Args:
        out: must not exist, unless ``force``.
        force: replace what a run of ours wrote in ``out``; other files in it are kept.

    Raises:
        StorageError: ``out`` exists, is being written by another run, or holds a file of somebody
            else's where a new one must go.
    """
    target = Path(os.path.realpath(out))  # of a link to a folder, the folder is replaced
    _check_target(out, target, force)
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _claim(partial):
        _recover(partial, target)
        _check_target(out, target, force)
        new = partial / "new"
        new.mkdir()
        try:
            yield new
            _publish(partial, target)
        except OSError as error:
            _name_place(error, out)
            raise
        finally:
            _recover(partial, target)
            _leave(partial)


def check_writable(out: Path, *, force: bool = False) -> None:
    """Fail now, before hours of work, where ``writing`` would fail later.

    What a killed run left behind is cleared away.

    Raises:
        StorageError: as ``writing``.
        OSError: nothing can be written there.
    """
    target = Path(os.path.realpath(out))
    _check_target(out, target, force)
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_idle(partial)
    with _claim(partial):
        try:
            _recover(partial, target)
        finally:
            _leave(partial)
    _check_target(out, target, force)


def check_free(out: Path, names: Iterable[str]) -> None:
    """Fail before hours of work where a manifest and ``names`` cannot be written into ``out``.

    Raises:
        StorageError: somebody else's file has one of the names.
    """
    target = Path(os.path.realpath(out))
    foreign = set(_foreign(target)) if target.is_dir() else set()
    for name in sorted(foreign & {MANIFEST, *names}):
        raise _in_the_way(target / name)


@contextlib.contextmanager
def resumable(
    out: Path, settings: Mapping[str, Any], *, resume: bool = False, force: bool = False
) -> Iterator[tuple[Path, bool]]:
    """Give a folder for what long passes keep, and whether an earlier run left something there.

    It is taken away when the block ends without an error.

    Args:
        out: where the run will write.
        settings: what decides the run; plain JSON values.
        resume: go on with an unfinished run, which must have had the same settings.
        force: start over where there is one.

    Raises:
        StorageError: there is an unfinished run and it is not said what to do with it, or it had
            other settings, or it is going on.
    """
    target = Path(os.path.realpath(out))
    partial = target.with_name(f"{target.name}.partial")
    state = partial / "state"
    with _hold(state, partial):
        found = kept_state(state)
        if found and not resume and not force:
            raise StorageError(
                f"{out}: an earlier run to this place was stopped on the way",
                remedy="go on with it with --resume, or start over with --force",
            )
        if found and resume:
            _check_settings(state, settings)
        elif found:  # --force alone: start over
            for path in found:
                path.unlink()
        try:
            (state / "run.json").write_text(json.dumps(dict(settings), indent=1) + "\n")
            yield state, bool(found) and resume
        except BaseException as error:
            _name_place(error, out)
            if not kept_state(state):
                _drop(state)
            raise
        _drop(state)


def _name_place(error: BaseException, out: Path) -> None:
    """Say in an error of a full disk, which knows of no path, where there was no space."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error.filename = error.filename or str(out)


def kept_state(state: Path) -> list[Path]:
    """Return the files that passes left."""
    return [path for path in state.iterdir() if path.name not in _NOT_KEPT]


def _drop(state: Path) -> None:
    shutil.rmtree(state)
    with contextlib.suppress(OSError):
        state.parent.rmdir()


def _check_settings(state: Path, settings: Mapping[str, Any]) -> None:
    before = json.loads((state / "run.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(dict(settings)))
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise StorageError(
                f"the run to go on with had {name} {before.get(name)!r}, not {now.get(name)!r}",
                remedy="give --resume the same command, or start over with --force",
            )


def _leave(partial: Path) -> None:
    """Take ``partial`` away, unless a run that has not finished keeps its state there."""
    shutil.rmtree(partial / "new", ignore_errors=True)
    (partial / "lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        partial.rmdir()


def _check_target(out: Path, target: Path, force: bool) -> None:
    if os.path.ismount(target):  # nothing can be renamed to it
        raise StorageError(
            f"{out}: cannot be replaced: it is where a file system is mounted",
            remedy=f"choose a folder below it, such as -o {out / 'model'}",
        )
    if not target.exists():
        return
    if not target.is_dir():
        raise StorageError(f"{out}: is a file", remedy="choose another output folder with -o")
    if not force:
        state = target.with_name(f"{target.name}.partial") / "state"
        stopped = state.is_dir() and bool(kept_state(state))
        raise StorageError(
            f"{out}: exists already",
            remedy="go on with the run that was to replace it with --force --resume"
            if stopped
            else "choose another folder with -o, or replace it with --force",
        )


@contextlib.contextmanager
def _claim(partial: Path) -> Iterator[None]:
    """Hold ``partial`` for this process.

    The lock goes with the process, however it ends, so a lock that can be taken is a dead run's.
    """
    names = set(os.listdir(partial)) if partial.is_dir() else set()
    if (partial.exists() and not partial.is_dir()) or names - _PARTIAL_FILES:
        raise StorageError(
            f"{partial}: is in the way and was not written by modelathe",
            remedy="move it elsewhere, or choose another output folder with -o",
        )
    with _hold(partial, partial):
        yield


def _hold(folder: Path, partial: Path) -> IO[str]:
    """Return the lock of a folder, which is made where it is missing."""
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # A run that ends may take the folder away before the lock is opened, or the lock before it
        # is taken; holding a file that has no name any more would keep nobody out.
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
            lock = stack.enter_context(path.open("w"))
            if not _lock(lock):
                raise _busy(partial)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                stack.pop_all()
                return lock


def _check_idle(partial: Path) -> None:
    """Refuse a place that a run holds which has not come to writing yet."""
    lock = partial / "state" / "lock"
    if not lock.is_file():
        return
    with lock.open("a") as file:
        if not _lock(file):
            raise _busy(partial)


def _busy(partial: Path) -> StorageError:
    return StorageError(
        f"{partial}: another run is writing to this place",
        remedy="wait for it, or choose another output folder with -o",
    )


def _lock(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # no such locks on this system: two runs to one place are not told apart
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _recover(partial: Path, target: Path) -> None:
    """Bring ``partial`` to its beginning from any state that a run may have ended in."""
    old = partial / "old"
    if old.exists():
        if target.exists():
            _settle(old, target)
        else:
            old.rename(target)
    shutil.rmtree(partial / "new", ignore_errors=True)


def _publish(partial: Path, target: Path) -> None:
    new, old = partial / "new", partial / "old"
    _sync(new)
    if not target.exists():
        new.rename(target)
        return
    for name in _foreign(target):
        _keep(target / name, new / name)
    target.rename(old)
    new.rename(target)


def _settle(old: Path, target: Path) -> None:
    """Take the replaced folder away; whatever is not ours and not in ``target`` yet moves there."""
    for name in _foreign(old):
        kept = target / name
        if not os.path.lexists(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            (old / name).rename(kept)
    shutil.rmtree(old)


def _foreign(folder: Path) -> list[str]:
    """Return the files and links below ``folder`` that no manifest of ours lists."""
    ours = _own_files(folder)
    names = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        empty = [n for n in folders if n not in links and not any((Path(root) / n).iterdir())]
        for name in (*files, *links, *empty):
            names.append((Path(root) / name).relative_to(folder).as_posix())
    return [name for name in names if name not in ours]


def _own_files(folder: Path) -> set[str]:
    if not is_artifact(folder):
        return set()
    return set(listed_files(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))))


def _keep(source: Path, place: Path) -> None:
    """Put a file of somebody else's, or a link, or an empty folder, at ``place`` as well."""
    if os.path.lexists(place):
        raise _in_the_way(source)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(
            f"{source.parent}: a new file must go where this folder is",
            remedy="move it elsewhere, or choose another output folder with -o",
        ) from error
    if source.is_symlink():
        place.symlink_to(os.readlink(source))
    elif source.is_dir():
        place.mkdir(exist_ok=True)
    else:
        try:
            os.link(source, place)
        except OSError:  # a file system without hard links
            shutil.copy2(source, place)


def _in_the_way(path: Path) -> StorageError:
    return StorageError(
        f"{path}: is not a file that modelathe wrote, and a new one must go there",
        remedy="move it elsewhere, or choose another output folder with -o",
    )


def _sync(folder: Path) -> None:
    """Have the system write the files out before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
