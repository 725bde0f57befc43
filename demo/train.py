"""Train the embedded demo model: `python -m modelathe.demo.train --help`."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from . import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_FOLDER
from .corpus import HELD_OUT_MODULES, SEPARATOR, Corpus, Document, collect
from .network import (
    Shape,
    add_dropout,
    bits_per_byte,
    chunked_attention,
    loss_of,
    make_model,
    sample,
    train_tokenizer,
)

CALIBRATION_BYTES = 120_000
PROMPT = "The function returns"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the result, up to the machine's rounding.

    Attributes:
        shape: llama or gpt2.
        tokens: Training tokens, all epochs together.
        minutes: The schedule also ends after this wall time; 0 = no such limit.
        context: The model's longest input; training windows in the last part of the schedule.
        short_context: Length of the training windows before that, which are cheaper.
        lengthen: Fraction of the schedule after which windows are `context` long.
        batch: Tokens in one step.
        matrix_rate: Peak learning rate of Muon, for the matrices inside blocks.
        rate: Peak learning rate of AdamW, for embeddings, gains and biases.
        weight_decay: Of the matrices, embeddings included.
        dropout: On the output of attention and MLP and on the embeddings, while training.
        warmup: Fraction of the schedule over which the rate rises.
        decay: Fraction of the schedule over which it falls linearly to 0, at the end.
        seed: Of initialisation, order of the documents and dropout.
    """

    shape: Shape = "llama"
    tokens: int = 20_000_000
    minutes: float = 0.0
    context: int = 512
    short_context: int = 256
    lengthen: float = 0.65
    batch: int = 4096
    matrix_rate: float = 5e-3
    rate: float = 4e-3
    weight_decay: float = 0.1
    dropout: float = 0.05
    warmup: float = 0.03
    decay: float = 0.5
    seed: int = 0


@dataclass
class State:
    """How far a run is; saved in every checkpoint."""

    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def progress(self, settings: Settings) -> float:
        """Return the done fraction of the schedule, 0 to 1."""
        by_time = self.seconds / (60 * settings.minutes) if settings.minutes else 0.0
        return min(1.0, max(self.tokens / settings.tokens, by_time))


def windows(corpus: Corpus, tokenizer: Any, settings: Settings, state: State) -> Iterator[Tensor]:
    """Yield batches [windows, length + 1] of token ids, documents reshuffled each epoch."""
    documents = [
        [tokenizer.bos_token_id, *tokenizer(document.text, verbose=False).input_ids]
        for document in corpus.training
    ]
    shuffle = random.Random(settings.seed + state.tokens)
    while True:
        long = state.progress(settings) >= settings.lengthen
        length = settings.context if long else settings.short_context
        shuffle.shuffle(documents)
        stream = torch.tensor([token for document in documents for token in document])
        starts = list(range(shuffle.randrange(length), len(stream) - length, length))
        shuffle.shuffle(starts)
        count = settings.batch // length
        for first in range(0, len(starts) - count + 1, count):
            yield torch.stack(
                [stream[start : start + length + 1] for start in starts[first : first + count]]
            )


def make_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside blocks and AdamW for all other parameters."""
    named = list(model.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and (".layers." in name or ".h." in name)]
    tables = [p for name, p in named if p.ndim == 2 and not (".layers." in name or ".h." in name)]
    vectors = [p for _, p in named if p.ndim < 2]
    muon = torch.optim.Muon(
        inner,
        lr=settings.matrix_rate,
        weight_decay=settings.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    groups = [
        {"params": tables, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=True)
    return [muon, adam]


def set_rates(optimizers: list[torch.optim.Optimizer], settings: Settings, progress: float) -> None:
    """Set the learning rates: linear up, constant, linear down to 0."""
    rising = (progress + 1e-3) / settings.warmup if settings.warmup else 1.0
    factor = min(1.0, rising, (1.0 - progress) / settings.decay)
    for optimizer, peak in zip(optimizers, (settings.matrix_rate, settings.rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * factor


def joined(corpus: Corpus) -> tuple[str, str]:
    """Return the held-out text, whole, and a stretch of the training text to calibrate on."""
    held_out = SEPARATOR.join(document.text for document in corpus.held_out)
    documents = list(corpus.training)
    random.Random(0).shuffle(documents)
    text, size = [], 0
    for document in documents:
        text.append(document.text[:8000])  # so that no chapter fills it
        size += len(text[-1].encode())
        if size >= CALIBRATION_BYTES:
            break
    return held_out + "\n", SEPARATOR.join(text) + "\n"


def save(
    model: Any, tokenizer: Any, corpus: Corpus, settings: Settings, state: State, folder: Path
) -> None:
    """Write the model folder, each file complete or not at all.

    Float16 weights, tokenizer, configs and `training.json`: settings, corpus, learning curve.
    """
    weights = model.state_dict()
    for name, weight in weights.items():
        if not weight.abs().max() < torch.finfo(torch.float16).max / 8:
            raise ValueError(f"{name} does not fit float16: largest {weight.abs().max()}")
    half = make_model(settings.shape, settings.context).half()
    half.load_state_dict(weights)  # rounds
    report = {
        "settings": asdict(settings),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out_modules": list(HELD_OUT_MODULES),
        "corpus": {"training": measure(corpus.training), "held_out": measure(corpus.held_out)},
        "seconds": round(state.seconds),
        "curve": state.curve,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as name:
        partial = Path(name)
        half.save_pretrained(partial)
        tokenizer.model_max_length = settings.context
        tokenizer.save_pretrained(partial)
        text = json.dumps(report, indent=1) + "\n"
        (partial / "training.json").write_text(text, encoding="utf-8")
        for path in partial.iterdir():
            path.chmod(0o644)
            path.replace(folder / path.name)


def measure(documents: tuple[Document, ...]) -> dict[str, int | str]:
    """Return how many documents, how many bytes of text, and the text's hash."""
    text = SEPARATOR.join(document.text for document in documents).encode()
    digest = hashlib.sha256(text).hexdigest()
    return {"documents": len(documents), "bytes": len(text), "sha256": digest}


