"""The files that stand beside a model: configuration, tokenizer, generation settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..ir import Program

# Copied as they are when the model's folder has them.  Tokenizers find their files by name alone:
# those are the ``vocab_files_names`` of all tokenizers in transformers.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "dict.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "bpe.codes",
    "prophetnet.tokenizer",
    "byte_maps.json",
    "emoji.json",
    "entity_vocab.json",
    "normalizer.json",
    "word_pronunciation.json",
    "word_shape.json",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)


def write_companions(program: Program, folder: Path) -> list[str]:
    """Write ``config.json`` as the graph now is, and copy the model's other small files.

    Returns:
        the names of the files written.
    """
    source = program.origin.folder
    names = companion_names(program)
    if program.config:
        text = json.dumps(program.config, indent=2, ensure_ascii=False, default=str)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    for name in names:
        if source is not None and name != "config.json":
            shutil.copyfile(source / name, folder / name)
    return names


def companion_names(program: Program) -> list[str]:
    """Return the names of the files that ``write_companions`` writes."""
    source = program.origin.folder
    copied = [] if source is None else [name for name in _COPIED if (source / name).is_file()]
    return [*(["config.json"] if program.config else []), *copied]
