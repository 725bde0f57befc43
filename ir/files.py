"""Safetensors files, mapped into memory: tensors that are read when somebody needs them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from .errors import StorageError
from .weights import Weight, is_finite, not_finite

ALIGNMENT = 64  # bytes: a cache line, and what torch gives tensors in memory


class SafetensorsFile:
    """One safetensors file: its header now, its tensors when asked for, memory-mapped.

    Raises:
        StorageError: the file is missing, truncated or is not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self.keys: tuple[str, ...] = tuple(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise StorageError(
                f"{path}: is not a complete safetensors file ({error})",
                remedy="fetch or write the file again: it is truncated or corrupt",
            ) from error
        stat = path.stat()
        identity = f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says about itself."""
        return dict(self._file.metadata() or {})

    def spec(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of ``key`` from the header."""
        view = self._file.get_slice(key)
        name = view.get_dtype()
        if name not in SAFETENSORS_DTYPES:
            raise StorageError(
                f"{self.path}: {key}: dtype {name} is not supported",
                remedy="convert the checkpoint to float32, float16 or bfloat16",
            )
        return tuple(view.get_shape()), SAFETENSORS_DTYPES[name]

    def load(self, key: str) -> Tensor:
        """Return ``key`` as a view of the mapped file, or a copy where that is not aligned.

        Kernels sum in another order for addresses that are not multiples of their vectors, so the
        same weights would give other bits from another file.
        """
        tensor: Tensor = self._file.get_tensor(key)
        return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()

    def weights(self) -> dict[str, Weight]:
        """Return every tensor of the file, unread."""
        return {key: FileWeight(self, key) for key in self.keys}


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class FileWeight(Weight):
    """A tensor of a safetensors file.

    Args:
        file: the file.
        key: the tensor's name there.
        fingerprint: of the value, where it is known.
        finite: whether nan or inf in it is an error; a mask may hold -inf on purpose.
    """

    def __init__(
        self,
        file: SafetensorsFile,
        key: str,
        fingerprint: str | None = None,
        finite: bool = True,
    ) -> None:
        self.file, self.key = file, key
        self.shape, self.dtype = file.spec(key)
        self._fingerprint = fingerprint or f"file:{file.fingerprint}:{key}"
        self._unseen = finite

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor; the first read checks that it is finite.

        Raises:
            StorageError: it holds nan or inf.
        """
        tensor = self.file.load(self.key)
        if self._unseen and not is_finite(tensor):
            raise not_finite(f"{self.file.path}: {self.key}")
        self._unseen = False
        return tensor if dtype is None else tensor.to(dtype)
