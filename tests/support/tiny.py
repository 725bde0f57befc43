"""A small language model of plain modules, captured in a moment, for tests of single passes."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import torch
from torch import Tensor, nn

from modelathe.ir import Program, capture

VOCABULARY, WIDTH, HIDDEN = 24, 32, 64


class TinyBlock(nn.Module):
    """``x + down(gelu(up(norm(x))))``, times a constant, plus a table of whole numbers."""

    def __init__(self, hidden: int = HIDDEN, factor: float = 1.0, offset: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.factor = factor
        self.register_buffer("table", torch.full((WIDTH,), offset))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(nn.functional.gelu(self.up(self.norm(x))))
        result: Tensor = x + self.factor * inner + self.table
        return result


class TinyModel(nn.Module):
    """Embedding, blocks, norm, and a head that may share the embedding's weight."""

    def __init__(self, blocks: list[nn.Module], tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(self.norm(x))
        return result


def tiny_model(
    blocks: int | list[nn.Module] = 4, *, tied: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return a model with random weights, norms included."""
    made = [TinyBlock() for _ in range(blocks)] if isinstance(blocks, int) else blocks
    model = TinyModel(made, tied).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model.to(dtype)


def tiny_program(model: nn.Module) -> Program:
    """Capture ``model``; its output is called ``logits``."""
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = capture(model, (torch.zeros(2, 3, dtype=torch.int64),), (dynamic,))
    signatures = {name: s.renamed({"output": "logits"}) for name, s in program.signatures.items()}
    return replace(program, signatures=signatures)


@functools.cache
def tiny(blocks: int = 4, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Program:
    """Return the program of ``tiny_model``, captured once."""
    return tiny_program(tiny_model(blocks, tied=tied, dtype=dtype))


def tiny_ids() -> Tensor:
    """Return a few tokens, [3, 7]."""
    return torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2))


def logits(program: Program) -> Tensor:
    """Run a program made by ``tiny_program`` on ``tiny_ids``."""
    (name,) = program.signature.inputs
    return program.run({name: tiny_ids()})["logits"]


def logits_with(model: nn.Module, weights: dict[str, Tensor]) -> Tensor:
    """Run a model on ``tiny_ids`` with some parameters replaced; tied ones stay tied."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in weights.items():
            changed.get_parameter(name).copy_(value)
        result: Tensor = changed(tiny_ids())
    return result
