"""What a model's configuration says, whatever the family calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "seq_length",
)
_DEPTH_KEYS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)


def has_one_layer(config: Mapping[str, Any]) -> bool:
    """Tell whether a model, or its encoder or decoder, is said to have one layer only."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    return any(part.get(key) == 1 for part in parts for key in _DEPTH_KEYS)


def max_length(config: Mapping[str, Any]) -> int | None:
    """Return the longest sequence that a model has positions for, in tokens.

    The smallest where several are named; None where none is.
    """
    for source in with_text_part(config):
        found = [source.get(key) for key in _LENGTH_KEYS]
        longest = min((n for n in found if isinstance(n, int) and n > 0), default=None)
        if longest is not None:
            return longest
    return None


def with_length(config: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """Return a configuration that says so where a model has positions for ``limit`` tokens only."""
    known = max_length(config)
    if limit is None or (known is not None and known <= limit):
        return dict(config)
    return {**config, "max_sequence_length": limit}


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model knows; None where none is named."""
    found = [source.get("vocab_size") for source in with_text_part(config)]
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), None)


def end_tokens(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end a text: one, several as in Llama 3, or none that is named."""
    for source in with_text_part(config):
        named = source.get("eos_token_id")
        several = named if isinstance(named, list | tuple) else (named,)
        if found := tuple(n for n in several if isinstance(n, int) and not isinstance(n, bool)):
            return found
    return ()


def with_text_part(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return a configuration, and the one of its language model where it has that apart."""
    nested = config.get("text_config")
    return (config, nested) if isinstance(nested, Mapping) else (config,)
