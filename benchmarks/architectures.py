"""Tiny, seeded models of many transformers architectures, by name.

Each row of ``ARCHITECTURES`` is a configuration small enough to capture and run in a second or
two, yet with every feature of its family switched on: grouped heads, windows shorter than the
texts they are tried on, biases, tied heads.  Weights are random but not trivial (``perturb``):
norm gains of 1, biases of 0 and logits near 0 would hide wrong translations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["decoder", "encoder", "encoder-decoder", "vision"]

BLOCKS = 3
VOCABULARY = 96
IMAGE = 32  # pixels per side

_AUTO = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModel",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "vision": "AutoModel",
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# The three ways in which configurations spell the same sizes.
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_HEAD = {"head_dim": 16}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": BLOCKS,
    "n_head": 4,
    "n_positions": 64,
    **_TOKENS,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_VIT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": 8,
}
_SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_WINDOW = {"sliding_window": 6}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": BLOCKS,
    "decoder_layers": BLOCKS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    **_TOKENS,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": BLOCKS,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One tiny configuration and how transformers builds a model from it."""

    name: str
    kind: Kind
    model_type: str
    options: Mapping[str, Any] = field(repr=False)
    auto: str
    experts: str | None = None  # ``experts_implementation`` that torch.export can follow

    def config(self) -> Any:
        """Return the transformers configuration."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **self.options)

    def model(self, seed: int = 0, mean: float = 0.0) -> nn.Module:
        """Return a float32 model in evaluation mode with perturbed random weights.

        Args:
            seed: of the weights.
            mean: of embeddings and biases, which write the residual stream.
        """
        import transformers

        options = {"experts_implementation": self.experts} if self.experts else {}
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, self.auto).from_config(self.config(), **options)
        perturb(model, seed)
        shift(model, mean)
        return model.eval()


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Give norms, biases and running statistics values that matter, and matrices unit gain."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in embeddings:
                parameter.copy_(0.5 * noise(parameter))
            elif parameter.dim() >= 2:
                fan_in = max(1, parameter[0].numel())
                parameter.copy_(noise(parameter) * fan_in**-0.5)
            else:
                parameter.add_(0.2 * noise(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.2 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.mul_(1 + 0.5 * noise(buffer).abs())


def shift(model: nn.Module, mean: float) -> None:
    """Add a number to the rows of embeddings and to all biases."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
    with torch.no_grad():
        for parameter in {id(value): value for value in (*tables, *biases)}.values():
            parameter.add_(mean)


# What one family has and no other.
_MAMBA2 = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_heads": 8,
    "head_dim": 16,
    "state_size": 16,
    "n_groups": 2,
    "chunk_size": 8,
    **_TOKENS,
}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
}
_GPT_NEO = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_layers": 4,
    "attention_types": [[["global", "local"], 2]],
    "num_heads": 4,
    "intermediate_size": 96,
    "window_size": 6,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 64,
    "n_layers": BLOCKS,
    "n_heads": 4,
    "hidden_dim": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 4,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
