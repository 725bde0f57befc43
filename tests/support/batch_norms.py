"""Models with batch norm: a small convolutional one, and one of tokens with RepBN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHANNELS = 6


class ConvNorms(nn.Module):
    """Convolutions with batch norm behind them; one norm has an activation on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.depthwise_norm, self.lone_norm = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(self.depthwise_norm(self.depthwise(x)))
        x = torch.relu(self.lone_norm(x))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


class RepBN(nn.Module):
    """``BN(x) + alpha x`` over the channels of ``x: [batch, tokens, channels]``."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.alpha, self.bn = nn.Parameter(torch.ones(1)), nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = self.bn(x) + self.alpha * x
        return x.transpose(1, 2)


class RepTokens(nn.Module):
    """Patches, RepBN, two linears; RepBN in the residual stream; RepBN before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.patch_norm = nn.Conv2d(3, CHANNELS, 2, stride=2), RepBN()
        self.norm, self.left, self.right = RepBN(), nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.down, self.post_norm = nn.Linear(8, CHANNELS), RepBN()
        self.last_norm, self.head = RepBN(), nn.Linear(CHANNELS, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_norm(self.patches(pixels).flatten(2).transpose(1, 2))
        y = self.norm(x)
        x = self.post_norm(x + self.down(self.left(y) * self.right(y)))
        result: Tensor = self.head(self.last_norm(x + torch.relu(x)).mean(1))
        return result


def pixels() -> tuple[Tensor]:
    """Return an image with the sizes that both models take, [2, 3, 4, 4]."""
    return (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)),)


def rep_tokens() -> tuple[nn.Module, tuple[Tensor], Any]:
    """Return a model, example inputs and its dynamic sizes, as ``module:factory`` has them."""
    torch.manual_seed(0)
    model = RepTokens().eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.dim() == 1:
                value.add_(torch.randn_like(value) / 3)
    return model, pixels(), ({0: torch.export.Dim.DYNAMIC},)
