"""Named tensors that are read when somebody needs them.

A weight knows its shape, its dtype and its fingerprint without touching a byte of data.  Nothing is
ever written in place: a changed weight is a new weight under a new name.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StorageError

# By the names that configurations and options have for them: what models are stored and run in.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Weight(ABC):
    """One tensor of a program.

    Attributes:
        shape: sizes, outermost first.
        dtype: the dtype that the program's graph sees.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A text that differs when the value may differ; reads no bytes of a file."""

    @abstractmethod
    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor, never to be written to.

        With ``dtype`` (meant for floating-point weights) the value comes in that dtype instead; a
        computed weight then rounds once, from its wide result.
        """

    @property
    def bytes(self) -> int:
        """Size in bytes, as stored."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def written(self) -> bool:
        """Whether somebody wrote into the tensor, as far as that can be seen."""
        return False


class TensorWeight(Weight):
    """A tensor in memory.

    Args:
        tensor: the value.
        fingerprint: of the value, where it is known.
        finite: what to call it in an error where nan or inf in it are one; a mask may hold -inf on
            purpose.
    """

    def __init__(self, tensor: Tensor, fingerprint: str | None = None, finite: str = "") -> None:
        self._unseen = finite
        self.tensor = tensor.detach()
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self._fingerprint = fingerprint
        self._version = _version(self.tensor)

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = f"tensor:{content_hash(self.tensor)}"
        return self._fingerprint

    @property
    def written(self) -> bool:
        return _version(self.tensor) != self._version

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor; the first read checks that it is finite where it must be.

        Raises:
            StorageError: it holds nan or inf.
        """
        if self._unseen and not is_finite(self.tensor):
            raise not_finite(self._unseen)
        self._unseen = ""
        return self.tensor if dtype is None else self.tensor.to(dtype)


class Weights(Mapping[str, Weight]):
    """Name to weight.

    Attributes:
        aliases: further names of a weight that is stored under another one (a tied head).
        buffers: names of what the model holds and training does not change, such as the
            frequencies of rotary positions; a name derived from one (``name.verb``) is one too.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight] | None = None,
        aliases: Mapping[str, str] | None = None,
        buffers: Iterable[str] = (),
    ) -> None:
        self._weights = dict(weights or {})
        self.aliases = dict(aliases or {})
        self.buffers = frozenset(buffers)

    def __getitem__(self, name: str) -> Weight:
        return self._weights[self.aliases.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def copy(self) -> Weights:
        """Return a table of its own with the same weights."""
        return Weights(self._weights, self.aliases, self.buffers)

    def is_parameter(self, name: str) -> bool:
        """Tell whether a weight is a floating-point number table that training may change."""
        return self[name].dtype.is_floating_point and not self._is_buffer(name)

    def _is_buffer(self, name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:end]) in self.buffers for end in range(1, len(parts) + 1))

    def as_held(self, name: str, value: Tensor) -> Tensor:
        """Return a weight's value as a module holds it: parameters have gradients.

        torch multiplies strided values by a matrix with a gradient at once, and by another one row
        by row, which sums in another order: without, a program would not give its model's bits.
        """
        if not self.is_parameter(name) or value.is_inference():
            return value
        return nn.Parameter(value)

    def add(self, name: str, weight: Weight) -> str:
        """Add ``weight`` under ``name``, or ``name_1`` ... when that is taken; return the name."""
        free, number = name, 0
        while free in self._weights or free in self.aliases:
            number += 1
            free = f"{name}_{number}"
        self._weights[free] = weight
        return free

    def put(self, name: str, weight: Weight) -> None:
        """Let a name stand for another weight: only in a table that is thrown away afterwards."""
        self._weights[self.aliases.get(name, name)] = weight

    def keep_only(self, names: set[str]) -> None:
        """Drop every weight that is not in ``names``, and the aliases of those."""
        self._weights = {name: w for name, w in self._weights.items() if name in names}
        self.aliases = {a: name for a, name in self.aliases.items() if name in names}
        # By their own names: what a kept one is derived from may be gone, and its name free again.
        left = (*self._weights, *self.aliases)
        self.buffers = frozenset(name for name in left if self._is_buffer(name))


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither nan nor inf; one pass, no mask of its size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())


def not_finite(name: str) -> StorageError:
    """Return the error of a weight that holds nan or inf; ``name`` says of which model or file."""
    return StorageError(
        f"{name} holds nan or inf",
        remedy="the checkpoint is damaged, or its training diverged: use another one",
    )


def _version(tensor: Tensor) -> int:
    """Return torch's count of writes into a tensor and its views."""
    return 0 if tensor.is_inference() else tensor._version


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in memory, without a copy when it is contiguous."""
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def content_hash(tensor: Tensor) -> str:
    """Return a hash of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(bytes_of(flat))
    return digest.hexdigest()[:32]


def last_made(name: str, verb: str, *kept_by: str) -> bool:
    """Tell from a weight's name whether ``verb`` was the last thing that made its values.

    Passes append what they did, as in ``up.weight.folded``, and ``_1`` where that is taken.

    Args:
        name: of the weight.
        verb: what was done.
        kept_by: verbs that may stand behind it, because they keep what it did.
    """
    behind = "|".join(map(re.escape, kept_by)) or verb
    return re.fullmatch(rf".*\.{verb}(_\d+)?(\.({behind})(_\d+)?)*", name) is not None
