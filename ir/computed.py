"""Weights that are made from others when they are first loaded, and where they stay."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import StorageError
from .files import FileWeight, SafetensorsFile
from .weights import TensorWeight, Weight, is_finite


class ComputedWeight(Weight):
    """A weight made from other weights by a rule, when it is first loaded.

    Args:
        rule: name of the rule and its parameters; with the inputs' fingerprints it *is* the value.
        inputs: the weights that ``function`` takes, in order.
        shape: sizes of the result.
        dtype: dtype that the graph sees.
        function: from the inputs' tensors to the result, in a dtype as wide as it likes; it is
            rounded once, to ``dtype`` or to what ``load`` asks for.
        keep: hold on to the result after the first load (the scratch store decides where).
        rounded: the stored value is the value, also for a load in a wider dtype (a scale that
            codes were made with).
    """

    def __init__(
        self,
        rule: str,
        inputs: Sequence[Weight],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        function: Callable[..., Tensor],
        keep: bool = True,
        rounded: bool = False,
    ) -> None:
        self.rounded = rounded
        self.rule, self.inputs, self.function, self.keep = rule, tuple(inputs), function, keep
        self.shape, self.dtype = shape, dtype
        text = "\n".join([rule, str(shape), str(dtype), *(w.fingerprint for w in inputs)])
        self._fingerprint = f"computed:{hashlib.sha256(text.encode()).hexdigest()[:32]}"
        self._kept: Weight | None = None
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def written(self) -> bool:
        return self._kept is not None and self._kept.written

    def _evaluate(self, dtype: torch.dtype | None = None) -> Tensor:
        # At least as wide as the result: what is computed from a float16 source and stored in
        # float32 rounds once, to float32.
        least = dtype or (self.dtype if self.dtype.is_floating_point else None)
        loaded = (self._input(w, _wider(w.dtype, least)) for w in self.inputs)
        result = self.function(*loaded).detach()
        if tuple(result.shape) != self.shape:
            raise StorageError(f"rule {self.rule} gave {tuple(result.shape)}, not {self.shape}")
        return result

    def _rounded(self) -> Tensor:
        """Return the value in the dtype that the graph sees.

        Raises:
            StorageError: it is too large for that dtype.
        """
        wide = self._evaluate()
        # contiguous, as it is when it comes from a file: kernels sum by the layout
        value = wide.to(self.dtype).contiguous()
        if not is_finite(value) and is_finite(wide):
            raise StorageError(
                f"rule {self.rule}: the result does not fit into {self.dtype}",
                remedy="use a dtype with a larger range: bfloat16 or float32",
            )
        return value

    def _input(self, weight: Weight, dtype: torch.dtype | None) -> Tensor:
        """Load an input; when this result is kept, what it was made from need not be."""
        if self.keep and isinstance(weight, ComputedWeight) and weight._kept is None:
            return weight._fresh(dtype)
        return weight.load(dtype)

    def _is_wider(self, dtype: torch.dtype | None) -> bool:
        return dtype is not None and self.dtype.itemsize < dtype.itemsize and not self.rounded

    def _fresh(self, dtype: torch.dtype | None) -> Tensor:
        """Return the value in ``dtype``, evaluated now and not kept."""
        if self._is_wider(dtype):
            return self._evaluate(dtype).to(dtype)  # all the way from wide inputs
        value = self._rounded()
        return value if dtype is None else value.to(dtype)

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        if self._is_wider(dtype):
            return self._fresh(dtype)
        with self._lock:
            if self._kept is None:
                value = self._rounded()
                if not self.keep:
                    return value if dtype is None else value.to(dtype)
                self._kept = SCRATCH.keep(self._fingerprint, value)
            return self._kept.load(dtype)


def cast(weight: Weight, dtype: torch.dtype) -> Weight:
    """Return ``weight`` in ``dtype``, converted when it is loaded; itself where it has that."""
    if weight.dtype == dtype:
        return weight
    return ComputedWeight(f"cast {dtype}", (weight,), weight.shape, dtype, lambda t: t)


def _wider(dtype: torch.dtype, least: torch.dtype | None) -> torch.dtype | None:
    """Return ``least`` where a floating-point ``dtype`` is narrower, else None."""
    narrow = dtype.is_floating_point and least is not None and dtype.itemsize < least.itemsize
    return least if narrow else None


class Scratch:
    """Where computed weights stay: in memory up to a limit, beyond it in mapped, nameless files.

    Attributes:
        limit: bytes to hold in memory.
        folder: where the files go; a temporary folder, removed at exit, unless ``within`` another.
    """

    def __init__(self, limit: int = 2 << 30) -> None:
        self.limit, self.folder = limit, None
        self._held = 0
        self._temporary: Any = None
        self._lock = threading.Lock()

    folder: Path | None

    @contextlib.contextmanager
    def within(self, folder: Path) -> Iterator[None]:
        """Put the files into ``folder`` until the block ends; it is made, and taken away."""
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run was writing
        folder.mkdir()
        self.folder = folder
        try:
            yield
        finally:
            self.folder = None
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, fingerprint: str, value: Tensor) -> Weight:
        """Return a weight that holds ``value``."""
        with self._lock:
            if self._held + value.nbytes <= self.limit:
                self._held += value.nbytes
                weight = TensorWeight(value, fingerprint)
                import weakref

                weakref.finalize(weight, self._release, value.nbytes)
                return weight
            folder = self.folder or self._temporary_folder()
        path = folder / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:32]}.safetensors"
        _write(path, value)
        mapped = FileWeight(SafetensorsFile(path), "value", fingerprint, finite=False)
        with contextlib.suppress(OSError):  # Windows deletes no mapped file, but the folder at exit
            path.unlink()  # it stays while it is mapped, and a killed process leaves nothing
        return mapped

    def _release(self, count: int) -> None:
        self._held -= count

    def _temporary_folder(self) -> Path:
        import tempfile

        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="modelathe-")
        return Path(self._temporary.name)


def _write(path: Path, value: Tensor) -> None:
    """Write one tensor; an error of the disk is an ``OSError`` that names the folder."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({"value": value}, path)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path.parent)) from error


SCRATCH = Scratch()
