"""Small seeded inputs for any program: what checks run before and after a pass."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx

from ..ir import MAIN, Embedding, Program, QuantizedEmbedding, is_weight
from ..ir.cache import entry_parts
from ..ir.dims import Limits, evaluate
from ..ir.infer import size_hints
from .context import maximum_length, vocabulary

Inputs = dict[str, Tensor]


def dtype_of(program: Program, graph: str, name: str) -> torch.dtype:
    """Return the dtype of an input."""
    for node in program.graphs[graph].find_nodes(op="placeholder"):
        if node.target == name:
            dtype: torch.dtype = node.meta["val"].dtype
            return dtype
    raise KeyError(name)


def sizes_of(dims: tuple[int | str, ...], sizes: Mapping[str, int]) -> list[int]:
    """Return numbers for symbolic sizes."""
    return [evaluate(dim, sizes.__getitem__) for dim in dims]


def probe(program: Program, graph: str, seed: int = 0, **sizes: int) -> Inputs:
    """Return seeded inputs of a graph.

    Token ids and whatever else indexes a table are random, masks all ones, positions those after
    ``past``; floating-point inputs are normal.

    Args:
        program: whose signature to follow.
        graph: which graph.
        seed: of the generator.
        **sizes: values of symbolic sizes, such as ``batch=2, sequence=5, past=0``; others are as
            the program was captured with.
    """
    sizes = {**size_hints(program.graphs[graph], program.signatures[graph]), **sizes}
    generator = torch.Generator().manual_seed(seed)
    scales = {entry_parts(name)[1] for name in program.signatures[graph].inputs}
    made: Inputs = {}
    for node in program.graphs[graph].find_nodes(op="placeholder"):
        name, dtype = str(node.target), node.meta["val"].dtype
        shape = sizes_of(program.signatures[graph].dims[name], sizes)
        if dtype.is_floating_point:
            made[name] = torch.randn(shape, generator=generator).to(dtype)
            if name in scales:
                made[name] = made[name].abs() / 64  # what codes stand for is then about 1
        elif dtype == torch.bool or "mask" in name:
            made[name] = torch.ones(shape, dtype=dtype)
        elif name == "position_ids":
            past = sizes.get("past", 0)
            made[name] = torch.arange(past, past + shape[-1]).expand(shape).contiguous()
        elif dtype == torch.uint8:  # codes and zero points of a cache
            made[name] = torch.randint(256, shape, generator=generator, dtype=dtype)
        else:
            largest = _largest_index(program, node)
            made[name] = torch.randint(largest, shape, generator=generator, dtype=dtype)
    return made


def size_variations(program: Program, graph: str) -> Iterator[dict[str, int]]:
    """Yield values for the sizes of a user's own module: as it was captured with, and others.

    The others are 1, in front and everywhere, twice as large, and a little larger, each by another
    step.  Of those only what the declared limits allow and the program can compute: a size that it
    reshapes by 8 must be a multiple of 8.
    """
    signature = program.signatures[graph]
    sizes = size_hints(program.graphs[graph], signature)
    yield sizes
    seen = [sizes]
    for other in (
        {**sizes, **dict.fromkeys(list(sizes)[:1], 1)},
        dict.fromkeys(sizes, 1),
        {name: 2 * size for name, size in sizes.items()},
        {name: size + step for step, (name, size) in enumerate(sizes.items(), start=1)},
    ):
        legal = all(_allows(signature.limits.get(name), size) for name, size in other.items())
        if legal and other not in seen and _computes(program, graph, other):
            seen.append(other)
            yield other


def _allows(limits: Limits | None, size: int) -> bool:
    """Tell whether a size is within its limits; torch writes 2 for the smallest also if 1 works."""
    low, high = limits or (0, None)
    return (low <= size or low <= 2) and (high is None or size <= high)


def _computes(program: Program, graph: str, sizes: Mapping[str, int]) -> bool:
    try:
        program.run(probe(program, graph, **sizes), graph)
    except (RuntimeError, IndexError, ValueError):  # what kernels raise for sizes they do not take
        return False
    return True


def _largest_index(program: Program, node: fx.Node) -> int:
    """Return how many rows the tables have that an input of whole numbers indexes; 1 for none."""
    rows = [
        program.weight(table.weight).shape[0]
        for user in node.users
        if (table := Embedding.match(user)) and is_weight(table.weight)
    ]
    coded = [
        program.weight(quantized.codes).shape[0]
        for user in node.users
        if (quantized := QuantizedEmbedding.match(user))
    ]
    known = vocabulary(program)
    if str(node.target).endswith("input_ids") and known is not None:
        rows.append(known)
    return min([*rows, *coded], default=1)


def probes(program: Program, seed: int = 0) -> Iterator[tuple[str, Inputs]]:
    """Yield small inputs for each graph: with and without a cache, with and without padding.

    The longer ones have more positions than the sliding windows of tiny models.
    """
    longest = maximum_length(program) or 64
    for graph, signature in program.signatures.items():
        masked = any("mask" in name for name in signature.inputs)
        cached = any("past" in str(dim) for dims in signature.dims.values() for dim in dims)
        made = [probe(program, graph, seed, batch=2, sequence=min(12, longest), source=5, past=0)]
        if cached:
            past = min(7, longest - 1)
            made.append(probe(program, graph, seed + 1, batch=1, sequence=1, source=5, past=past))
        if masked:
            past = min(3, longest - 1) if cached else 0
            length = min(6, longest - past)
            sizes = {"batch": 2, "sequence": length, "source": 5, "past": past}
            made.append(padded(probe(program, graph, seed + 2, **sizes)))
        yield from ((graph, inputs) for inputs in made)


def padded(inputs: Inputs, count: int = 2) -> Inputs:
    """Return the inputs with the first ``count`` places of the first row masked out.

    Positions count what is not masked.  A mask as short as ``count`` keeps its last place.
    """
    made = dict(inputs)
    for name, value in inputs.items():
        if "mask" in name and value.dim() == 2:
            made[name] = value.clone()
            made[name][0, : min(count, value.shape[1] - 1)] = 0
    if "position_ids" in made and "attention_mask" in made:
        positions = (made["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        made["position_ids"] = positions[:, -inputs["position_ids"].shape[-1] :].contiguous()
    return made


def empty_cache(program: Program, batch: int, graph: str = MAIN) -> Inputs:
    """Return a cache of length 0; nothing for a decoder without one."""
    signature = program.signatures[graph]
    return {
        name: torch.zeros(
            sizes_of(signature.dims[name], {"batch": batch, "past": 0}),
            dtype=dtype_of(program, graph, name),
        )
        for name in signature.inputs
        if name.startswith("past_key_values.")
    }


def next_cache(outputs: Mapping[str, Tensor]) -> Inputs:
    """Return a step's ``present`` entries under the names that the next step reads them by."""
    return {
        name.replace("present.", "past_key_values."): value
        for name, value in outputs.items()
        if name.startswith("present.")
    }


