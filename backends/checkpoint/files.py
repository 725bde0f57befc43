"""The weight files of a model folder: names as the files have them, in parts of 5 GB."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ir import LoweringError, Weight
from ...ir.mapping import tied_names, unsaved_weights
from ...ir.storage import write_safetensors

PART = 5_000_000_000  # bytes of weights in one file
SINGLE = "model.safetensors"  # ``from_pretrained`` reads it before an index of several
Entry = tuple[str, Weight]


def write_weights(
    entries: Iterable[Entry], folder: Path, written: Callable[[str, Tensor], None]
) -> None:
    """Write what ``file_entries`` gives, one weight at a time, with an index if in several files.

    Args:
        entries: name and weight.
        folder: where to write.
        written: called with each name and tensor while it is in memory.
    """
    parts = _parts(entries)
    metadata = {"format": "pt"}
    if len(parts) == 1:
        write_safetensors(folder / SINGLE, parts[0], written, metadata)
        return
    places: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / name, part, written, metadata)
        places |= dict.fromkeys((entry for entry, _ in part), name)
    total = sum(weight.bytes for part in parts for _, weight in part)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    text = json.dumps(index, indent=2) + "\n"
    (folder / f"{SINGLE}.index.json").write_text(text, encoding="utf-8")


def _parts(entries: Iterable[Entry]) -> list[list[Entry]]:
    parts: list[list[Entry]] = [[]]
    room = PART
    for name, weight in entries:
        if parts[-1] and weight.bytes > room:
            parts.append([])
            room = PART
        parts[-1].append((name, weight))
        room -= weight.bytes
    return parts


def file_entries(model: Any, weights: Mapping[str, Weight]) -> list[Entry]:
    """Return what the files hold: transformers' conversion mapping, backwards.

    What it never saves, such as tables of sinusoids, is left out where it is as transformers makes
    it; where a pass changed it, it is in the files, and ``from_pretrained`` takes it from there.

    Args:
        model: without data.
        weights: its parameters and persistent buffers; of tied ones, the first name.

    Raises:
        LoweringError: a conversion cannot be reversed.
    """
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters = _reversed_mapping(model)
    known = _by_any_name(model, weights)
    groups: dict[str, list[str]] = {}
    plain: dict[str, str] = {}
    names = set(_names(model)) - _left_out(model, known)
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, [], converters, reverse=True)
        if pattern is None:
            plain[name], _ = rename_source_key(name, renamings, [], reverse=True)
        else:
            groups.setdefault(target, []).append(name)
    reverter = _Reverter(model)
    entries = [(new, known[name]) for name, new in plain.items()]
    for group in groups.values():
        entries += reverter.entries([(name, known[name]) for name in group])
    return entries


def _left_out(model: Any, weights: Mapping[str, Weight]) -> set[str]:
    """Return the parameters that are never saved and have the value that the model makes."""
    names = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) & set(weights)
    made = unsaved_weights(model, names)
    return {
        name for name, weight in made.items() if torch.equal(weight.load(), weights[name].load())
    }


def _by_any_name(model: Any, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Return the weights under all names that tied ones have."""
    shared = tied_names(model)
    return {**{name: weights[first] for name, first in shared.items()}, **weights}


def _names(model: Any) -> list[str]:
    """Return one name for each weight that files hold: of tied ones, the one that is loaded."""
    derived = getattr(model, "all_tied_weights_keys", {})
    shared = tied_names(model)
    chosen: dict[str, str] = {}
    for name in model.state_dict(keep_vars=True):
        first = shared.get(name, name)
        if first not in chosen or (chosen[first] in derived and name not in derived):
            chosen[first] = name
    return list(chosen.values())


def _reversed_mapping(model: Any) -> tuple[list[Any], list[Any]]:
    from transformers import conversion_mapping, core_model_loading

    mapping = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    kept = [one for one in mapping if not isinstance(one, core_model_loading.PrefixChange)]
    try:
        turned = [one.reverse_transform() for one in reversed(kept)]
    except NotImplementedError as error:
        raise LoweringError(
            f"{type(model).__name__}: transformers cannot reverse how it reads the weight files",
            remedy="write it with --to program or --to onnx",
        ) from error
    converters = [t for t in turned if isinstance(t, core_model_loading.WeightConverter)]
    renamings = [t for t in turned if isinstance(t, core_model_loading.WeightRenaming)]
    return renamings, converters


class _Reverter:
    """Makes the entries of the files that a group of parameters is read from, all at once.

    They are written one after the other, so the last group is all that is held in memory.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.last: tuple[list[Entry], dict[str, Tensor]] = ([], {})

    def entries(self, group: list[Entry]) -> list[Entry]:
        """Return the entries of a group, unread."""
        shapes = self._revert(group, lambda w: torch.empty(w.shape, dtype=w.dtype, device="meta"))
        return [(name, _Part(self, group, name, shape)) for name, shape in shapes.items()]

    def load(self, group: list[Entry], name: str) -> Tensor:
        """Return one entry of a group."""
        if self.last[0] is not group:
            self.last = (group, self._revert(group, lambda w: w.load()))
        return self.last[1][name]

    def _revert(self, group: list[Entry], load: Callable[[Weight], Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        state = {name: load(weight) for name, weight in group}
        made: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        return made


class _Part(Weight):
    """One entry of a file that is made from parameters."""

    def __init__(self, reverter: _Reverter, group: list[Entry], name: str, like: Tensor) -> None:
        self.reverter, self.group, self.name = reverter, group, name
        self.shape, self.dtype = tuple(like.shape), like.dtype

    @property
    def fingerprint(self) -> str:
        return f"{self.name} of {', '.join(weight.fingerprint for _, weight in self.group)}"

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        value = self.reverter.load(self.group, self.name)
        return value if dtype is None else value.to(dtype)
