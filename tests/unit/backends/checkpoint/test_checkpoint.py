"""Round trips: fold, equalise a block, prune one, change every weight, write, load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from modelathe.backends import Checkpoint
from modelathe.ir import capture
from support.checkpoints import (
    KEPT,
    SHAPES,
    Trip,
    changed,
    model_folder,
    parameters,
    round_trip,
)
from support.feeds import decoder_outputs, feed, plain_outputs
from support.folders import write_folder
from support.models import module
from support.numeric import assert_same_bits, rounding, worst_error


@pytest.fixture(scope="module", params=SHAPES)
def trip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trip:
    folder = tmp_path_factory.mktemp("trip")
    return round_trip(changed(model_folder(request.param, folder / "model")), folder / "out")


def test_from_pretrained_misses_no_key_and_finds_none_left_over(trip: Trip) -> None:
    assert not {key: value for key, value in trip.told.items() if value}
    assert trip.loaded.config.num_hidden_layers == len(KEPT)


def _parameter(name: str) -> tuple[str, set[str]]:
    """Return the parameter that a weight of the program is about, and what was done to it."""
    verbs = {"transposed", "add", "folded", "equalized", "healed"}
    parts = name.split(".")
    base = ".".join(part for part in parts if part not in verbs)
    renumbered = re.sub(r"\.(\d+)\.", lambda m: f".{KEPT.index(int(m[1]))}.", base, count=1)
    return renumbered, verbs & set(parts)


def test_weights_are_those_of_the_program_bit_for_bit(trip: Trip) -> None:
    values, weights = parameters(trip.loaded), trip.program.weights
    compared, gemma = 0, trip.loaded.config.model_type == "gemma"
    for name in filter(weights.is_parameter, weights):
        parameter, verbs = _parameter(name)
        value = values[parameter].detach()
        value = value.t() if "transposed" in verbs else value
        wanted = weights[name].load()
        # of a gain that is written 1 + w, the parameter is w, rounded once
        below = "add" in verbs or (gemma and "norm" in parameter)
        wanted = (wanted.double() - 1).to(wanted.dtype) if below else wanted
        assert torch.equal(value, wanted), name
        compared += 1
    assert compared > 15


def test_gains_and_biases_that_were_folded_away_change_nothing(trip: Trip) -> None:
    held = {_parameter(name)[0] for name in trip.program.weights} | {"lm_head.weight"}
    left = {n: v.detach() for n, v in parameters(trip.loaded).items() if n not in held}
    gain = 0.0 if trip.loaded.config.model_type == "gemma" else 1.0
    for name, value in left.items():
        neutral = 0.0 if name.endswith("bias") else gain
        assert torch.equal(value, torch.full_like(value, neutral)), name
    assert bool(left) == (trip.loaded.config.model_type != "bert")  # whose norms all stay


def test_a_capture_of_the_folder_has_the_bits_of_from_pretrained(trip: Trip) -> None:
    for sizes in ({"sequence": 5}, {"sequence": 4, "pads": 2}):
        inputs = feed(trip.again, **sizes)
        outputs = trip.again.signature.outputs
        decoder = trip.again.kind == "decoder"
        model = trip.loaded
        expected = (
            decoder_outputs(model, inputs) if decoder else plain_outputs(model, inputs, outputs)
        )
        assert_same_bits(trip.again.run(inputs), expected)


def test_it_computes_what_the_program_does(trip: Trip) -> None:
    inputs = feed(trip.program, past=3 if trip.program.kind == "decoder" else 0)
    found = trip.again.run(inputs)
    assert worst_error(found, trip.program.run(inputs)) <= rounding(torch.float32)


def _names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        return list(file.keys())


def test_a_tied_head_is_written_once(trip: Trip) -> None:
    tied = trip.loaded.config.tie_word_embeddings and trip.again.kind == "decoder"
    heads = [name for name in _names(trip.folder) if name.startswith("lm_head")]
    assert len(heads) == (0 if tied or trip.again.kind == "encoder" else 1)


def test_the_artifact_is_checked_and_says_so(tmp_path: Path) -> None:
    source = model_folder("bert", tmp_path / "model")
    manifest = Checkpoint().lower(changed(source)).save(tmp_path / "out")
    assert manifest["backend"] == "checkpoint"
    assert manifest["lowering"]["float64_error"] < 1e-12
    assert manifest["lowering"]["error"] < 1e-5
    assert manifest["sizes"]["blocks"] == len(KEPT)
    assert {"config.json", "model.safetensors"} <= set(manifest["files"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_what_was_written_can_be_written_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    source = capture(write_folder(module("bert"), tmp_path / "model"))
    Checkpoint().lower(source, check=False).save(first)
    again = capture(first)
    Checkpoint().lower(again, check=False).save(second)
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