_MODERNBERT = {
    "local_attention": 6,
    "global_attn_every_n_layers": 3,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_MOBILEBERT = {
    "embedding_size": 32,
    "true_hidden_size": 32,
    "intra_bottleneck_size": 32,
    "num_feedforward_networks": 2,
}
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_SHARED = {"shared_expert_intermediate_size": 48}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
_CONVNEXT = {
    "num_stages": 3,
    "hidden_sizes": [16, 32, 48],
    "depths": [1, 2, 1],
    "image_size": IMAGE,
}
_SWIN = {
    "image_size": IMAGE,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_WHISPER = {"num_mel_bins": 16, "max_source_positions": 24, "max_target_positions": 64}
_BATCHED = "batched_mm"


def _row(
    kind: Kind,
    name: str,
    *parts: Mapping[str, Any],
    model_type: str = "",
    auto: str = "",
    experts: str | None = None,
    **more: Any,
) -> Architecture:
    options = {key: value for part in (*parts, more) for key, value in part.items()}
    return Architecture(
        name=name,
        kind=kind,
        model_type=model_type or name,
        options=options,
        auto=auto or _AUTO[kind],
        experts=experts,
    )


_ROWS = (
    _row("decoder", "bloom", _GPT2, hidden_size=64),
    _row("decoder", "codegen", _GPT2, rotary_dim=8, n_inner=96),
    _row("decoder", "cohere", _LLAMA, use_qk_norm=True),
    _row("decoder", "falcon", _BERT, _FALCON),
    _row("decoder", "gemma", _LLAMA, _HEAD),
    _row("decoder", "gemma2", _LLAMA, _HEAD, _WINDOW, query_pre_attn_scalar=16),
    _row("decoder", "gemma3_text", _LLAMA, _HEAD, _WINDOW, query_pre_attn_scalar=16),
    _row("decoder", "glm", _LLAMA, _HEAD),
    _row("decoder", "gpt2", _GPT2),
    _row("decoder", "gpt_bigcode", _GPT2, n_inner=96, multi_query=True),
    _row("decoder", "gpt_neo", _GPT_NEO),
    _row("decoder", "gpt_neox", _BERT, rotary_pct=0.5),
    _row("decoder", "gptj", _GPT2, rotary_dim=8, n_inner=96),
    _row("decoder", "granite", _LLAMA, _GRANITE),
    _row("decoder", "helium", _LLAMA, _HEAD),
    _row("decoder", "llama", _LLAMA),
    _row("decoder", "mamba2", _MAMBA2),
    _row("decoder", "mistral", _LLAMA, _HEAD, _WINDOW),
    _row("decoder", "mixtral", _LLAMA, _SPARSE, num_local_experts=4, experts=_BATCHED),
    _row("decoder", "nemotron", _LLAMA),
    _row("decoder", "olmo", _LLAMA, clip_qkv=2.0),
    _row("decoder", "olmo2", _LLAMA),
    _row("decoder", "olmoe", _LLAMA, _SPARSE, num_experts=4, experts=_BATCHED),
    _row("decoder", "opt", _BERT, ffn_dim=96, word_embed_proj_dim=64),
    _row("decoder", "phi", _LLAMA, num_key_value_heads=4),
    _row("decoder", "phi3", _LLAMA),
    _row("decoder", "qwen2", _LLAMA),
    _row("decoder", "qwen2_moe", _LLAMA, _SPARSE, _SHARED, num_experts=4, experts=_BATCHED),
    _row("decoder", "qwen3", _LLAMA, _HEAD, tie_word_embeddings=True),
    _row("decoder", "qwen3_moe", _LLAMA, _HEAD, _SPARSE, num_experts=4, experts=_BATCHED),
    _row("decoder", "smollm3", _LLAMA),
    _row("decoder", "stablelm", _LLAMA, use_qkv_bias=True, partial_rotary_factor=0.5),
    _row("decoder", "starcoder2", _LLAMA, sliding_window=None, tie_word_embeddings=True),
    _row("encoder", "albert", _BERT, embedding_size=32),
    _row("encoder", "bert", _BERT),
    _row("encoder", "deberta-v2", _BERT, _DEBERTA),
    _row("encoder", "distilbert", _DISTILBERT),
    _row("encoder", "electra", _BERT, embedding_size=32),
    _row("encoder", "mobilebert", _BERT, _MOBILEBERT),
    _row("encoder", "modernbert", _BERT, _MODERNBERT),
    _row("encoder", "mpnet", _BERT),
    _row("encoder", "nomic_bert", _BERT),
    _row("encoder", "roberta", _BERT),
    _row("encoder", "xlm-roberta", _BERT),
    _row("encoder-decoder", "bart", _SEQ2SEQ),
    _row("encoder-decoder", "marian", _SEQ2SEQ),
    _row("encoder-decoder", "mbart", _SEQ2SEQ),
    _row("encoder-decoder", "t5", _T5),
    _row("encoder-decoder", "t5-gated", _T5, _GATED, model_type="t5"),
    _row("encoder-decoder", "whisper", _SEQ2SEQ, _WHISPER, auto="AutoModelForSpeechSeq2Seq"),
    _row("vision", "beit", _VIT, use_relative_position_bias=True),
    _row("vision", "clip_vision_model", _VIT),
    _row("vision", "convnext", _CONVNEXT),
    _row("vision", "deit", _VIT),
    _row("vision", "dinov2", _VIT, mlp_ratio=2),
    _row("vision", "mobilenet_v2", image_size=IMAGE, depth_multiplier=0.25),
    _row("vision", "resnet", _RESNET),
    _row("vision", "siglip_vision_model", _VIT),
    _row("vision", "swin", _SWIN),
    _row("vision", "vit", _VIT),
)

ARCHITECTURES: Mapping[str, Architecture] = {row.name: row for row in _ROWS}
