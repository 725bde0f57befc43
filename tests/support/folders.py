"""Model folders as users have them: config.json and safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support.models import Transformer, perturb

_TINY = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


def tiny_bert(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the smallest encoder, which is captured faster than anything else."""
    model = Transformer("AutoModel", "bert", _TINY, dtype)().eval()
    perturb(model, seed=4)
    return model


# The smallest encoder and decoder, as bart and those that are named like it count them.
TINY_SIDES = {
    "d_model": 16,
    **{
        f"{side}_{name}": count
        for side in ("encoder", "decoder")
        for name, count in {"layers": 1, "ffn_dim": 16, "attention_heads": 2}.items()
    },
}
_SEQ2SEQ = {
    **TINY_SIDES,
    "vocab_size": 24,
    "decoder_vocab_size": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": 1,
}


def tiny_seq2seq(kind: str) -> Any:
    """Return a bart or marian; transformers does not save the positions of the second."""
    torch.manual_seed(0)
    return Transformer("AutoModelForSeq2SeqLM", kind, _SEQ2SEQ)().eval()


def write_folder(model: Any, folder: Path, **options: Any) -> Path:
    """Write a transformers model and return its folder."""
    model.save_pretrained(folder, **options)
    return folder


def copy_folder(source: Path, target: Path, **config: Any) -> Path:
    """Copy a model folder, with entries of its configuration replaced; None removes one."""
    shutil.copytree(source, target)
    settings = {**json.loads((target / "config.json").read_text()), **config}
    kept = {name: value for name, value in settings.items() if value is not None}
    (target / "config.json").write_text(json.dumps(kept))
    return target
