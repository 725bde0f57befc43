"""The configuration of a model without some of its blocks.

Configurations say what each block is in a few ways: a list with an entry per block, a list of
block numbers, "the first k blocks", "every k-th block".  The edited one must say the same about the
blocks that are left; where none can, that is an error and not a wrong config.json.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...ir import PassError

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ROLE_COUNTS = {
    "encoder": ("encoder_layers", "num_encoder_layers", *_COUNTS),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
# Lists of block numbers, and how many blocks at the start or end are of a kind.
_NUMBERS = (
    *("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "hybrid_layer_ids"),
    *("cross_attention_layers", "window_block_indices", "window_block_indexes"),
    *("residual_block_indices", "fullatt_block_indexes", "local_layer_ids", "rope_scaling_layers"),
)
_FIRST = (
    *("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    "num_first_full_attention_layers",
)
_LAST = ("num_kv_shared_layers", "num_last_full_attention_layers")
# What the model asks of a block's own number, with no list that could say it instead.
_EVERY = (
    *("decoder_sparse_step", "encoder_sparse_step", "attn_layer_period", "expert_layer_period"),
    *("moe_layer_interval", "cross_attention_frequency", "n_layers_per_attn_res_block"),
)
_BY_NUMBER = ("scale_attn_by_inverse_layer_idx", "moe_layer_end_index")
_PER_BLOCK = re.compile(r"(^|_)(layers?|blocks?)(_|$)|(^|_)(types|modes|pattern)$")
# A list as long as a model of so many blocks is deep has one entry per block, whatever its name.
_DEEP = 8

Config = dict[str, Any]


def without_blocks(config: Config, removed: Sequence[int], total: int, role: str) -> Config:
    """Return the configuration of the model without some blocks.

    Args:
        config: of a transformers model; empty for other modules, and then the result is.
        removed: numbers of the blocks that go.
        total: how many blocks there are.
        role: ``encoder`` or ``decoder`` of an encoder-decoder, or the kind of the model.

    Raises:
        PassError: no configuration describes that model; the message names the key.
    """
    if not config:
        return {}
    kept = [index for index in range(total) if index not in set(removed)]
    parts = {} if _counts(config, total, role) else config
    for key, part in parts.items():
        if isinstance(part, dict) and _counts(part, total, role):
            return {**config, key: without_blocks(part, removed, total, role)}
    spelled = _spelled_out(config)
    full = {**spelled, **config}
    if not _counts(full, total, role):
        raise PassError(
            f"prune-blocks: the configuration has no key that says there are {total} blocks, so "
            "none can say that there are fewer",
            remedy="prune a model whose blocks are alike",
        )
    _refuse(full, kept)
    wanted = _wanted(full, kept, total, _counts(full, total, role))
    edited = copy.deepcopy({key: wanted.get(key, value) for key, value in config.items()})
    return _said(edited, {key: wanted.get(key, value) for key, value in spelled.items()})


def _counts(config: Mapping[str, Any], total: int, role: str) -> tuple[str, ...]:
    """Return the keys that hold the number of blocks."""
    two = "decoder_layers" in config or "num_decoder_layers" in config
    names = _ROLE_COUNTS.get(role, _COUNTS) if two else _COUNTS
    return tuple(name for name in names if config.get(name) == total)


def _spelled_out(config: Config) -> Config:
    """Return the configuration with what transformers derives from it; empty where it cannot."""
    if "model_type" not in config:
        return {}
    from transformers import AutoConfig

    rest = {key: value for key, value in config.items() if key != "model_type"}
    refusals: tuple[type[Exception], ...] = (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        *_validation_errors(),
    )
    try:
        found: Config = AutoConfig.for_model(config["model_type"], **rest).to_dict()
    except refusals:
        return {}
    return {key: value for key, value in found.items() if not key.startswith("_")}


def _validation_errors() -> tuple[type[Exception], ...]:
    """Return what a configuration class raises about its fields; older versions have none."""
    from huggingface_hub import errors

    found = getattr(errors, "StrictDataclassError", None)
    return (found,) if found is not None else ()


def _refuse(config: Config, kept: list[int]) -> None:
    for key in _EVERY:
        period = config.get(key)
        if not isinstance(period, int) or period < 2:
            continue
        if any((old - new) % period for new, old in enumerate(kept)):
            _inexpressible(key, period)
    for key in _BY_NUMBER:
        if config.get(key) and kept != list(range(len(kept))):
            _inexpressible(key, config[key])
    if isinstance(config.get("depths"), list):
        raise PassError(
            f"prune-blocks: the blocks are stages, of {config['depths']} layers (depths), each "
            "with a width and resolution of its own",
            remedy="leave the pass out: a stage cannot be removed",
        )


def _inexpressible(key: str, value: Any) -> None:
    raise PassError(
        f"prune-blocks: what a block does depends on its number ({key}: {value}), and no "
        "configuration says that of the blocks that would be left",
        remedy="remove blocks at the end, where no other block's number changes",
    )


def _wanted(config: Config, kept: list[int], total: int, counts: tuple[str, ...]) -> Config:
    """Return the keys that change, with their new values."""
    made: Config = {key: len(kept) for key in counts}
    for key, value in config.items():
        if key in _NUMBERS and _is_list(value, int):
            made[key] = [kept.index(number) for number in value if number in kept]
        elif key in _FIRST and isinstance(value, int) and value <= total:
            made[key] = sum(number < value for number in kept)
        elif key in _LAST and isinstance(value, int):
            made[key] = sum(number >= total - value for number in kept)
        elif key == "attention_types" and isinstance(value, list):
            kinds = [kind for pattern, repeats in value for kind in pattern * repeats]
            made[key] = [[[kinds[number] for number in kept], 1]]
        elif key not in counts and _is_per_block(key, value, total):
            picked = [value[number] for number in kept]
            made[key] = "".join(picked) if isinstance(value, str) else picked
    return made | _backbone(config, kept, total)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_per_block(key: str, value: Any, total: int) -> bool:
    if isinstance(value, str):
        return key.endswith("_pattern") and len(value) == total
    if not isinstance(value, list) or len(value) != total:
        return False
    named = bool(_PER_BLOCK.search(key))
    return named or (total >= _DEEP and not key.endswith(("_tokens", "_ids", "architectures")))


def _backbone(config: Config, kept: list[int], total: int) -> Config:
    """Return the keys of a vision backbone, whose stages are the stem and the blocks."""
    names, outputs = config.get("stage_names"), config.get("out_indices")
    if not isinstance(names, list) or len(names) != total + 1 or not _is_list(outputs, int):
        return {}
    assert outputs is not None
    left = sorted({sum(number < index for number in kept) for index in outputs})
    stages = names[: len(kept) + 1]
    return {
        "stage_names": stages,
        "out_indices": left,
        "out_features": [stages[index] for index in left],
    }


def _said(edited: Config, target: Config) -> Config:
    """Return ``edited`` with every key that transformers would derive otherwise than ``target``.

    Raises:
        PassError: saying so does not help.
    """
    if not target:
        return edited  # transformers does not know the model: there is nothing that it derives
    derived = _spelled_out(edited)
    missing = {key: value for key, value in target.items() if derived.get(key) != value}
    said = {**edited, **copy.deepcopy(missing)}
    derived = _spelled_out(said)
    for key, value in target.items():
        if derived.get(key) != value:
            _inexpressible(key, value)
    return said
