"""Computed weights stay in memory up to a limit, and beyond it in files that leave nothing."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from modelathe.ir import FileWeight, TensorWeight
from modelathe.ir.computed import Scratch


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_beyond_its_limit_scratch_goes_to_mapped_files(tmp_path: Path) -> None:
    scratch = Scratch(limit=100)
    scratch.folder = tmp_path
    small, large = scratch.keep("a", seeded(20)), scratch.keep("b", seeded(30))
    assert isinstance(small, TensorWeight)
    assert isinstance(large, FileWeight)
    assert large.file.path.parent == tmp_path
    assert not list(tmp_path.iterdir())  # mapped only, so that a killed process leaves nothing
    assert torch.equal(large.load(), seeded(30))
    assert (small.fingerprint, large.fingerprint) == ("a", "b")


def test_scratch_takes_back_what_nobody_holds() -> None:
    scratch = Scratch(limit=100)
    kept = scratch.keep("a", seeded(20))
    del kept
    assert isinstance(scratch.keep("b", seeded(20)), TensorWeight)


def test_scratch_files_lie_in_a_folder_that_goes_away() -> None:
    scratch = Scratch(limit=0)
    weight = scratch.keep("a", seeded(3))
    assert isinstance(weight, FileWeight)
    folder = weight.file.path.parent
    assert folder.is_dir()
    del weight
    scratch._temporary.cleanup()
    assert not folder.exists()


def test_scratch_files_lie_in_a_given_folder_as_long_as_that_is_said(tmp_path: Path) -> None:
    scratch, folder = Scratch(limit=0), tmp_path / "scratch"
    folder.mkdir()
    (folder / "half.safetensors").write_text("of a killed run")
    with scratch.within(folder):
        assert not list(folder.iterdir())
        weight = scratch.keep("a", seeded(3))
    assert isinstance(weight, FileWeight)
    assert weight.file.path.parent == folder
    assert not folder.exists()
    assert torch.equal(weight.load(), seeded(3))
    after = scratch.keep("b", seeded(3))
    assert isinstance(after, FileWeight)
    assert after.file.path.parent != folder
    scratch._temporary.cleanup()


def test_a_full_disk_is_an_os_error_that_names_the_place(tmp_path: Path) -> None:
    code = f"""
import resource, signal, pathlib, torch
from modelathe.ir.computed import Scratch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
scratch = Scratch(limit=0)
scratch.folder = pathlib.Path({str(tmp_path)!r})
try:
    scratch.keep("a", torch.zeros(1000))
except OSError as error:
    print(error.errno, error.filename)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.EFBIG), str(tmp_path)]
    assert not list(tmp_path.iterdir())
