"""Seeded inputs for any program of ``support.models``, and the same given to transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from modelathe.ir import MAIN, Program
from modelathe.ir.wrappers import cache_argument

Inputs = dict[str, Tensor]

# (batch, sequence, past): a cache and none, one token and several, one row and several
SHAPES = ((3, 4, 7), (1, 1, 4), (2, 6, 0), (1, 1, 0), (1, 7, 0))


def feed(
    program: Program,
    graph: str = MAIN,
    *,
    batch: int = 2,
    sequence: int = 5,
    past: int = 0,
    pads: int = 0,
    seed: int = 0,
) -> Inputs:
    """Return random inputs; the first row's first ``pads`` places are masked out."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"batch": batch, "sequence": sequence, "past": past, "source": 6}
    made: Inputs = {}
    for node in program.graphs[graph].find_nodes(op="placeholder"):
        dims = program.signatures[graph].dims[str(node.target)]
        shape = [_size(dim, sizes) for dim in dims]
        made[str(node.target)] = _random(program, node, shape, generator)
    for name, value in made.items():
        if "mask" in name:
            value.fill_(1)
            value[0, : min(pads, value.shape[1] - 1)] = 0
    if "position_ids" in made:
        positions = (made["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        made["position_ids"] = positions[:, -sequence:].contiguous()
    return made


def _size(dim: int | str, sizes: dict[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    return sum(sizes.get(part.strip(), 4) for part in dim.split("+"))


def _random(
    program: Program, node: fx.Node, shape: list[int], generator: torch.Generator
) -> Tensor:
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if "token_type" in str(node.target):
        return torch.randint(2, shape, generator=generator)
    return torch.randint(int(program.config.get("vocab_size", 16)), shape, generator=generator)


@torch.no_grad()
def decoder_outputs(model: Any, inputs: Inputs) -> Inputs:
    """Return what transformers makes of a decoder's inputs, by the names of the program."""
    from transformers.cache_utils import DynamicCache

    past = [value for name, value in inputs.items() if name.startswith("past_key_values")]
    cache: Any = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
    plain = {name: value for name, value in inputs.items() if not name.startswith("past")}
    out = model(**plain, **{cache_argument(model.forward): cache}, use_cache=True)
    made = {"logits": out.logits}
    for number, layer in enumerate(cache.layers):
        made |= {f"present.{number}.key": layer.keys, f"present.{number}.value": layer.values}
    return made


@torch.no_grad()
def plain_outputs(model: nn.Module, inputs: Inputs, names: tuple[str, ...]) -> Inputs:
    """Return the named outputs of a transformers model without a cache."""
    out = model(**inputs)
    return {name: out[name] for name in names}
