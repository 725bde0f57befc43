"""The model that a configuration describes, and what in a configuration can be switched."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...ir import CaptureError, LoweringError, Program
from ...ir.capture import capture_architecture
from ...ir.checkpoint import fake_model
from ..checks import compute_dtype

Config = dict[str, Any]
Key = tuple[str, ...]  # of a configuration, through the parts that it lies in
Switch = tuple[Key, bool]


def starting_config(program: Program) -> Config:
    """Return the configuration of a program, with the dtype that most of its weights have.

    Raises:
        LoweringError: there is none, or it does not say which class the model is.
    """
    import transformers

    if not program.config or "model_type" not in program.config:
        raise LoweringError(
            f"{program.origin.model} has no configuration of a transformers model, so no "
            "checkpoint can describe it",
            remedy="write it with --to program or --to onnx",
        )
    config = copy.deepcopy(program.config)
    names = config.get("architectures") or [program.origin.model]
    if not hasattr(transformers, str(names[0])):
        raise LoweringError(
            f"the configuration of {program.origin.model} does not name a class of transformers",
            remedy="set model.config.architectures where the model is made",
        )
    config.pop("torch_dtype", None)
    dtype = compute_dtype(program)
    parts = {key: {**part, "dtype": dtype} for key, part in config.items() if _has_dtype(part)}
    return {**config, **parts, "architectures": list(names), "dtype": dtype}


def _has_dtype(part: Any) -> bool:
    return isinstance(part, dict) and "dtype" in part


def architecture(config: Config) -> Program:
    """Capture the model that a configuration describes; its parameters have no values."""
    with _folder(config) as folder:
        return capture_architecture(Path(folder))


def empty_model(config: Config) -> Any:
    """Return the transformers model that a configuration describes, without parameters' data."""
    with _folder(config) as folder:
        return fake_model(Path(folder), config)[0]


def _folder(config: Config) -> tempfile.TemporaryDirectory[str]:
    made = tempfile.TemporaryDirectory(prefix="modelathe-")
    text = json.dumps(config, default=str)
    (Path(made.name) / "config.json").write_text(text, encoding="utf-8")
    return made


def tied_keys(config: Config, value: bool) -> list[Switch]:
    """Return the switch that ties embedding and head, or unties them; none if it is set so."""
    full = empty_model(config).config.to_dict()
    keys = [key for key, found in _switches(full, "tie_word_embeddings") if found is not value]
    return [(key, value) for key in sorted(keys, key=len)[:1]]


def bias_switches(config: Config, modules: set[str]) -> list[Switch]:
    """Return the switches that give biases to all those modules.

    What a key does is found out by flipping it: no family's names are known here.

    Raises:
        LoweringError: a module has no bias whatever is flipped.
    """
    base = empty_model(config)
    before = set(base.state_dict(keep_vars=True))
    wanted = {f"{module}.bias" for module in modules}
    chosen: list[Switch] = []
    for key, value in _switches(base.config.to_dict(), "bias"):
        try:
            flipped = empty_model(switched(config, (key, not value)))
        except CaptureError:
            continue  # the family has no such model
        after = set(flipped.state_dict(keep_vars=True))
        if (after - before) & wanted:
            chosen.append((key, not value))
            wanted -= after
    if wanted:
        raise LoweringError(
            f"{min(wanted)}: the program has this bias, {type(base).__name__} has none, and no "
            "key of its configuration adds it",
            remedy="leave out the pass that made the bias, or write --to program or --to onnx",
        )
    return chosen


def _switches(config: Mapping[str, Any], word: str, prefix: Key = ()) -> Iterator[Switch]:
    """Yield the boolean keys whose name has ``word`` in it, and their values."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _switches(value, word, (*prefix, key))
        elif isinstance(value, bool) and word in key:
            yield (*prefix, key), value


def switched(config: Config, switch: Switch) -> Config:
    """Return a configuration with one key set."""
    made = copy.deepcopy(config)
    (key, value), part = switch, made
    for name in key[:-1]:
        part = part.setdefault(name, {})
    part[key[-1]] = value
    return made
