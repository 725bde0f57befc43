"""The demo model's shape and tokenizer, and how many bits it needs for a text."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .corpus import Corpus

Shape = Literal["llama", "gpt2"]
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
WIDTH = 192
BLOCKS = 12
HEADS = 6


def train_tokenizer(corpus: Corpus) -> Any:
    """Return a byte-level BPE tokenizer (transformers) of the training half."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in corpus.training), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(shape: Shape, context: int) -> Any:
    """Return the untrained decoder, every linear's input a multiple of 32.

    Args:
        shape: llama (RMSNorm, grouped heads, rotary, gated MLP; 3.6 M parameters) or its gpt2
            twin (LayerNorm, learned positions, biases; 3.6 M).
        context: The longest input, in tokens.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if shape == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=288,
            num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            head_dim=WIDTH // HEADS,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            **ends,
        )
        return LlamaForCausalLM(config)
    twin = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_inner=288,
        n_layer=BLOCKS,
        n_head=HEADS,
        n_positions=context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **ends,
    )
    return GPT2LMHeadModel(twin)


def add_dropout(model: nn.Module, probability: float) -> None:
    """Drop channels of embeddings, attention and MLP outputs while training; adds no module.

    One mask for all positions of a window: random numbers are slow on a CPU.
    """

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if not module.training:
            return output
        hidden = output[0] if isinstance(output, tuple) else output  # [batch, sequence, width]
        mask = nn.functional.dropout(hidden.new_ones(hidden[:, :1].shape), probability)
        return (hidden * mask, *output[1:]) if isinstance(output, tuple) else hidden * mask

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("embed_tokens", "wte", "self_attn", "attn", "mlp"):
            module.register_forward_hook(drop)


def chunked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention by plain products, faster in bfloat16 on a CPU than the fused kernel.

    Query [batch, heads, n, size], key and value [batch, groups, n, size] to
    [batch, n, heads, size].  Queries go in chunks that see only the keys up to their end, and
    the heads of a group share one product.
    """
    batch, heads, length, size = query.shape
    groups, chunk = key.shape[1], 128
    shared = heads // groups
    query = query.reshape(batch * groups, shared, length, size)
    key, value = key.reshape(-1, length, size), value.reshape(-1, length, size)
    future = query.new_full((chunk, length), float("-inf"))
    outputs = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        rows = query[:, :, start:end].reshape(-1, shared * (end - start), size)
        bias = future[: end - start, :end].triu(start + 1).repeat(shared, 1)
        scores = torch.baddbmm(
            bias.expand(len(rows), -1, -1), rows, key[:, :end].transpose(1, 2), alpha=size**-0.5
        )
        output = scores.softmax(-1, dtype=scores.dtype) @ value[:, :end]
        outputs.append(output.view(batch, heads, end - start, size))
    return torch.cat(outputs, 2).transpose(1, 2), None


def loss_of(model: nn.Module, ids: Tensor, reduction: str = "mean") -> Tensor:
    """Return the loss in nats of ids [batch, n + 1], each token from those before it."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction=reduction
    )


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, tokenizer: Any, text: str, context: int, limit: int | None = None
) -> float:
    """Return the mean bits that the model needs for a byte of the text.

    Non-overlapping windows of `context` tokens, from the start to the end of the text; the first
    token of a window is given.  bits = nats per predicted token / ln 2 * tokens / bytes.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        text: What to measure on.
        context: Tokens in a window.
        limit: Stop after so many windows; None = the whole text.
    """
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    bytes_per_token = len(text.encode()) / len(ids)
    nats, predicted, training = 0.0, 0, model.training
    model.eval()
    for window in torch.split(ids, context)[:limit]:
        if len(window) > 1:
            nats += float(loss_of(model, window[None], reduction="sum"))
            predicted += len(window) - 1
    model.train(training)
    return nats / predicted / math.log(2) / bytes_per_token


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str, tokens: int = 60) -> str:
    """Return the prompt and its greedy continuation."""
    training = model.training
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0])
    model.train(training)
    return str(text)
