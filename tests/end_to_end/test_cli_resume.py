"""``run --resume``: a run that was killed goes on, and nobody meets its state by accident."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from modelathe.ir import SCRATCH, FileWeight, Weight
from modelathe.ir.computed import Scratch
from support.training import stop_training

HEAL = "prune-blocks{blocks=1},heal{steps=6 batch=32 length=8 mix=0.0}"


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what kills training when a run has done so many steps; None lets it run."""
    return lambda steps: stop_training(monkeypatch, steps, KeyboardInterrupt)


@pytest.fixture
def command(llama: Path, tmp_path: Path, options: list[object]) -> list[object]:
    words = ["run", llama, "-p", HEAL, "--to", "program", "-o", tmp_path / "out"]
    return [*words, *options]


def weights(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def test_a_killed_run_goes_on_to_the_same_weights(
    cli: Any, stop: Any, command: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = cli(*command)
    assert done.status == 0, done.err
    expected = weights(out)
    shutil.rmtree(out)
    stop(4)
    killed = cli(*command)
    assert killed.status != 0
    assert "--resume" in killed.err
    assert not out.exists()
    stop(None)
    refused = cli(*command)
    assert refused.status == 1
    assert "stopped on the way" in refused.err
    assert "--resume" in refused.err
    gone_on = cli(*command, "--resume")
    assert gone_on.status == 0, gone_on.err
    assert weights(out) == expected
    assert not (tmp_path / "out.partial").exists()


def test_a_stopped_replacement_is_not_started_over_by_accident(
    cli: Any, stop: Any, command: list[object]
) -> None:
    assert cli(*command).status == 0
    stop(4)
    killed = cli(*command, "--force")
    assert killed.status != 0
    assert "kept: --force --resume goes on" in killed.err
    stop(None)
    refused = cli(*command, "--resume")
    assert "--force --resume" in refused.err
    assert cli(*command, "--force", "--resume").status == 0


def test_another_command_does_not_go_on_with_it(
    cli: Any, stop: Any, command: list[object], tmp_path: Path
) -> None:
    stop(4)
    assert cli(*command).status != 0
    stop(None)
    other = cli(*command, "--seed", 7, "--resume")
    assert other.status == 1
    assert "seed 0, not 7" in other.err
    anew = cli(*command, "--seed", 7, "--force")
    assert anew.status == 0, anew.err
    assert not (tmp_path / "out.partial").exists()


def test_with_nothing_to_go_on_with_it_says_so_and_begins(cli: Any, command: list[object]) -> None:
    found = cli(*command, "--resume")
    assert found.status == 0, found.err
    assert "starts anew" in found.err


def test_values_beyond_the_memory_lie_beside_the_output_and_are_no_stopped_run(
    cli: Any, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "out.partial" / "state" / "scratch"
    scratch.mkdir(parents=True)
    (scratch / "half.safetensors").write_text("of a killed run")
    places = []
    keep = Scratch.keep

    def watched(store: Scratch, fingerprint: str, value: Tensor) -> Weight:
        weight = keep(store, fingerprint, value)
        assert isinstance(weight, FileWeight)
        places.append(weight.file.path.parent)
        return weight

    monkeypatch.setattr(SCRATCH, "limit", 0)
    monkeypatch.setattr(Scratch, "keep", watched)
    command[command.index("-p") + 1] = "fold-norms"
    done = cli(*command)
    assert done.status == 0, done.err
    assert set(places) == {scratch}
    assert not (tmp_path / "out.partial").exists()


def test_a_dry_run_makes_nothing_to_go_on_with(cli: Any, command: list[object]) -> None:
    assert cli(*command, "--dry-run", "--resume").status == 2


def test_the_manifest_has_the_learning_curve_and_a_drawing(
    cli: Any, command: list[object], tmp_path: Path
) -> None:
    import json

    assert cli(*command).status == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (curve,) = [s["details"]["curve"] for s in manifest["steps"] if "details" in s]
    assert curve[-1]["step"] == 6
    assert (tmp_path / "out" / "heal.svg").read_text().startswith("<?xml")