def feeds(program: Program, tokens: Tensor, cache: Mapping[str, Tensor], past: int) -> Inputs:
    """Return the inputs of a decoder's or encoder's only graph for unpadded tokens.

    Args:
        program: a program that reads tokens.
        tokens: int64 [batch, sequence].
        cache: past keys and values.
        past: how many tokens the cache holds.
    """
    batch, length = tokens.shape
    given: Inputs = {"input_ids": tokens, **cache}
    for name in program.signature.inputs:
        if name == "attention_mask":
            given[name] = torch.ones((batch, past + length), dtype=torch.int64)
        elif name == "position_ids":
            given[name] = torch.arange(past, past + length).expand(batch, length).contiguous()
        elif name == "token_type_ids":
            given[name] = torch.zeros((batch, length), dtype=torch.int64)
    return given


def seq2seq_batch(program: Program, target: Tensor) -> Inputs:
    """Return inputs of an encoder, and tokens for its decoder.

    An encoder that reads tokens reads those of the target; another one reads random features,
    which the target seeds: those of two batches differ, and one batch always has the same.

    Args:
        program: an encoder-decoder.
        target: int64 [batch, sequence].
    """
    batch, length = target.shape
    seed = zlib.crc32(target.cpu().numpy().tobytes())
    encoder = probe(program, "encoder", seed, batch=batch, source=length)
    if "input_ids" in encoder:
        encoder["input_ids"] = target
    return {**encoder, "decoder_input_ids": target}


def seq2seq_feeds(
    program: Program, batch: Inputs, run: Callable[[Inputs, str], Mapping[str, Tensor]]
) -> Inputs:
    """Return the decoder's inputs for reading all its tokens at once after encoding.

    Args:
        program: an encoder-decoder.
        batch: what ``seq2seq_batch`` gives.
        run: computes the encoder, from its inputs and its name.
    """
    target = batch["decoder_input_ids"]
    source = {name: batch[name] for name in program.signatures["encoder"].inputs}
    crossed = run(source, "encoder")
    given: Inputs = {
        **source,
        "decoder_input_ids": target,
        "decoder_attention_mask": torch.ones_like(target),
        **empty_cache(program, target.shape[0], "decoder"),
        **{n: v for n, v in crossed.items() if n.startswith("cross_key_values.")},
    }
    return {name: given[name] for name in program.signatures["decoder"].inputs}
