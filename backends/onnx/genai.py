"""``genai_config.json``: what onnxruntime-genai needs to know to run a decoder of ours."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from ...ir.cache import entry_parts
from ...ir.config import max_length, vocab_size, with_text_part
from ...ir.program import Signature

GENAI_CONFIG = "genai_config.json"
_KEY, _VALUE = "past_key_values.%d.key", "past_key_values.%d.value"
_INPUTS = ("input_ids", "attention_mask", "position_ids")
_UNLIMITED = 2048  # tokens, for a model whose configuration names no limit; one must be given


def genai_obstacle(signature: Signature, config: Mapping[str, Any]) -> str:
    """Return why onnxruntime-genai cannot run a decoder; empty when it can."""
    entries = _cache(signature)
    if not entries:
        return "the decoder has no cache of keys and values"
    if "logits" not in signature.outputs or "input_ids" not in signature.inputs:
        return "it needs an input called input_ids and an output called logits"
    if set(signature.inputs) & {entry_parts(name)[1] for name in signature.inputs}:
        return "the cache is stored as codes with scales, and it knows one tensor for each entry"
    if len(set(entries)) > 1:
        return "keys and values differ in heads or width, and it knows one size for all"
    if vocab_size(config) is None:
        return "the configuration names no vocab_size"
    return ""


def genai_config(
    signature: Signature,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    filename: str = "model.onnx",
) -> dict[str, Any]:
    """Return the configuration of a decoder for which there is no obstacle.

    Args:
        signature: of the decoder's graph.
        config: the model's configuration.
        generation: its generation settings, which win over ``config``.
        filename: the ONNX file, relative to the configuration.
    """
    longest = max_length(config) or _UNLIMITED
    config = dict(ChainMap(*map(dict, with_text_part(config))))
    both = {**config, **{key: value for key, value in generation.items() if value is not None}}
    entries = _cache(signature)
    _, heads, _, width = entries[0]
    query_heads = _number(config, "num_attention_heads") or _number(config, "n_head") or heads
    hidden = _number(config, "hidden_size") or _number(config, "n_embd")
    decoder = {
        "session_options": {"log_id": "modelathe", "provider_options": []},
        "filename": filename,
        "head_size": width,
        "hidden_size": hidden or int(query_heads) * int(width),
        "inputs": {
            **{name: name for name in _INPUTS if name in signature.inputs},
            "past_key_names": _KEY,
            "past_value_names": _VALUE,
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": query_heads,
        "num_hidden_layers": len(entries) // 2,
        "num_key_value_heads": heads,
    }
    end = both.get("eos_token_id")
    model = {
        "type": "decoder",  # the kind that takes any graph; named kinds expect their own inputs
        "bos_token_id": _token(both, "bos_token_id", 0),
        **({"eos_token_id": end} if end is not None else {}),  # without one nothing ends a text
        "pad_token_id": _token(both, "pad_token_id", _token(both, "eos_token_id", 0)),
        "context_length": longest,
        "vocab_size": vocab_size(config),
        "decoder": decoder,
    }
    return {"model": model, "search": _search(both, longest)}


def _search(settings: Mapping[str, Any], longest: int) -> dict[str, Any]:
    names = ("do_sample", "num_beams", "repetition_penalty", "temperature", "top_k", "top_p")
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    return {
        "do_sample": False,
        "early_stopping": True,
        "max_length": longest,
        "min_length": 0,
        **given,
        "past_present_share_buffer": False,  # the graph joins the cache itself
    }


def _cache(signature: Signature) -> list[tuple[int | str, ...]]:
    """Return the sizes of the cache's entries, key and value of block 0, of block 1, ..."""
    count = 0
    while _KEY % count in signature.inputs and _VALUE % count in signature.inputs:
        count += 1
    names = (name for i in range(count) for name in (_KEY % i, _VALUE % i))
    return [tuple(signature.dims[name]) for name in names]


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _token(settings: Mapping[str, Any], key: str, default: int) -> int:
    value = settings.get(key)
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, int) else default
