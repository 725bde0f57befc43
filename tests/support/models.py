"""Tiny models: each built from a seed, with perturbed weights, and captured once per session.

``MODELS`` is what contract tests run on: one small model for each thing that passes look at, and
eight transformers models.  ``program(name)`` is a captured model, ``canonical(name)`` what every
pass is given in a pipeline.  Programs are values, so tests may share them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from modelathe.ir import Program, capture
from modelathe.passes import Canonicalize, PassContext, QuantizeWeights, TokenWindows
from support.batch_norms import ConvNorms, RepTokens, pixels
from support.caches import CachedAttention, as_decoder, dynamic, example
from support.plain_models import (
    VOCABULARY,
    HandWritten,
    NormAsWeight,
    NormLinears,
    NormMlp,
    PostNorm,
    TiedBlocks,
    TiedHead,
    TokenNorm,
)
from support.streams import BareNorms, FusedAttention

LENGTH = 32  # the longest text that the transformers models are made for
WINDOW = 4  # of sliding attention


@dataclass(frozen=True, eq=False)
class Case:
    """How to build a model and what to trace it with.

    Attributes:
        build: makes the module; weights are perturbed afterwards.
        inputs: example inputs; None for a transformers model, which needs none.
        dynamic: as ``torch.export.export`` takes it.
        output: the name of the only output of a plain module.
        finish: what is done with a captured plain module.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...] | None = None
    dynamic: Any = None
    output: str = "output"
    finish: Callable[[Program], Program] | None = None

    def module(self) -> nn.Module:
        """Return a fresh module; the same weights every time."""
        torch.manual_seed(0)
        model = self.build().eval()
        perturb(model)
        return model


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Give norms and biases values that matter, and matrices unit gain: defaults hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if id(parameter) in tables:
                parameter.copy_(0.5 * noise)
            elif parameter.dim() >= 2:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.3 * noise)
        for name, statistic in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                noise = torch.randn(statistic.shape, generator=generator).to(statistic.dtype)
                statistic.add_(noise) if name.endswith("mean") else statistic.mul_(noise.exp())


def eight_bit(program: Program) -> Program:
    """Return the program with weights as products of integers need them."""
    return QuantizeWeights(bits=8, group_size=-1, method="rtn")(program).program


@dataclass(frozen=True)
class Transformer:
    """Builds a transformers model from a tiny configuration."""

    auto: str
    kind: str
    options: Mapping[str, Any] = field(hash=False)
    dtype: torch.dtype = torch.float32

    def __call__(self) -> nn.Module:
        import transformers

        config = transformers.AutoConfig.for_model(self.kind, **self.options)
        model: nn.Module = getattr(transformers, self.auto).from_config(config, dtype=self.dtype)
        return model


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    **_SPECIAL,
}
_LLAMA = {**_SIZES, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
_GEMMA = {
    "num_hidden_layers": 3,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_VIT = {"image_size": 8, "patch_size": 4}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def _transformer(auto: str, kind: str, *options: Mapping[str, Any], **more: Any) -> Transformer:
    dtype = more.pop("dtype", torch.float32)
    merged: dict[str, Any] = {}
    for option in (*options, more):
        merged.update(option)
    return Transformer(auto, kind, merged, dtype)


_DECODER, _ENCODER = "AutoModelForCausalLM", "AutoModel"
_ROWS = ({0: torch.export.Dim("rows", min=1, max=64)},)
_X = (torch.ones(3, 8),)
_IDS = (torch.zeros(2, 3, dtype=torch.int64),)
_ID_SIZES = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)

TRANSFORMERS: dict[str, Case] = {
    # grouped heads, rotary positions, head tied to the embedding
    "llama": Case(_transformer(_DECODER, "llama", _LLAMA, tie_word_embeddings=True)),
    # learned positions, products written x W + b, head tied to the embedding
    "gpt2": Case(_transformer(_DECODER, "gpt2", _GPT2, _SPECIAL)),
    # sliding windows shorter than the texts, gains written 1 + w, norms on queries and keys
    "gemma3": Case(_transformer(_DECODER, "gemma3_text", _LLAMA, _GEMMA)),
    "llama-bf16": Case(_transformer(_DECODER, "llama", _LLAMA, dtype=torch.bfloat16)),
    # norms behind the residual sum, token types
    "bert": Case(_transformer(_ENCODER, "bert", _SIZES)),
    # one block, used twice
    "albert": Case(_transformer(_ENCODER, "albert", _SIZES, embedding_size=16)),
    "vit": Case(_transformer(_ENCODER, "vit", _SIZES, _VIT)),
    # two graphs
    "t5": Case(_transformer("AutoModelForSeq2SeqLM", "t5", _T5)),
}
MODELS: dict[str, Case] = {
    "norm-mlp": Case(NormMlp, _X, _ROWS),
    "norm-linears": Case(NormLinears, _X),
    "norm-as-weight": Case(NormAsWeight, _X),
    "post-norm": Case(PostNorm, _X),
    "hand-written": Case(HandWritten, (torch.ones(2, 3, 8),)),
    "tied-head": Case(TiedHead, _IDS, _ID_SIZES),
    "tied-blocks": Case(TiedBlocks, _IDS, _ID_SIZES),
    # two linears on one value, their weights in 8 bits
    "eight-bit": Case(NormLinears, _X, finish=eight_bit),
    "token-norm": Case(TokenNorm, _IDS, _ID_SIZES),
    "bare-norms": Case(BareNorms, _IDS, _ID_SIZES, "logits"),
    "fused-attention": Case(FusedAttention, (torch.ones(2, 3, 8),)),
    "conv-norms": Case(ConvNorms, pixels(), _ROWS),
    "rep-tokens": Case(RepTokens, pixels(), _ROWS),
    "cached-attention": Case(CachedAttention, example(), dynamic(), finish=as_decoder),
    **TRANSFORMERS,
}


@functools.cache
def module(name: str) -> nn.Module:
    """Return the module of a model; nobody writes to it."""
    return MODELS[name].module()


@functools.cache
def program(name: str) -> Program:
    """Return a model as it is captured, under its name here."""
    case = MODELS[name]
    found = capture(module(name), case.inputs, case.dynamic)
    if case.finish is not None:
        return case.finish(found)
    names = {"output": case.output}
    renamed = {graph: signature.renamed(names) for graph, signature in found.signatures.items()}
    return replace(found, signatures=renamed)


@functools.cache
def canonical(name: str) -> Program:
    """Return a model as ``canonicalize`` leaves it."""
    return Canonicalize()(program(name)).program


def quantizer(**options: Any) -> QuantizeWeights:
    """Return ``quantize-weights`` in groups that divide every width of the models."""
    return QuantizeWeights(**{"group_size": 8, **options})


def context(**options: Any) -> PassContext:
    """Return a context with a few seeded tokens as its texts, so that nothing is generated."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(VOCABULARY, (6, 12), generator=generator)
    windows = [TokenWindows.of(rows, "seeded tokens") for rows in (tokens[:4], tokens[4:])]
    return PassContext(**{"calibration": windows[0], "check_text": windows[1], **options})
