"""The ONNX Runtime session: a decoder with a cache, and what it refuses to open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from modelathe.backends.manifest import write_manifest
from modelathe.backends.session import Cache, max_length, open_artifact, positions
from modelathe.backends.signatures import TensorSpec
from modelathe.ir import DataError, StorageError
from support.artifacts import (
    VOCABULARY,
    WIDTH,
    expected_logits,
    manifest_fields,
    write_decoder,
)

TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
PADDED = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
LIMIT = 1e-5  # 5 sums of products of numbers of size 1 in float32


def test_a_prompt_gives_the_logits_of_every_position(toy: Path) -> None:
    logits, _ = open_artifact(toy).decode(TOKENS, np.ones_like(TOKENS))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_logits(TOKENS, np.ones_like(TOKENS)), atol=LIMIT)


def test_a_left_padded_row_gives_the_logits_of_the_unpadded_text(toy: Path) -> None:
    session = open_artifact(toy)
    logits, _ = session.decode(TOKENS, PADDED)
    alone, _ = session.decode(TOKENS[1:, 2:], np.ones((1, 3), dtype=np.int64))
    np.testing.assert_allclose(logits[1:, 2:], alone, atol=LIMIT)


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (2,), (4,)])
def test_steps_with_a_cache_give_what_one_call_gives(toy: Path, cuts: tuple[int, ...]) -> None:
    session = open_artifact(toy)
    cache: Cache | None = None
    pieces = []
    for start, end in zip((0, *cuts), (*cuts, 5), strict=True):
        logits, cache = session.decode(TOKENS[:, start:end], PADDED[:, :end], cache)
        pieces.append(logits)
    whole = expected_logits(TOKENS, PADDED)
    np.testing.assert_allclose(
        np.concatenate(pieces, axis=1)[PADDED == 1], whole[PADDED == 1], atol=LIMIT
    )


def test_an_old_cache_can_be_continued_twice(toy: Path) -> None:
    session = open_artifact(toy)
    ones = np.ones((1, 4), dtype=np.int64)
    _, cache = session.decode(TOKENS[:1, :3], ones[:, :3])
    first, _ = session.decode(np.array([[7]]), ones, cache)
    session.decode(np.array([[8]]), ones, cache)
    again, _ = session.decode(np.array([[7]]), ones, cache)
    np.testing.assert_array_equal(first, again)


def test_run_gives_every_output_by_name(toy: Path) -> None:
    feeds = {
        "input_ids": TOKENS,
        "attention_mask": np.ones_like(TOKENS),
        "position_ids": np.tile(np.arange(5), (2, 1)),
        "past_key_values.0.key": np.zeros((2, 1, 0, WIDTH), np.float32),
        "past_key_values.0.value": np.zeros((2, 1, 0, WIDTH), np.float32),
    }
    results = open_artifact(toy).run(feeds)
    assert list(results) == ["logits", "present.0.key", "present.0.value"]
    assert results["logits"].shape == (2, 5, VOCABULARY)
    assert results["present.0.key"].shape == (2, 1, 5, WIDTH)


def test_run_names_the_inputs_that_are_missing_or_unknown(toy: Path) -> None:
    with pytest.raises(DataError, match=r"lacks .*input_ids.* and has no input named ids") as error:
        open_artifact(toy).run({"ids": TOKENS})
    assert "attention_mask" in error.value.remedy


def test_settings_say_which_runtime_and_threads(toy: Path) -> None:
    settings = open_artifact(toy, threads=1).settings
    assert settings["runtime"].startswith("onnxruntime ")
    assert settings["providers"] == ["CPUExecutionProvider"]
    assert settings["threads"] == 1


def test_positions_count_real_tokens_and_never_fall_below_zero() -> None:
    assert positions(PADDED, 5).tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert positions(PADDED, 1).tolist() == [[4], [2]]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_positions": 8}, 8),
        ({"text_config": {"max_position_embeddings": 9}}, 9),
        ({"max_position_embeddings": 514, "max_sequence_length": 512}, 512),
        ({"text_config": {"max_position_embeddings": 514}, "max_sequence_length": 512}, 512),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_max_length(config: dict[str, Any], expected: int | None) -> None:
    assert max_length(config) == expected


def test_sizes_are_sums_of_products_of_names() -> None:
    spec = TensorSpec("x", "int64", ("batch", "2*past + sequence", 3))
    assert spec.sizes({"batch": 2, "past": 4, "sequence": 5}) == (2, 13, 3)
    assert spec.sizes({"batch": 2}) == (2, 0, 3)
    assert spec.known_sizes({"batch": 2}) is None


def outside(folder: Path, location: str, length: int = 176) -> None:
    """Rewrite the model so that its matrix W lies in the file ``location``."""
    path = folder / "model.onnx"
    model = onnx.load(str(path))
    (tensor,) = [t for t in model.graph.initializer if t.name == "W"]
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    entries = {"location": location, "offset": "0", "length": str(length)}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    write_manifest(folder, manifest_fields())


def absolute(folder: Path) -> str:
    return str(folder.parent / "secret.bin")


def climbing(folder: Path) -> str:
    return "../secret.bin"


def hidden_climb(folder: Path) -> str:
    return "inner/../../secret.bin"


def linked(folder: Path) -> str:
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    return "link.bin"


def linked_folder(folder: Path) -> str:
    (folder / "inner").symlink_to(folder.parent)
    return "inner/secret.bin"


@pytest.mark.parametrize("place", [absolute, climbing, hidden_climb, linked, linked_folder])
def test_data_outside_the_folder_is_refused_before_the_runtime_sees_it(
    tmp_path: Path, place: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(1000))
    folder = write_decoder(tmp_path / "out")
    outside(folder, place(folder))
    monkeypatch.setattr("onnxruntime.InferenceSession", None)
    with pytest.raises(StorageError, match="outside the folder"):
        open_artifact(folder)


def test_data_outside_is_refused_in_graphs_below_the_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(1000))
    folder = write_decoder(tmp_path / "out")
    outside(folder, climbing(folder))
    (folder / "sub").mkdir()
    (folder / "model.onnx").rename(folder / "sub" / "m.onnx")
    signature = manifest_fields()["signatures"]["main"]
    write_manifest(folder, manifest_fields(signatures={"sub/m": signature}))
    monkeypatch.setattr("onnxruntime.InferenceSession", None)
    with pytest.raises(StorageError, match="outside the folder"):
        open_artifact(folder)


def test_data_outside_is_found_in_attributes_of_branches_and_functions(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "out")
    model = onnx.load(str(folder / "model.onnx"))
    far = onnx.TensorProto(name="far", data_type=1, dims=[1], data_location=1)
    far.external_data.add(key="location", value="/etc/passwd")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"])], "inner", [], [])
    inner.node[0].attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(far)
    branch = onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    function = onnx.helper.make_function("own", "f", [], ["y"], [branch], [])
    model.functions.append(function)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    write_manifest(folder, manifest_fields())
    with pytest.raises(StorageError, match="/etc/passwd"):
        open_artifact(folder)


def test_data_inside_the_folder_is_read(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "out")
    (tensor,) = [
        t for t in onnx.load(str(folder / "model.onnx")).graph.initializer if t.name == "W"
    ]
    (folder / "model.onnx.data").write_bytes(tensor.raw_data)
    outside(folder, "model.onnx.data")
    logits, _ = open_artifact(folder).decode(TOKENS, PADDED)
    np.testing.assert_allclose(logits, expected_logits(TOKENS, PADDED), atol=LIMIT)


def test_a_truncated_data_file_is_named(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "out")
    (folder / "model.onnx.data").write_bytes(bytes(10))
    outside(folder, "model.onnx.data")
    with pytest.raises(StorageError, match=r"model\.onnx\.data: ends before the data of @W"):
        open_artifact(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "is not a modelathe-artifact"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"\x08"), "not a complete ONNX file"),
        (lambda folder: (folder / "config.json").write_text("{ }"), "the manifest says"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = write_decoder(tmp_path / "out")
    damage(folder)
    with pytest.raises(StorageError, match=message) as error:
        open_artifact(folder)
    assert error.value.remedy


def test_a_manifest_of_another_model_is_noticed(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "out")
    fields = manifest_fields()
    signature = json.loads(json.dumps(fields["signatures"]))
    signature["main"]["outputs"][1]["name"] = "present.1.key"
    write_manifest(folder, {**fields, "signatures": signature})
    with pytest.raises(StorageError, match=r"present\.0\.key, present\.1\.key"):
        open_artifact(folder)


def test_a_newer_format_and_an_unknown_backend_are_refused(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "out")
    write_manifest(folder, manifest_fields(backend="other{x=1}"))
    with pytest.raises(StorageError, match="backend 'other'"):
        open_artifact(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(StorageError, match="format version 99"):
        open_artifact(folder)
