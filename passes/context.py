"""What a pass may read besides the program: data that cannot be written in a pipeline text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..ir import DataError, Program, StorageError
from ..ir.config import max_length, vocab_size
from .data import (
    USUAL_SAMPLES,
    TextSource,
    TokenWindows,
    calibration_windows,
    check_windows,
    random_tokens,
    read_text,
    tokenize,
)
from .progress import Progress, SilentProgress, share_task
from .tokenizer import Tokenizer, has_tokenizer, open_tokenizer

SELF = "self"


@dataclass(frozen=True)
class PassContext:
    """Calibration data, seed and listener of one run.

    Attributes:
        calibration: a text file, an iterable of texts, token windows, ``self`` for sequences that
            the untouched model generates itself, or None: then ``self`` on decoders that fit in
            memory.  Encoders write no text: either gives them random tokens.
        check_text: what fidelity is measured on; None for the calibration text's last tenth,
            which never calibrates, else for text of the model's own.
        calibration_samples: windows to calibrate on, at least 1; None for 128, or as many as a
            text has.
        calibration_length: tokens in a window, at least 2; cut to the model's maximum.
        check_tokens: tokens to measure fidelity on, at most; at least 2.
        seed: of everything random.
        device: where heavy work runs.
        progress: who is told how far long work is.
        state: a folder where long passes keep what they need to go on after they were stopped, and
            where they look for it; None: they begin anew.
        cache: a folder where text that the model writes itself is kept between runs, which changes
            nothing but the time that they take; None: nowhere.
    """

    calibration: TextSource | TokenWindows | None = None
    check_text: TextSource | TokenWindows | None = None
    calibration_samples: int | None = None
    calibration_length: int = 512
    check_tokens: int = 8192
    seed: int = 0
    device: str = "cpu"
    progress: Progress = field(default_factory=SilentProgress)
    state: Path | None = None
    cache: Path | None = None
    # Windows already made in this run, by what they were made for, which model, and their size.
    _made: dict[tuple[str, object, tuple[int, ...]], TokenWindows] = field(
        default_factory=dict, repr=False, compare=False
    )

    _captured: list[Program] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        # One token alone predicts nothing.
        for name, least in (("samples", 1), ("length", 2)):
            value = getattr(self, f"calibration_{name}")
            if value is not None and value < least:
                raise ValueError(f"calibration_{name} is at least {least}, got {value}")
        if self.check_tokens < 2:
            raise ValueError(f"check_tokens is at least 2, got {self.check_tokens}")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise DataError(
                f"device {self.device}: torch finds no such device here",
                remedy="leave --device out, or install torch with CUDA on a machine with a GPU",
            )
        for name in ("calibration", "check_text"):
            source = getattr(self, name)
            if source is not None and not isinstance(source, str | Path | TokenWindows):
                # An iterator can be read once, and two things may want to read it.
                object.__setattr__(self, name, read_text(source))

    def fresh(self) -> PassContext:
        """Return the same context with no windows made yet, for one run of a pipeline."""
        return dataclasses.replace(self, _made={}, _captured=[])

    def reference(self, program: Program) -> Program:
        """Return the untouched model behind ``program``: the one in memory, or captured again.

        Raises:
            CaptureError: its source is gone.
        """
        known = self._captured
        if known and known[0].origin.recapture is program.origin.recapture:
            return known[0]
        with share_task(self.progress, "capturing the untouched model") as report:
            return program.origin.reference(report)

    def remember(self, captured: Program) -> None:
        """Have ``reference`` return ``captured``, an untouched model, instead of capturing it."""
        self._captured[:] = [captured]

    def used(self) -> dict[str, dict[str, Any]]:
        """Return source, sha256 and size of the windows that this run made, by purpose.

        What a purpose made after the first has a number: ``generated 2``.
        """
        found: dict[str, dict[str, Any]] = {}
        counts: Counter[str] = Counter()
        for (purpose, *_), windows in self._made.items():
            counts[purpose] += 1
            number = counts[purpose]
            found[purpose if number == 1 else f"{purpose} {number}"] = {
                "source": windows.source,
                "sha256": windows.sha256,
                "windows": list(windows.tokens.shape),
            }
        return found

    def read_texts(self, program: Program) -> None:
        """Read the texts that were given, so that a bad one is found before any work is done.

        Raises:
            DataError: one cannot be read by this model.
        """
        texts = [
            source
            for source in (self.calibration, self.check_text)
            if source is not None and source != SELF and not isinstance(source, TokenWindows)
        ]
        if texts and not reads_tokens(program):
            raise DataError(
                f"{program.origin.model} reads no tokens, so text says nothing about it",
                remedy="leave out the calibration and the check text",
            )
        for source in texts:
            read_text(source)
        if texts and self.check_text != SELF:
            self.check_tokens_of(program)

    def calibration_tokens(self, program: Program) -> TokenWindows:
        """Return the windows to calibrate on.

        Raises:
            DataError: there is no text, none can be made up, or it is too short.
        """
        return self._once("calibration", program, lambda: self._calibration(program))

    def check_tokens_of(self, program: Program) -> TokenWindows | None:
        """Return the windows to measure fidelity on; None where a model reads no tokens."""
        if not reads_tokens(program):
            return None
        return self._once("check", program, lambda: self._check(program))

    def has_text(self, program: Program) -> bool:
        """Tell whether calibration reads a text that was asked for; random tokens are none."""
        own = self.calibration == SELF and program.kind == "encoder"
        return self.calibration is not None and not own and reads_tokens(program)

    def training_text(self, program: Program) -> TokenWindows | None:
        """Return the text to train on: the calibration text, whole, without what checks read.

        Returns:
            int64 [1, tokens], or the windows that were given; None where there is no text.

        Raises:
            DataError: it cannot be read.
        """
        source = self.calibration
        if source is None or source == SELF:
            return None
        return self._once("training", program, lambda: self._training(source, program))

    def generated_text(self, program: Program, samples: int, length: int) -> TokenWindows:
        """Return sequences that the untouched model writes, int64 [samples, length].

        They are kept in ``cache``, or in ``state`` until the run is done.

        Raises:
            DataError: the model writes no text, or is too large for it.
        """
        from .self_text import generate_windows

        def write() -> TokenWindows:
            kept = [folder for folder in (self.cache, self.state) if folder is not None]
            untouched = self.reference(program)
            return generate_windows(
                untouched, samples, length, self.seed, self.progress, self.device, kept
            )

        return self._once("generated", program, write, (samples, length))

    def _once(
        self,
        purpose: str,
        program: Program,
        make: Callable[[], TokenWindows],
        size: tuple[int, ...] = (),
    ) -> TokenWindows:
        """Return the windows for a purpose; made when they are asked for first, in this size."""
        model = program.origin.recapture
        key = purpose, model, size
        if key not in self._made:
            if reads_features(program) and not any(known is model for _, known, _ in self._made):
                self.progress.note(
                    f"the encoder of {program.origin.model} reads no text: beside each text it is "
                    "given seeded random features"
                )
            self._made[key] = make()
        return self._made[key]

    def _training(self, source: TextSource | TokenWindows, program: Program) -> TokenWindows:
        if isinstance(source, TokenWindows):
            return source
        text, _ = read_text(source).split()
        tokens = tokenize(text, tokenizer_of(program), vocabulary(program))
        return TokenWindows(tokens[None], text.source, text.sha256)

    def _length(self, program: Program) -> int:
        return min(self.calibration_length, maximum_length(program) or self.calibration_length)

    def _calibration(self, program: Program) -> TokenWindows:
        if isinstance(self.calibration, TokenWindows):
            return self.calibration
        if not reads_tokens(program):
            raise DataError(
                f"{program.origin.model} reads no tokens, so text cannot calibrate it",
                remedy="use passes that need no calibration",
            )
        if self.calibration is None or self.calibration == SELF:
            samples = self.calibration_samples or USUAL_SAMPLES
            return self._made_up(program, samples, self._length(program))
        windows = calibration_windows(
            self.calibration,
            tokenizer_of(program),
            samples=self.calibration_samples,
            length=self._length(program),
            seed=self.seed,
            vocab_size=vocabulary(program),
        )
        count, length = windows.tokens.shape
        if self.calibration_samples is None and count < USUAL_SAMPLES:
            self.progress.note(
                f"{windows.source}: {count} windows of {length} tokens to calibrate on, for it has "
                f"no more ({USUAL_SAMPLES} are usual)"
            )
        return windows

    def _check(self, program: Program) -> TokenWindows:
        length = min(self._length(program), self.check_tokens)
        if isinstance(self.check_text, TokenWindows):
            return self.check_text
        text = self.check_text
        if text is None and not isinstance(self.calibration, TokenWindows):
            text = self.calibration
        if text is None or text == SELF:
            samples = max(1, self.check_tokens // length)
            return self._made_up(program, samples, length, purpose="checks")
        return check_windows(
            text,
            tokenizer_of(program),
            length=length,
            limit=self.check_tokens,
            whole=self.check_text is not None,
            vocab_size=vocabulary(program),
        )

    def _made_up(
        self, program: Program, samples: int, length: int, purpose: str = "calibration"
    ) -> TokenWindows:
        """Return text of a decoder's own, or random tokens for an encoder.

        Fidelity of an encoder-decoder is measured on random tokens too; calibrating it needs text.
        """
        from .self_text import generate_windows

        # Checks must not see the very sequences that calibrated.
        seed = self.seed + (1 if purpose == "checks" else 0)
        use = "use" if purpose == "checks" else "uses"
        source = self.check_text if purpose == "checks" else None
        asked = (self.calibration if source is None else source) == SELF
        if program.kind == "decoder":
            self.progress.note(
                f"{'' if asked else 'no text given: '}{purpose} {use} {samples} sequences of "
                f"{length} tokens that the model generates itself (pass --calibration FILE for "
                "better ones)"
            )
            kept = [] if self.cache is None else [self.cache]
            # What earlier passes damaged would write damaged text.
            return generate_windows(
                self.reference(program), samples, length, seed, self.progress, self.device, kept
            )
        if program.kind == "encoder" or purpose == "checks":
            why = f"{program.kind}s write no text of their own" if asked else "no text given"
            self.progress.note(f"{why}: {purpose} {use} seeded random tokens")
            return random_tokens(vocabulary(program) or 2, samples, length, seed)
        raise DataError(
            f"{program.origin.model} ({program.kind}) cannot make up text for {purpose}",
            remedy="pass a text: --calibration FILE",
        )


def reads_tokens(program: Program) -> bool:
    """Tell whether a model has token ids among its inputs."""
    names = [name for signature in program.signatures.values() for name in signature.inputs]
    return any(name.endswith("input_ids") for name in names)


def reads_features(program: Program) -> bool:
    """Tell whether a model has an encoder that reads no tokens, beside a decoder that does."""
    if program.kind != "encoder-decoder":
        return False
    return "input_ids" not in program.signatures["encoder"].inputs


def maximum_length(program: Program) -> int | None:
    """Return the longest sequence that the model was made for, in tokens, as its config says."""
    return max_length(program.config)


def vocabulary(program: Program) -> int | None:
    """Return how many tokens the model knows."""
    return vocab_size(program.config)


def tokenizer_of(program: Program) -> Tokenizer | None:
    """Return the tokenizer that lies beside the model, or None when there is none.

    Raises:
        DataError: it cannot be read.
    """
    folder = program.origin.folder
    if folder is None or not has_tokenizer(folder):
        return None
    try:
        return open_tokenizer(folder)
    except (StorageError, OSError) as error:
        raise DataError(
            f"{folder}: its tokenizer cannot be read ({str(error).strip().partition(chr(10))[0]})",
            remedy="fetch the model's tokenizer again, or give token ids as .npy",
        ) from error
