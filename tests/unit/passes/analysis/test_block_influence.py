"""Block influence is one minus the mean cosine of what a block reads and writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from modelathe.ir import DataError, PassError, TensorWeight, find_blocks, fingerprint
from modelathe.passes import PassContext, PruneBlocks, TokenWindows, outputs
from modelathe.passes.analysis.block_influence import block_influence
from modelathe.passes.progress import Advance
from support.models import canonical, context, module
from support.tiny import tiny_ids, tiny_model, tiny_program


def cosine_distance(before: torch.Tensor, after: torch.Tensor) -> float:
    cosines = torch.cosine_similarity(before.double(), after.double(), dim=-1)
    return float(1 - cosines.mean())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
@torch.no_grad()
def test_scores_are_those_of_the_hidden_states_of_transformers(name: str) -> None:
    given = context()
    tokens = given.calibration_tokens(canonical(name)).tokens
    model: Any = module(name)
    states: list[torch.Tensor] = []
    blocks = model.get_submodule(
        {"gpt2": "transformer.h", "bert": "encoder.layer"}.get(name, "model.layers")
    )
    handles = [
        block.register_forward_hook(
            lambda _, args, result: states.extend(
                [args[0], result[0] if isinstance(result, tuple) else result]
            )
        )
        for block in blocks
    ]
    try:
        model(input_ids=tokens)
    finally:
        for handle in handles:
            handle.remove()
    found = block_influence(canonical(name), given)
    expected = [cosine_distance(*states[i : i + 2]) for i in range(0, len(states), 2)]
    assert found.scores == pytest.approx(expected, abs=1e-5)  # hidden states are float32
    assert found.tokens == tokens.numel()


def tiny_context() -> PassContext:
    return PassContext(calibration=TokenWindows.of(tiny_ids(), "seeded tokens"))


def test_a_block_that_changes_nothing_scores_zero_and_scaling_changes_no_score() -> None:
    model: Any = tiny_model(3)
    with torch.no_grad():
        model.layers[1].down.weight.zero_()
        model.layers[1].down.bias.zero_()
    found = renamed(model)
    scores = block_influence(found, tiny_context()).scores
    assert scores[1] == 0.0
    assert min(scores[0], scores[2]) > 0.001
    left = PruneBlocks(count=1)(found, tiny_context()).program
    assert [block.key for block in find_blocks(left.graph)] == ["layers.0", "layers.2"]


def renamed(model: Any) -> Any:
    """Return the program with its input called as a model's that reads tokens."""
    from dataclasses import replace

    found = tiny_program(model)
    (name,) = found.signature.inputs
    for node in found.graph.find_nodes(op="placeholder"):
        node.target = "input_ids"
    signature = found.signature.renamed({name: "input_ids"})
    return replace(found, signatures={"main": signature})


def test_batches_change_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = block_influence(canonical("gpt2"), context())
    monkeypatch.setattr(outputs, "BATCH_TOKENS", 1)
    row_by_row = block_influence(canonical("gpt2"), context())
    assert row_by_row.scores == pytest.approx(whole.scores, abs=1e-6)
    assert row_by_row.tokens == whole.tokens


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_both_graphs_of_an_encoder_decoder_are_scored(graph: str) -> None:
    found = block_influence(canonical("t5"), context(), graph)
    assert found.graph == graph
    assert len(found.scores) == 2
    assert all(0 < score < 2 for score in found.scores)


def test_the_program_is_untouched_and_stale_scores_are_refused() -> None:
    found = canonical("gpt2")
    before = fingerprint(found)
    scores = block_influence(found, context())
    assert fingerprint(found) == before
    scores.check(found)
    with pytest.raises(PassError, match="measured on another program"):
        scores.check(PruneBlocks(blocks=(0,))(found).program)


def test_progress_counts_the_windows() -> None:
    class Listener:
        def __init__(self) -> None:
            self.seen: list[tuple[str, int | None]] = []
            self.done = 0

        @contextmanager
        def task(self, title: str, total: int | None = None) -> Iterator[Advance]:
            self.seen.append((title, total))
            yield self.advance

        def advance(self, amount: int) -> None:
            self.done += amount

        def note(self, message: str) -> None:
            raise AssertionError(message)

    listener = Listener()
    block_influence(canonical("gpt2"), context(progress=listener))
    assert listener.seen == [("scoring blocks", 4)]
    assert listener.done == 4


def test_a_model_that_reads_no_tokens_cannot_be_scored() -> None:
    with pytest.raises(DataError, match="reads no tokens"):
        PruneBlocks(count=1)(canonical("vit"), PassContext())


class Unreadable(TensorWeight):
    """A weight that nobody may read."""

    def load(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        raise AssertionError("the head is read")


def test_the_logits_are_not_computed() -> None:
    found = canonical("llama-bf16").editable()
    expected = block_influence(found, context()).scores
    head = found.weights["lm_head.weight"].load()
    found.weights.put("lm_head.weight", Unreadable(head, "unreadable"))
    assert block_influence(found, context()).scores == expected
