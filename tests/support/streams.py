"""Small models with a residual stream that LayerNorms without gain and bias read, or attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

F = nn.functional


class BareNorms(nn.Module):
    """Two embeddings, ``x + down(relu(up(n(x))))``, norm and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.types = nn.Embedding(16, 8), nn.Embedding(16, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.types(ids)
        x = x + self.down(torch.relu(self.up(F.layer_norm(x, [8]))))
        result: Tensor = self.head(F.layer_norm(x, [8]))
        return result


class FusedAttention(nn.Module):
    """A norm, and attention of two heads whose queries, keys and values one linear makes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).view(2, 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(2, 3, 8))
        return result
