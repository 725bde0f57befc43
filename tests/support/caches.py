"""A decoder of one attention that keeps its keys and values, captured in a moment."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from modelathe.ir import Program, Signature

VOCABULARY, WIDTH, HEADS = 48, 8, 2

_NAMES = {
    "ids": "input_ids",
    "key": "past_key_values.0.key",
    "value": "past_key_values.0.value",
    "output_0": "logits",
    "output_1": "present.0.key",
    "output_2": "present.0.value",
}
_ENTRY = ("batch", HEADS, "past", WIDTH // HEADS)


class CachedAttention(nn.Module):
    """Embedding, attention that looks back, and a head; keys turn with their place in the text."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.register_buffer("speeds", torch.tensor([1.0, 0.1, 1.0, 0.1]))

    def forward(self, ids: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(ids)
        q, k, v = (
            part(x).view(ids.shape[0], -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        places = torch.arange(ids.shape[1]) + key.shape[2]
        angles = places.unsqueeze(1) * self.speeds
        keys, values = torch.cat([key, turned(k, angles)], 2), torch.cat([value, v], 2)
        mask = torch.arange(keys.shape[2]) <= places.unsqueeze(1)
        out = nn.functional.scaled_dot_product_attention(turned(q, angles), keys, values, mask)
        flat = out.transpose(1, 2).reshape(ids.shape[0], -1, WIDTH)
        return self.head(flat), keys, values


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (0, 2) and (1, 3) of channels."""
    first, second = x.chunk(2, dim=-1)
    result: Tensor = x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
    return result


def example() -> tuple[Tensor, ...]:
    """Return inputs to trace with: two texts of three tokens, after a cache of five."""
    entry = torch.zeros(2, HEADS, 5, WIDTH // HEADS)
    return torch.zeros(2, 3, dtype=torch.int64), entry, entry.clone()


def dynamic() -> tuple[dict[int, object], ...]:
    """Return which sizes change."""
    batch, past = torch.export.Dim("batch", max=64), torch.export.Dim("past", max=64)
    return {0: batch, 1: torch.export.Dim.DYNAMIC}, {0: batch, 2: past}, {0: batch, 2: past}


def as_decoder(program: Program) -> Program:
    """Return the captured module with a decoder's names of inputs, outputs and sizes."""
    for node in program.graph.find_nodes(op="placeholder"):
        node.target = _NAMES[str(node.target)]
    plain = program.signature
    dims = {_NAMES["ids"]: ("batch", "sequence"), _NAMES["key"]: _ENTRY, _NAMES["value"]: _ENTRY}
    signature = Signature(
        tuple(_NAMES[name] for name in plain.inputs),
        tuple(_NAMES[name] for name in plain.outputs),
        dims,
    )
    origin = replace(program.origin, kind="decoder")
    config = {**program.config, "vocab_size": VOCABULARY}
    return replace(program, signatures={"main": signature}, origin=origin, config=config)
