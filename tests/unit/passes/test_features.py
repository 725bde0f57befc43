"""An encoder that reads features beside a decoder that reads tokens."""

from __future__ import annotations

import functools

import torch

from modelathe.ir import Program, capture
from modelathe.passes import PassContext, TokenWindows
from modelathe.passes.outputs import graph_inputs, runner, token_batch
from support.folders import TINY_SIDES
from support.listener import Listener
from support.models import Transformer

_SIZES = {
    **TINY_SIDES,
    "vocab_size": 16,
    "num_mel_bins": 4,
    "max_source_positions": 6,
    "max_target_positions": 16,
    **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "decoder_start")},
}


@functools.cache
def whisper() -> Program:
    torch.manual_seed(0)
    return capture(Transformer("AutoModelForSpeechSeq2Seq", "whisper", _SIZES)().eval())


def test_every_batch_of_text_has_features_of_its_own() -> None:
    first, second = torch.arange(8).view(2, 4), torch.arange(1, 9).view(2, 4)
    run = runner(whisper())
    for graph in ("encoder", "decoder"):
        (name,) = set(whisper().signatures[graph].inputs) & {"input_features", _CROSS}
        mine, other, again = (
            graph_inputs(whisper(), graph, tokens, run)[name] for tokens in (first, second, first)
        )
        assert torch.equal(mine, again)
        assert not torch.equal(mine, other)


_CROSS = "cross_key_values.0.key"


def test_what_is_measured_has_the_features_of_what_is_observed() -> None:
    tokens = torch.arange(8).view(2, 4)
    observed = graph_inputs(whisper(), "encoder", tokens, runner(whisper()))
    batch = token_batch(whisper(), tokens)
    assert torch.equal(batch["input_features"], observed["input_features"])


def test_random_features_are_told_once() -> None:
    listener = Listener()
    windows = TokenWindows.of(torch.arange(8).view(2, 4), "test")
    context = PassContext(calibration=windows, check_text=windows, progress=listener)
    for _ in range(2):
        context.calibration_tokens(whisper())
        context.check_tokens_of(whisper())
    (note,) = listener.notes
    assert note.startswith("the encoder of WhisperForConditionalGeneration reads no text")
    assert note.endswith("seeded random features")
