"""Names in weight files to a transformers model's parameters, and what is left over on each side.

The names are mapped by transformers' own conversion mapping, so that renamed heads and fused
experts are found as ``from_pretrained`` finds them.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .computed import ComputedWeight
from .errors import CaptureError
from .weights import TensorWeight, Weight


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return, for every name of a parameter, the first name of the same parameter."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def tied_tensors(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, for every name of a tensor, the first name of the same numbers in memory."""
    first: dict[Any, str] = {}
    return {
        name: first.setdefault((t.data_ptr(), t.dtype, t.shape, t.stride()), name)
        for name, t in state.items()
        if t.numel()
    }


@dataclass(frozen=True, slots=True)
class Mapped:
    """What the files of a folder hold for a model.

    Attributes:
        weights: by the names of parameters and persistent buffers.
        left_out: tensors of the files that belong to other models around the same base, by their
            names there.
    """

    weights: dict[str, Weight]
    left_out: tuple[str, ...]


def map_weights(model: Any, stored: Mapping[str, Weight], folder: Path) -> Mapped:
    """Return a weight for every parameter and persistent buffer of ``model`` found in ``stored``.

    Parameters that transformers never saves have the value that it initialises them with.

    Raises:
        CaptureError: a parameter is in no file, or has another shape there, or a tensor of the
            files has no place in the model.
    """
    found, unused = _convert(model, stored)
    found |= unsaved_weights(model, _missing(model, found))
    if missing := _missing(model, found):
        shape = tuple(model.get_parameter(missing[0]).shape)
        alike = [key for key in unused if stored[key].shape == shape]
        one = len(alike) == 1
        hint = f"; if {alike[0]} is that weight, write it under this name" if one else ""
        raise CaptureError(
            f"{folder}: {len(missing)} of the model's weights are in no file, such as {missing[0]}",
            remedy="the checkpoint is incomplete, or config.json describes another model" + hint,
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in found.items():
        expected = parameters.get(name)
        if expected is not None and tuple(expected.shape) != weight.shape:
            raise CaptureError(
                f"{folder}: {name} is {list(weight.shape)} in the file and "
                f"{list(expected.shape)} by config.json",
                remedy="weights and config.json belong to different models",
            )
        if expected is not None and not weight.dtype.is_floating_point:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise CaptureError(
                f"{folder}: {name} holds {dtype} in the file, and a weight is a float",
                remedy="its weights are quantised already: start from the float checkpoint",
            )
    meant = {key: name for key, name in unused.items() if not _is_stale(model, key, name, stored)}
    others = _of_other_models(model, meant, stored)
    if unknown := [key for key in meant if key not in others]:
        raise CaptureError(
            f"{folder}: {len(unknown)} tensors of its files have no place in "
            f"{type(model).__name__}, such as {', '.join(unknown[:3])}",
            remedy="config.json describes another model (see its architectures entry), or the "
            "tensors are not needed and the files can be written without them",
        )
    return Mapped(found, tuple(others))


def _missing(model: Any, found: Iterable[str]) -> list[str]:
    """Return the parameters, tied ones by their first name, that are not in ``found``."""
    canonical = tied_names(model)
    present = {canonical[name] for name in found if name in canonical}
    return sorted({first for first in canonical.values() if first not in present})


def unsaved_weights(model: Any, names: Iterable[str]) -> dict[str, Weight]:
    """Return those of the named parameters that transformers expects in no file: sinusoids.

    They have the value that the model initialises them with.  One that is drawn at random is none.
    """
    patterns = set(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    found: dict[str, Weight] = {}
    for name in names:
        if name in unsaved or any(re.search(pattern, name) for pattern in patterns):
            value, again = (_initialised(model, name, seed) for seed in (0, 1))
            if torch.equal(value, again):
                found[name] = TensorWeight(value)
    return found


def _initialised(model: Any, name: str, seed: int) -> Tensor:
    """Return a parameter as the model initialises it; ``seed`` shows where it does not."""
    path, _, leaf = name.rpartition(".")
    module: nn.Module = model.get_submodule(path)
    fake = dict(module._parameters)
    real = {
        key: None if p is None else nn.Parameter(torch.full(p.shape, seed, dtype=p.dtype), False)
        for key, p in fake.items()
    }
    module._parameters.update(real)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model._init_weights(module)
        return module.get_parameter(leaf).detach()
    finally:
        module._parameters.update(fake)


_MASK = re.compile(r"(^|[._])(masked_bias|causal_mask)$")


def _is_stale(model: Any, key: str, name: str, stored: Mapping[str, Weight]) -> bool:
    """Tell whether a tensor that is not used is one that the model computes, or never uses.

    That is what transformers names as such, buffers that it no longer saves (which may have moved
    to another module), and the attention masks that old releases saved.
    """
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    if any(re.search(pattern, text) for pattern in patterns for text in (key, name)):
        return True
    buffers = {buffer for buffer, _ in model.named_buffers()} - set(model.state_dict())
    if {_tail(key), _tail(name)} & {_tail(buffer) for buffer in buffers}:
        return True
    shape = stored[key].shape
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(_MASK.search(key)) or (square and key.endswith((".attn.bias", ".attention.bias")))


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _of_other_models(
    model: Any, unused: Mapping[str, str], stored: Mapping[str, Weight]
) -> list[str]:
    """Return those tensors that belong to another model around the same base: another head.

    Either the model is the base alone, and the file says by its prefix what belongs to that; or
    another class of the architecture has a parameter of that name and shape.
    """
    prefix = f"{model.base_model_prefix}."
    found: set[str] = set()
    if model.base_model is model and any(key.startswith(prefix) for key in stored):
        found |= {key for key in unused if not key.startswith(prefix)}
    for shapes in _relatives(model) if len(found) < len(unused) else ():
        for key, name in unused.items():
            if stored[key].shape in (shapes.get(name), shapes.get(prefix + name)):
                found.add(key)
        if len(found) == len(unused):
            break
    return [key for key in unused if key in found]


def _relatives(model: Any) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the parameters' shapes of the other models that share this one's configuration."""
    from transformers import PreTrainedModel, initialization

    mine = type(model)
    kind: Any
    for _, kind in inspect.getmembers(sys.modules[mine.__module__], inspect.isclass):
        same = issubclass(kind, PreTrainedModel) and kind.config_class is mine.config_class
        if not same or kind is mine or kind.__module__ != mine.__module__:
            continue
        state: dict[str, Tensor] = {}
        # An abstract base, or one that this configuration does not describe, raises anything.
        with (
            contextlib.suppress(Exception),
            torch.device("meta"),
            initialization.no_init_weights(),
        ):
            state = kind(copy.deepcopy(model.config)).state_dict()
        yield {name: tuple(tensor.shape) for name, tensor in state.items()}


def _convert(model: Any, stored: Mapping[str, Weight]) -> tuple[dict[str, Weight], dict[str, str]]:
    """Apply transformers' conversion mapping; an entry made of several tensors is computed.

    Returns:
        The weights by the model's names; and the tensors that are in none of them, by their names
        in the file, each with the name that the mapping gives it.
    """
    from transformers import conversion_mapping, core_model_loading

    transforms = conversion_mapping.get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, core_model_loading.WeightConverter)]
    renamings = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
    state = model.state_dict(keep_vars=True)
    groups: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(stored, key=core_model_loading.dot_natural_key):
        target, pattern = core_model_loading.rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        groups.setdefault(target, []).append((key, pattern))
    patterns = {pattern: c for c in converters for pattern in c.source_patterns}
    found: dict[str, Weight] = {}
    unused: dict[str, str] = {}
    for target, parts in groups.items():
        key, pattern = parts[0]
        if pattern is not None and (names := _result_names(patterns[pattern], target, state)):
            found |= _converted(model, patterns[pattern], target, names, parts, stored)
        elif pattern is None and target in state:
            found[target] = stored[key]
            unused |= {further: target for further, _ in parts[1:]}
        else:
            unused |= {part: target for part, _ in parts}
    return found, unused


def _converted(
    model: Any,
    converter: Any,
    target: str,
    names: list[str],
    parts: list[tuple[str, str | None]],
    stored: Mapping[str, Weight],
) -> dict[str, Weight]:
    """Return lazy entries for what ``converter`` makes of ``parts``: those called ``names``."""
    keys = [key for key, _ in parts]

    def convert(*tensors: Tensor) -> dict[str, Tensor]:
        fresh = copy.deepcopy(converter)
        for (key, pattern), tensor in zip(parts, tensors, strict=True):
            fresh.add_tensor(target, key, pattern, tensor)
        made = fresh.convert(target, model=model, config=model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

    state = model.state_dict(keep_vars=True)
    inputs = [stored[key] for key in keys]
    rule = f"convert {type(converter).__name__} {sorted(converter.source_patterns)}"
    return {
        name: ComputedWeight(
            f"{rule} -> {name}",
            inputs,
            tuple(state[name].shape),
            inputs[0].dtype,
            lambda *tensors, name=name: convert(*tensors)[name],
        )
        for name in names
    }


def _result_names(converter: Any, target: str, state: dict[str, Any]) -> list[str]:
    """Return the parameters that a conversion named ``target`` gives."""
    made = [target]
    for pattern in converter.target_patterns:
        for other in converter.target_patterns:
            if other in target:
                made.append(target.replace(other, pattern))
    return sorted({name for name in made if name in state})
