"""Text that a model writes is kept between runs, and never believed without looking."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from modelathe.ir import Program, TensorWeight
from modelathe.passes import PassContext, TokenWindows, kept_text, self_text
from support.listener import Listener
from support.models import VOCABULARY, program

SMALL: dict[str, Any] = {"calibration": "self", "calibration_samples": 3, "calibration_length": 6}


def written(cache: Path | None, found: Program | None = None, **options: Any) -> TokenWindows:
    """Return what a new run calibrates on."""
    context = PassContext(cache=cache, **{**SMALL, **options})
    if found is not None:
        context.remember(found)
    return context.calibration_tokens(found or program("llama"))


def healed(cache: Path | None, state: Path | None, **options: Any) -> TokenWindows:
    """Return what a new run heals on."""
    context = PassContext(cache=cache, state=state, **{**SMALL, **options})
    return context.generated_text(program("llama"), 3, 6)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences were generated, each time."""
    counts = []
    sample = self_text._sample

    def counting(found: Program, count: int, *rest: Any) -> torch.Tensor:
        counts.append(count)
        return sample(found, count, *rest)

    monkeypatch.setattr(self_text, "_sample", counting)
    return counts


def test_the_next_run_finds_it(tmp_path: Path, sampled: list[int]) -> None:
    listener = Listener()
    first, again = written(tmp_path), written(tmp_path, progress=listener)
    assert sampled == [3]
    assert torch.equal(first.tokens, again.tokens)
    assert listener.notes[-1].startswith(f"the text that the model writes is taken from {tmp_path}")


def test_a_manifest_does_not_tell_where_it_came_from(tmp_path: Path) -> None:
    found = program("llama")
    runs = [PassContext(cache=cache, **SMALL) for cache in (None, tmp_path, tmp_path)]
    for context in runs:
        context.calibration_tokens(found)
    assert runs[0].used() == runs[1].used() == runs[2].used()


def test_healing_and_calibrating_share_it(tmp_path: Path, sampled: list[int]) -> None:
    assert torch.equal(written(tmp_path).tokens, healed(tmp_path, None).tokens)
    assert sampled == [3]


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"calibration_samples": 2}, {"calibration_length": 5}], ids=str
)
def test_what_else_is_asked_for_is_not_it(
    other: dict[str, Any], tmp_path: Path, sampled: list[int]
) -> None:
    written(tmp_path)
    assert torch.equal(written(tmp_path, **other).tokens, written(None, **other).tokens)
    assert len(sampled) == 3


def test_a_model_whose_weights_differ_only_in_their_bytes_writes_its_own(
    tmp_path: Path, sampled: list[int]
) -> None:
    """As two fine-tuned copies do, unpacked with one date."""
    found = program("llama").editable()
    name = next(name for name in found.weights if "lm_head" in name or "embed" in name)
    value = found.weights[name].load()
    found.weights.put(name, TensorWeight(value, "same"))
    written(tmp_path, found)
    found = found.editable()
    found.weights.put(name, TensorWeight(value.flip(0), "same"))
    assert torch.equal(written(tmp_path, found).tokens, written(None, found).tokens)
    assert len(sampled) == 3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # the last token
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_with_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def foreign(path: Path) -> None:
    save_file({"weights": torch.zeros(2)}, path)


def other_text(path: Path, tokens: torch.Tensor) -> None:
    text = TokenWindows.of(tokens, "somebody")
    save_file({"tokens": text.tokens}, path, {"sha256": text.sha256})


def shorter(path: Path) -> None:
    other_text(path, torch.zeros(3, 5))


def nothing(path: Path) -> None:
    other_text(path, torch.zeros(0, 6))


def unknown_token(path: Path) -> None:
    other_text(path, torch.full((3, 6), VOCABULARY))


@pytest.mark.parametrize(
    "spoil", [truncate, flip, empty, replace_with_folder, foreign, shorter, nothing, unknown_token]
)
def test_a_file_that_cannot_be_it_is_not_used(spoil: Any, tmp_path: Path) -> None:
    first, listener = written(tmp_path), Listener()
    (path,) = tmp_path.iterdir()
    spoil(path)
    again = written(tmp_path, progress=listener)
    assert torch.equal(first.tokens, again.tokens)
    assert again.source == first.source
    assert listener.notes[1].startswith(f"warning: {path} is of no use and not read: ")
    if spoil is not replace_with_folder:
        written(tmp_path, progress=listener)
        assert listener.notes[-1] == f"the text that the model writes is taken from {path}"


def test_a_folder_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    listener, place = Listener(), tmp_path / "file"
    place.write_text("in the way")
    windows = written(place, progress=listener)
    assert torch.equal(windows.tokens, written(None).tokens)
    assert "cannot be written, so the next run makes its text again" in listener.notes[-1]


def test_a_full_disk_stops_no_run_and_nothing_is_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    listener = Listener()
    written(tmp_path, progress=listener)
    assert "No space left on device" in listener.notes[-1]
    assert list(tmp_path.iterdir()) == []


def test_without_a_cache_it_is_kept_for_the_run_that_goes_on(
    tmp_path: Path, sampled: list[int]
) -> None:
    cache, state = tmp_path / "cache", tmp_path / "state"
    cache.write_text("in the way")
    for place in (None, cache):
        healed(place, state)
    healed(tmp_path / "other", state)
    assert sampled == [3]


def test_a_cache_keeps_nothing_in_the_state_of_a_run(tmp_path: Path) -> None:
    healed(tmp_path / "cache", tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_what_was_not_used_for_longest_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somebody's").write_bytes(b"0" * 9999)
    paths = []
    for seed in range(2):
        written(tmp_path, seed=seed)
        (path,) = set(tmp_path.glob("text-*")) - set(paths)
        os.utime(path, ns=(seed, seed))
        paths.append(path)
    written(tmp_path, seed=0)  # the older one, used again
    monkeypatch.setattr(kept_text, "_LIMIT", int(2.5 * paths[0].stat().st_size))
    written(tmp_path, seed=2)
    assert paths[0].exists()
    assert not paths[1].exists()
    assert len(list(tmp_path.iterdir())) == 3
