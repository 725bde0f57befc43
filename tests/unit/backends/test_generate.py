"""Text generation: greedy, sampled, padded, stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelathe.backends.generate import Sampling, SpecialTokens, choose, first_token, generate, pad
from modelathe.backends.program_session import ProgramSession
from modelathe.backends.session import open_artifact
from modelathe.ir import DataError
from modelathe.passes.tokenizer import open_tokenizer
from support.artifacts import POSITIONS, STOP, expected_logits
from support.models import program


def greedy_reference(prompt: list[int], count: int) -> list[int]:
    """Decode with the formula, the whole text each time."""
    tokens = list(prompt)
    for _ in range(count):
        row = np.array([tokens])
        tokens.append(int(expected_logits(row, np.ones_like(row))[0, -1].argmax()))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("prompt", [[1, 2, 3], [5], [0, 9, 4, 4]])
def test_greedy_tokens_are_those_of_the_formula(toy: Path, prompt: list[int]) -> None:
    (tokens,) = generate(open_artifact(toy), [prompt], max_new_tokens=12)
    assert tokens == greedy_reference(prompt, 12)


def test_a_batch_gives_what_each_prompt_gives_alone(toy: Path) -> None:
    session = open_artifact(toy)
    prompts = [[1, 2, 3], [5], [0, 9, 4, 4]]
    together = generate(session, prompts, max_new_tokens=6)
    assert together == [generate(session, [p], max_new_tokens=6)[0] for p in prompts]


@pytest.mark.parametrize(
    ("config", "first"),
    [({"bos_token_id": 3}, 3), ({"bos_token_id": 3, "decoder_start_token_id": 0}, 0)],
)
def test_a_decoder_behind_an_encoder_begins_as_its_configuration_says(
    config: dict[str, int], first: int, toy: Path
) -> None:
    session = open_artifact(toy)
    with pytest.raises(DataError, match="names no decoder_start_token_id"):
        first_token(session)
    session.config = config
    assert first_token(session) == first


def test_a_source_is_no_longer_than_the_positions() -> None:
    session = ProgramSession.of(program("t5"))
    session.config = {**session.config, "max_position_embeddings": 4, "decoder_start_token_id": 0}
    assert len(generate(session, [[1, 2, 3, 4]], max_new_tokens=1)) == 1
    with pytest.raises(DataError, match="5 tokens, the model has 4 positions"):
        generate(session, [[1, 2, 3, 4, 5]], max_new_tokens=1)


def test_a_model_of_no_folder_has_no_tokenizer_or_settings_of_the_working_directory(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SpecialTokens.of(open_artifact(toy)).stop == {STOP}
    monkeypatch.chdir(toy)
    session = ProgramSession.of(program("token-norm"))
    assert SpecialTokens.of(session).stop == set()
    with pytest.raises(DataError, match="TokenNorm: comes from no folder, so it has no tokenizer"):
        open_tokenizer(session.folder)


def test_generation_ends_where_the_positions_do(toy: Path) -> None:
    session = open_artifact(toy)
    (tokens,) = generate(session, [[1] * (POSITIONS - 2)], max_new_tokens=99)
    assert len(tokens) == 3 or tokens[-1] == STOP  # the last one needs no position
    with pytest.raises(DataError, match="26 tokens, the model has 24 positions"):
        generate(session, [[1] * (POSITIONS + 2)])


def test_each_token_is_told_as_it_comes(toy: Path) -> None:
    heard: list[tuple[int, int]] = []
    (tokens,) = generate(
        open_artifact(toy), [[1, 2]], max_new_tokens=4, on_token=lambda *seen: heard.append(seen)
    )
    assert heard == [(0, token) for token in tokens]


def test_no_new_tokens_and_an_empty_prompt(toy: Path) -> None:
    session = open_artifact(toy)
    assert generate(session, [[1]], max_new_tokens=0) == [[]]
    with pytest.raises(DataError, match="prompt is empty"):
        generate(session, [[]])


def test_equal_seeds_give_equal_samples(toy: Path) -> None:
    session = open_artifact(toy)

    def sample(seed: int) -> list[list[int]]:
        hot = Sampling(temperature=5.0, seed=seed)
        return generate(session, [[1, 2]], max_new_tokens=10, sampling=hot)

    assert sample(1) == sample(1)
    assert len({str(sample(seed)) for seed in range(8)}) > 1


def test_sampling_follows_the_probabilities() -> None:
    probability = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(np.tile(probability, (20_000, 1))).astype(np.float32)
    drawn = choose(logits, Sampling(temperature=1.0), np.random.default_rng(0))
    share = np.bincount(drawn, minlength=4) / len(drawn)
    # 4 standard deviations of a share of 20000 draws
    np.testing.assert_allclose(share, probability, atol=4 * 0.5 / np.sqrt(20_000))


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(), {0}),
        (Sampling(temperature=1.0, top_k=2), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.5), {0}),
        (Sampling(temperature=1.0, top_p=0.51), {0, 1}),
        (Sampling(temperature=1.0, top_k=1, top_p=1.0), {0}),
    ],
)
def test_sampling_is_limited_to(sampling: Sampling, possible: set[int]) -> None:
    logits = np.log(np.tile([0.5, 0.3, 0.15, 0.05], (500, 1))).astype(np.float32)
    assert set(choose(logits, sampling, np.random.default_rng(0)).tolist()) == possible


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_bad_sampling_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        Sampling(**options)  # type: ignore[arg-type]


def test_padding_on_either_side() -> None:
    tokens, mask = pad([[1, 2], [3]], 0)
    assert (tokens.tolist(), mask.tolist()) == ([[1, 2], [0, 3]], [[1, 1], [0, 1]])
    tokens, mask = pad([[1, 2], [3]], 0, left=False)
    assert (tokens.tolist(), mask.tolist()) == ([[1, 2], [3, 0]], [[1, 1], [1, 0]])
