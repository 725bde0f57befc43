"""What ``run`` refuses or is stopped in, and that nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Cli = Callable[..., Any]


def test_a_budget_that_is_broken_stops_the_run(
    llama: Path, cli: Cli, tmp_path: Path, options: list[object]
) -> None:
    words = ["-p", "quantize-weights{bits=2}", "-o", tmp_path / "out", "--max-kl", "1e-6"]
    done = cli("run", llama, *words, *options)
    assert (done.status, done.out) == (1, "")
    assert "KL" in done.err
    assert "at most 1e-06" in done.err
    assert "\nremedy: " in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_with_force(
    llama: Path, cli: Cli, tmp_path: Path, unchecked: list[object]
) -> None:
    out = tmp_path / "out"
    words = ["run", llama, "-o", out, *unchecked]
    assert cli(*words).status == 0
    (out / "notes.txt").write_text("mine")
    before = (out / "manifest.json").read_bytes()
    refused = cli(*words)
    assert refused.status == 1
    assert "--force" in refused.err
    assert (out / "manifest.json").read_bytes() == before
    assert cli(*words, "-p", "prune-blocks{blocks=0}", "--force").status == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "manifest.json").read_bytes() != before


@pytest.mark.parametrize("name", ["tokenizer.json", "model.onnx", "manifest.json"])
def test_a_file_in_the_way_is_found_before_the_work(
    llama: Path, cli: Cli, tmp_path: Path, name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    done = cli(
        "run", llama, "-p", "quantize-weights{group-size=48}", "-o", tmp_path / "out", "--force"
    )
    done.assert_refused()
    assert f"{name}: is not a file that modelathe wrote" in done.err
    assert (tmp_path / "out" / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("prune-blocks{count=3}", "block"),
        ("prune-blocks{blocks=9}", "9"),
        ("quantize-weights{group-size=48}", "48"),
        ("quantize-weights{bits=5}", "5"),
        ("quantize-weights{bit=4}", "bits"),
        ("quantise-weights", "quantize-weights"),
        ('quantize-weights{only="nothing.here"}', "nothing.here"),
    ],
)
def test_a_pipeline_that_cannot_run_is_refused(
    llama: Path, cli: Cli, tmp_path: Path, options: list[object], passes: str, message: str
) -> None:
    done = cli("run", llama, "-p", passes, "-o", tmp_path / "out", *options)
    done.assert_refused()
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def corrupt(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def wrong_shapes(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 64}))


def with_nan(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remote_code(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}
    path.write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "folder"),
        (lambda folder: (folder / "config.json").unlink(), "config"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (corrupt, "safetensors"),
        (wrong_shapes, "in the file and"),
        (with_nan, "nan"),
        (pickled, "pickle"),
        (remote_code, "code"),
    ],
)
def test_a_damaged_model_is_refused_with_a_reason(
    llama: Path,
    cli: Cli,
    tmp_path: Path,
    options: list[object],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    damage(model)
    done = cli("run", model, "-p", "quantize-weights", "-o", tmp_path / "out", *options)
    done.assert_refused()
    assert message in done.err.lower()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a b"], ids=["empty", "latin", "tiny"])
def test_bad_calibration_text_is_refused(
    llama: Path, cli: Cli, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    words = ["-p", "prune-blocks{count=1}", "--calibration", tmp_path / "text.txt"]
    done = cli("run", llama, *words, "-o", tmp_path / "out")
    assert done.status == 1
    assert "text" in done.err
    assert "\nremedy: " in done.err
    assert not (tmp_path / "out").exists()


def test_no_space_left_is_said_and_leaves_nothing(
    llama: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr("modelathe.backends.base.write_manifest", full)
    done = cli("run", llama, "-o", tmp_path / "out", *options)
    assert done.status == 1
    assert "no space left on the device" in done.err
    assert "remedy: free some space" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_said_before_the_work(llama: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    done = cli("run", llama, "-o", tmp_path / "locked" / "out")
    assert done.status == 1
    assert "permission denied" in done.err


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_an_interrupted_run_leaves_nothing_that_looks_finished(
    program: Path, cli: Cli, tmp_path: Path, number: int, status: int, unchecked: list[object]
) -> None:
    out = tmp_path / "out"
    # A process with the default handlers: a child of a shell job may ignore Ctrl-C.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    code += "from modelathe.cli import main; sys.exit(main())"
    words = ["run", program, "-p", "quantize-weights", "-o", out, *unchecked]
    command = [sys.executable, "-P", "-c", code, *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        # check_writable makes and removes the partial folder; after it the work begins.
        while not process.poll() and not (tmp_path / "out.partial" / "new").exists():
            assert time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode in (status, 0)  # it may have been faster than the signal
    if process.returncode:
        assert not out.exists()
        assert said == {130: "error: interrupted; nothing was left half-written\n"}.get(status, "")
    assert cli(*words, "--force").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
