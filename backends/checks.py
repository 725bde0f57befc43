"""The two checks of an artifact: that it computes what the program does, and how good that is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ir import DataError, FidelityError, LoweringError, ModelatheError, Program, main_dtype
from ..ir.infer import size_hints
from ..passes import PassContext
from ..passes.context import maximum_length
from ..passes.fidelity import Measured, Reference, relative_error
from ..passes.outputs import rows_of
from ..passes.probes import Inputs, empty_cache, feeds, next_cache, probe, size_variations
from ..passes.progress import Progress
from .coded_cache import Oracle
from .session import Array, Session

# Largest difference of an output relative to its largest value.  Runtimes sum in other orders than
# torch, block after block; a 16-bit artifact is compared with the float32 run of the program, so
# its every intermediate rounding counts too.
TOLERANCE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1, "float64": 1e-4}
_STEPS = 16
_TRIED = ((3, 4, 7), (1, 1, 4), (2, 6, 0), (1, 1, 0), (1, 7, 0))  # (batch, sequence, past)


def compute_dtype(program: Program) -> str:
    """Return the name of ``main_dtype``: what most numbers in the weights are."""
    return str(main_dtype(program)).removeprefix("torch.")


def check_lowering(
    program: Program, session: Session, dtype: str, progress: Progress
) -> dict[str, Any]:
    """Compare an artifact with the eager run of the program it was lowered from.

    Decoders are compared at five (batch, sequence, past) shapes, on a left-padded batch, and, as
    encoder-decoders are, over 16 steps of greedy decoding, where a token may differ only if the
    reference's two best are closer than the tolerance.  Codes that the artifact chose, of
    activations or of a cache, are judged one by one, and taken.

    Returns:
        the largest relative error, the tolerance, and what was compared.

    Raises:
        LoweringError: an output is further off; the message names it and the shape.
    """
    limit = TOLERANCE[dtype]
    worst = 0.0
    shapes, oracle = list(_shapes(program)), Oracle(program)
    with progress.task("checking the artifact", total=len(shapes) + 1) as advance:
        for graph, title, inputs, keep in shapes:
            made = _run(session, graph, inputs, title)
            expected, found = oracle.run(inputs, graph, made, session.codes)
            for name, value in expected.items():
                error = _error(value, found, name, keep)
                if not error <= limit:
                    raise LoweringError(
                        f"{graph}: output {name} of the artifact is off by {error:.2g} of its "
                        f"largest value at {title}; {limit:.0e} is rounding",
                        remedy="this is a defect of the lowering: report it with the model's type",
                    )
                worst = max(worst, error)
            advance(1)
        steps = _check_decoding(program, oracle, session, limit)
        advance(1)
    titles = [f"{graph}: {title}" for graph, title, _, _ in shapes]
    return {"error": worst, "tolerance": limit, "shapes": titles, "decoded_tokens": steps}


def _run(session: Session, graph: str, inputs: Inputs, title: str) -> dict[str, Array]:
    try:
        return session.run(_arrays(inputs), graph)
    except ModelatheError:
        raise
    except Exception as error:  # a runtime's own
        first = str(error).strip().partition("\n")[0]
        raise LoweringError(
            f"{graph}: the artifact fails at {title}: {first}",
            remedy="this is a defect of the lowering: report it with the model's type",
        ) from error


Shape = tuple[str, str, Inputs, Tensor | None]


def _shapes(program: Program) -> Iterator[Shape]:
    """Yield graph, title, inputs, and for padded inputs the mask of what to compare."""
    for graph, signature in program.signatures.items():
        for number, sizes in enumerate(_tried(program, graph)):
            inputs = probe(program, graph, number, **sizes)
            fed = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            yield graph, fed or "its only sizes", inputs, None
        if program.kind in ("decoder", "encoder") and "attention_mask" in signature.inputs:
            inputs, keep = padded_probe(program, graph)
            yield graph, "a left-padded batch", inputs, keep


def _tried(program: Program, graph: str) -> Iterator[dict[str, int]]:
    """Yield values of the sizes that the inputs of a graph have, each only once."""
    if program.kind == "module":
        yield from size_variations(program, graph)
        return
    longest = maximum_length(program) or 64
    names = size_hints(program.graphs[graph], program.signatures[graph])
    seen: list[dict[str, int]] = []
    for number, (batch, sequence, past) in enumerate(_TRIED):
        if past and "past" not in names:
            batch, past = batch + 1, 0
        past = min(past, max(longest - sequence, 0))
        sizes = {"batch": batch, "sequence": sequence, "past": past, "source": 3 + number}
        if (fed := {name: sizes[name] for name in sizes if name in names}) not in seen:
            seen.append(fed)
            yield fed


def padded_probe(program: Program, graph: str) -> tuple[Inputs, Tensor]:
    """Return a batch of two whose second row has three pads on the left, and its mask."""
    inputs = probe(program, graph, 9, batch=2, sequence=7, past=0)
    mask = inputs["attention_mask"].clone()
    mask[1, :3] = 0
    inputs["attention_mask"] = mask
    if "position_ids" in inputs:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return inputs, mask.bool()


def _arrays(inputs: Mapping[str, Tensor]) -> dict[str, Array]:
    """Return the inputs as arrays; numpy has no bfloat16."""
    return {
        name: (value.float() if value.is_floating_point() else value).numpy()
        for name, value in inputs.items()
    }


def _error(expected: Tensor, found: Mapping[str, Tensor], name: str, keep: Tensor | None) -> float:
    if name not in found:
        return float("inf")
    value = found[name]
    if keep is not None and value.shape == expected.shape:
        if expected.shape[:-1] == keep.shape:
            expected, value = expected[keep], value[keep]
        elif expected.dim() == 4:  # a cache entry: [batch, heads, tokens, width]
            expected, value = expected.transpose(1, 2)[keep], value.transpose(1, 2)[keep]
    if not expected.is_floating_point():
        return relative_error(expected, value)
    return relative_error(expected.float(), value.float())


def _check_decoding(program: Program, oracle: Oracle, session: Session, limit: float) -> int:
    """Decode greedily beside the reference, which chooses the tokens; return how many.

    An encoder-decoder begins by encoding.
    """
    if program.kind not in ("decoder", "encoder-decoder"):
        return 0
    graph, cache = "main", None
    fixed: Inputs = {}
    if program.kind == "encoder-decoder":
        graph = "decoder"
        source = probe(program, "encoder", 17, batch=1, source=5)
        cache = session.encode(_arrays(source))
        fixed = {**source, **oracle.run(source, "encoder", {}, session.codes)[0]}
    longest = maximum_length(program) or 64
    prompt = min(5, max(longest - _STEPS, 1))
    tokens = probe(program, graph, 17, batch=1, sequence=prompt, past=0)[session.plan.tokens]
    past, seen = empty_cache(program, 1, graph), tokens
    steps = min(_STEPS, longest - prompt)
    for step in range(steps):
        length = seen.shape[1] - tokens.shape[1] if past else 0
        mask = np.ones((1, seen.shape[1]), dtype=np.int64)
        given = tokens if past or step == 0 else tokens[:, -1:]
        logits, cache = session.decode(given.numpy(), mask, cache)
        inputs = _step_inputs(program, graph, tokens, past, length, fixed)
        state = session.state_arrays(cache)
        expected, _ = oracle.run(inputs, graph, state, session.codes)
        reference = expected["logits"][0, -1]
        found = torch.from_numpy(logits[0, -1].copy())
        _check_choice(reference, found, limit, step)
        past = next_cache(oracle.present(expected, state))
        following = reference.argmax().view(1, 1)
        seen = torch.cat([seen, following], dim=1)
        tokens = following if past else seen
    return steps


def _step_inputs(
    program: Program, graph: str, tokens: Tensor, past: Inputs, length: int, fixed: Inputs
) -> Inputs:
    """Return what a decoder graph reads in a step; ``fixed`` is what the encoder leaves to it."""
    if graph == "main":
        return feeds(program, tokens, past, length)
    mask = torch.ones((1, length + tokens.shape[1]), dtype=torch.int64)
    given = {**fixed, **past, "decoder_input_ids": tokens, "decoder_attention_mask": mask}
    return {name: given[name] for name in program.signatures[graph].inputs}


def _check_choice(reference: Tensor, found: Tensor, limit: float, step: int) -> None:
    chosen, wanted = int(found.argmax()), int(reference.argmax())
    margin = float(reference[wanted] - reference[chosen])
    allowed = 2 * limit * float(reference.abs().max())
    if margin > allowed:
        raise LoweringError(
            f"step {step + 1} of greedy decoding: the artifact chose token {chosen}, the program "
            f"{wanted}, which is {margin:.2g} ahead; {allowed:.2g} is rounding",
            remedy="this is a defect of the lowering: report it with the model's type",
        )


def check_fidelity(
    program: Program, session: Session, context: PassContext
) -> tuple[Measured, dict[str, Any]]:
    """Measure an artifact as it ships against the captured program.

    Returns:
        the figures, and what they were measured on, as ``PassContext.used`` tells it.

    Raises:
        FidelityError: its outputs hold nan or inf.
    """
    measured, used = _measure(program, session, context)
    figures = [figure for figure in (measured.kl, measured.cosine) if figure is not None]
    if not all(map(math.isfinite, figures)):
        raise FidelityError(
            "the artifact's outputs on the check data hold nan or inf, or the model's own do",
            remedy="run the model on its own input: a weight is damaged, or a dtype too narrow",
        )
    return measured, used


def _measure(
    program: Program, session: Session, context: PassContext
) -> tuple[Measured, dict[str, Any]]:
    reference = program.origin.checks
    if not isinstance(reference, Reference):
        captured = context.reference(program) if program.origin.passes else program
        reference = Reference(captured, context)
    try:
        measured = reference.measure_with(lambda batch: _forward(program, session, batch))
        return measured, reference.context.used()
    except DataError as error:
        if context.check_text is None and context.calibration is None:
            # No text was given and none can be made up: the lowering was checked all the same.
            context.progress.note(f"fidelity not measured: {error}")
            return Measured(), {}
        raise


def _forward(program: Program, session: Session, batch: Inputs) -> Tensor:
    """Return what ``Reference`` compares: logits, pooled embeddings, or the first output."""
    from .evaluate import embedding

    if program.kind == "decoder":
        rows = batch["input_ids"].numpy()
        return torch.from_numpy(session.decode(rows, np.ones_like(rows), None)[0])
    if program.kind == "encoder-decoder":
        return _seq2seq(session, batch)
    if program.kind == "encoder":
        return torch.from_numpy(embedding(session, batch["input_ids"].numpy()))
    graph = next(iter(session.graphs))
    first = next(iter(session.run(_arrays(batch), graph).values()))
    return rows_of(program.kind, torch.from_numpy(np.ascontiguousarray(first)))


def _seq2seq(session: Session, batch: Inputs) -> Tensor:
    target = batch["decoder_input_ids"].numpy()
    names = [spec.name for spec in session.graphs["encoder"].inputs]
    source = _arrays({name: batch[name] for name in names})
    cache = session.encode(source)
    return torch.from_numpy(session.decode(target, np.ones_like(target), cache)[0])