def save_checkpoint(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: State
) -> None:
    """Write all that a killed run needs to go on; complete or not at all."""
    content = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "state": asdict(state),
    }
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def load_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> State:
    """Read a checkpoint into the model and its optimizers and return how far it was."""
    content = torch.load(path, weights_only=True)
    model.load_state_dict(content["model"])
    for optimizer, saved in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return State(**content["state"])


def train(
    corpus: Corpus, tokenizer: Any, settings: Settings, folder: Path, checkpoint: Path, every: float
) -> State:
    """Train to the end of the schedule, saving the model folder every so many seconds.

    Args:
        corpus: What to train and to measure on.
        tokenizer: Its tokenizer.
        settings: Size and schedule.
        folder: The model folder to write.
        checkpoint: A file to go on from if it exists; written along with the folder.
        every: Seconds between two measurements.

    Returns:
        The final state, with the learning curve.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("chunked", chunked_attention)
    torch.manual_seed(settings.seed)
    model: Any = make_model(settings.shape, settings.context)
    add_dropout(model, settings.dropout)
    optimizers = make_optimizers(model, settings)
    state = State()
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, model, optimizers)
    held_out, _ = joined(corpus)
    losses: list[Tensor] = []
    measured, clock = state.seconds, time.monotonic() - state.seconds
    model.train()
    model.set_attn_implementation("chunked")
    for ids in windows(corpus, tokenizer, settings, state):
        set_rates(optimizers, settings, state.progress(settings))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, ids)
        torch.autograd.backward([loss])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        state.tokens += ids[:, 1:].numel()
        state.seconds = time.monotonic() - clock
        done = state.progress(settings) >= 1
        if done or state.seconds >= measured + every:
            measured = state.seconds
            model.set_attn_implementation("sdpa")
            bits = bits_per_byte(model, tokenizer, held_out, settings.context)
            add_to_curve(state, float(torch.stack(losses).mean()), bits)
            losses = []
            typer.echo(f"  {sample(model, tokenizer, PROMPT)!r}")
            save(model, tokenizer, corpus, settings, state, folder)
            save_checkpoint(checkpoint, model, optimizers, state)
            model.set_attn_implementation("chunked")
        if done:
            break
    return state


def add_to_curve(state: State, loss: float, bits: float) -> None:
    """Append a point to the learning curve and print it."""
    point = {
        "tokens": state.tokens,
        "training_loss": round(loss, 4),
        "held_out_bits_per_byte": round(bits, 4),
        "seconds": round(state.seconds),
    }
    state.curve.append(point)
    typer.echo(json.dumps(point))


def main(
    shape: Annotated[Shape, typer.Option(help="llama, or its LayerNorm twin gpt2")] = "llama",
    output: Annotated[Path, typer.Option(help="the model folder to write")] = MODEL_FOLDER,
    tokens: Annotated[int, typer.Option(help="how many to train on")] = Settings.tokens,
    minutes: Annotated[float, typer.Option(help="end the schedule by then; 0 = never")] = 0.0,
    checkpoint: Annotated[Path, typer.Option(help="go on from it")] = Path("demo-checkpoint.pt"),
    every: Annotated[float, typer.Option(help="seconds between two checkpoints")] = 300.0,
    threads: Annotated[int, typer.Option(help="0 = as many as cores")] = 0,
    seed: Annotated[int, typer.Option()] = Settings.seed,
) -> None:
    """Train the demo model on the standard library's English and write it to a folder."""
    if threads:
        torch.set_num_threads(threads)
    settings = Settings(shape=shape, tokens=tokens, minutes=minutes, seed=seed)
    corpus = collect()
    if output == MODEL_FOLDER:
        held_out, calibration = joined(corpus)
        HELDOUT_TEXT.write_text(held_out, encoding="utf-8")
        CALIBRATION_TEXT.write_text(calibration, encoding="utf-8")
    train(corpus, train_tokenizer(corpus), settings, output, checkpoint, every)


def wait_without_spinning() -> None:
    """Start this process again with OpenMP threads that sleep while they wait for each other.

    On cores shared with other work, spinning threads cost 3 to 12 times the speed (measured).  The
    OpenMP runtime reads this only when it is loaded, and `import torch` has loaded it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    wait_without_spinning()
    typer.run(main)
