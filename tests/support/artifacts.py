"""A tiny ONNX decoder made by hand, in a folder with a manifest: what sessions are tested on.

With E: [vocab, width], P: [positions, width], W: [width, vocab]; key t is token t's embedding:

    logits[t] = (sum of mask[i] * E[token i] for i <= t, + P[position t]) @ W

so it depends on every token, on the mask, on positions and on the cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelathe.backends.manifest import write_manifest

VOCABULARY, WIDTH, POSITIONS = 11, 4, 24
STOP = 10
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "end"]

Floats = NDArray[np.float32]


def weights(seed: int = 0) -> dict[str, Floats]:
    """Return E, P and W."""
    random = np.random.default_rng(seed)
    shapes = {"E": (VOCABULARY, WIDTH), "P": (POSITIONS, WIDTH), "W": (WIDTH, VOCABULARY)}
    return {n: random.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}


def expected_logits(tokens: NDArray[Any], mask: NDArray[Any], seed: int = 0) -> Floats:
    """Return ``[b, s, vocab]``: what the decoder gives for all tokens at once."""
    table = weights(seed)
    sums = np.cumsum(table["E"][tokens] * mask[:, :, None], axis=1)
    places = np.clip(mask.cumsum(axis=1) - 1, 0, None)
    logits: Floats = (sums + table["P"][places]) @ table["W"]
    return logits.astype(np.float32)


def decoder_model(seed: int = 0) -> Any:
    """Return the ONNX model."""
    import onnx
    from onnx import helper, numpy_helper

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(kind, inputs, [output], **attributes)

    def ints(name: str, *values: int) -> Any:
        return numpy_helper.from_array(np.asarray(values, dtype=np.int64), name)

    cache = "past_key_values.0"
    nodes = [
        node("Gather", ["E", "input_ids"], "x"),
        node("Unsqueeze", ["x", "one"], "x4"),
        node("Concat", [f"{cache}.key", "x4"], "present.0.key", axis=2),
        node("Concat", [f"{cache}.value", "x4"], "present.0.value", axis=2),
        node("Cast", ["attention_mask"], "maskf", to=onnx.TensorProto.FLOAT),
        node("Unsqueeze", ["maskf", "one_three"], "mask4"),
        node("Mul", ["present.0.key", "mask4"], "kept"),
        node("CumSum", ["kept", "two"], "sums"),
        node("Shape", ["input_ids"], "length", start=1, end=2),
        node("Neg", ["length"], "begin"),
        node("Slice", ["sums", "begin", "far", "two_axis"], "last"),
        node("Squeeze", ["last", "one"], "state"),
        node("Gather", ["P", "position_ids"], "place"),
        node("Add", ["state", "place"], "hidden"),
        node("MatMul", ["hidden", "W"], "logits"),
    ]
    stored = [numpy_helper.from_array(value, name) for name, value in weights(seed).items()]
    stored += [ints("one", 1), ints("one_three", 1, 3), ints("far", 2**31), ints("two_axis", 2)]
    stored.append(numpy_helper.from_array(np.asarray(2, dtype=np.int64), "two"))
    graph = helper.make_graph(
        nodes,
        "main",
        [_value(entry) for entry in SIGNATURE["inputs"]],
        [_value(entry) for entry in SIGNATURE["outputs"]],
        stored,
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9)


def _entry(name: str, dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


SIGNATURE: dict[str, list[dict[str, Any]]] = {
    "inputs": [
        _entry("input_ids", "int64", "batch", "sequence"),
        _entry("attention_mask", "int64", "batch", "past + sequence"),
        _entry("position_ids", "int64", "batch", "sequence"),
        _entry("past_key_values.0.key", "float32", "batch", 1, "past", WIDTH),
        _entry("past_key_values.0.value", "float32", "batch", 1, "past", WIDTH),
    ],
    "outputs": [
        _entry("logits", "float32", "batch", "sequence", VOCABULARY),
        _entry("present.0.key", "float32", "batch", 1, "past + sequence", WIDTH),
        _entry("present.0.value", "float32", "batch", 1, "past + sequence", WIDTH),
    ],
}


def _value(entry: dict[str, Any]) -> Any:
    import onnx
    from onnx import helper

    kind = onnx.TensorProto.INT64 if entry["dtype"] == "int64" else onnx.TensorProto.FLOAT
    return helper.make_tensor_value_info(entry["name"], kind, entry["shape"])


def write_decoder(folder: Path, seed: int = 0, *, tokenizer: bool = True) -> Path:
    """Write the decoder as an artifact folder and return the folder."""
    import onnx

    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(decoder_model(seed), str(folder / "model.onnx"))
    write_text_files(folder, tokenizer=tokenizer)
    write_manifest(folder, manifest_fields())
    return folder


def write_text_files(folder: Path, *, tokenizer: bool = True) -> None:
    """Write configuration, generation configuration and a tokenizer of whole words."""
    config = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "model_type": "toy"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP}))
    if tokenizer:
        import tokenizers
        from tokenizers import models, pre_tokenizers

        words = {word: number for number, word in enumerate(WORDS)}
        made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="a"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.save(str(folder / "tokenizer.json"))


def manifest_fields(**changes: Any) -> dict[str, Any]:
    """Return what the manifest of the decoder says besides its files."""
    return {
        "tool": "modelathe test",
        "backend": "onnx",
        "kind": "decoder",
        "model": "toy",
        "pipeline": "",
        "seed": 0,
        "signatures": {"main": SIGNATURE},
        "steps": [],
        "sizes": {},
        "fidelity": {},
        **changes,
    }
