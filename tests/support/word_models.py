"""Tiny Hugging Face model folders with random weights and a tokenizer of whole words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .artifacts import VOCABULARY, write_text_files


def write_llama(folder: Path, **changes: Any) -> Path:
    """Write a llama of 4 blocks, 32 wide, with a tied head, and return the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 10,
    }
    torch.manual_seed(0)
    return _write(folder, LlamaForCausalLM(LlamaConfig(**{**settings, **changes})))


def write_bert(folder: Path) -> Path:
    """Write an encoder of 2 blocks, 32 wide, and return the folder."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
    )
    return _write(folder, BertModel(config))


def write_t5(folder: Path) -> Path:
    """Write an encoder-decoder of 2 and 2 blocks, 32 wide, and return the folder."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=10,
        pad_token_id=0,
    )
    return _write(folder, T5ForConditionalGeneration(config))


def _write(folder: Path, model: Any) -> Path:
    """Perturb the weights, since a norm's ones and zeros hide mistakes, and write the folder."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder.mkdir(parents=True)
    write_text_files(folder)
    for name in ("config.json", "generation_config.json"):  # those of the model take their place
        (folder / name).unlink()
    model.eval().save_pretrained(folder)
    return folder
