"""Small modules, each of them one thing that passes look at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 48


class NormMlp(nn.Module):
    """LayerNorm, dropout, a clone, two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(self.drop(self.norm(x)).clone())))
        return result


class NormLinears(nn.Module):
    """A norm that two linears read, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        result: Tensor = self.left(y) * self.right(y)
        return result


class NormAsWeight(nn.Module):
    """A norm that a linear reads as its weight: it must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.basis = nn.LayerNorm(8), nn.Parameter(torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.norm(self.basis))


class PostNorm(nn.Module):
    """A norm that a residual sum reads beside the linear: it must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        result: Tensor = y + self.up(y)
        return result


class HandWritten(nn.Module):
    """RMSNorm, gelu and ``x W + b`` with ``W: [in, out]`` spelled out, as GPT-2 and Gemma do."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.matrix = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        y = (x * scale) * (1 + self.gain)
        flat = torch.addmm(self.shift, y.view(-1, 8), self.matrix)
        z = flat.view(x.shape)
        return 0.5 * z * (1 + torch.tanh(0.7978845608028654 * (z + 0.044715 * z.pow(3))))


class Block(nn.Module):
    """``x + down(relu(up(norm(x))))``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return result


class TiedBlocks(nn.Module):
    """Embedding, two blocks, norm, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(8, bias=False), nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(self.norm(x))
        return result


class TiedHead(nn.Module):
    """Embedding, norm, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.embed(ids)))
        return result


class TokenNorm(nn.Module):
    """Embedding, norm and a head of its own, for passes that calibrate on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.embed(input_ids)))
        return result
