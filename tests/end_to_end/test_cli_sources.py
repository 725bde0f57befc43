"""What a user starts from: code beside them, and programs in a 16-bit dtype."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FACTORY = """
import torch

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)).eval()
    return model, (torch.zeros(3, 8),), ({0: torch.export.Dim("batch")},)
"""


def test_a_factory_in_the_current_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "beside_me.py").write_text(FACTORY)
    # -P: the interpreter adds nothing itself, as for an installed command
    words = [sys.executable, "-P", "-m", "modelathe.cli", "run", "beside_me:make", "--dry-run"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_bfloat16_program_runs_as_an_eager_artifact(
    cli: Callable[..., Any], llama: Path, tmp_path: Path
) -> None:
    passes = ["-p", "convert-dtype{to=bfloat16}", "--check-tokens", 64]
    sizes = ["--calibration-samples", 2, "--calibration-length", 16]
    done = cli("run", llama, *passes, *sizes, "--to", "eager", "-o", tmp_path / "out")
    assert done.status == 0, done.err
