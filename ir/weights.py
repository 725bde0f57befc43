"""Named tensors that are read when somebody needs them.

A weight knows its shape, its dtype and its fingerprint without touching a byte of data.  Nothing is
ever written in place: a changed weight is a new weight under a new name.
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    """A tensor in memory."""

    def __init__(self, tensor: Tensor, fingerprint: str | None = None) -> None:
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
        return self.tensor if dtype is None else self.tensor.to(dtype)


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
        if name not in _SAFETENSORS_DTYPES:
            raise StorageError(
                f"{self.path.name}: {key}: dtype {name} is not supported",
                remedy="convert the checkpoint to float32, float16 or bfloat16",
            )
        return tuple(view.get_shape()), _SAFETENSORS_DTYPES[name]

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


_SAFETENSORS_DTYPES = {
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
            raise StorageError(
                f"{self.file.path}: {self.key} holds nan or inf",
                remedy="the checkpoint is damaged, or its training diverged: use another one",
            )
        self._unseen = False
        return tensor if dtype is None else tensor.to(dtype)


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


def _wider(dtype: torch.dtype, least: torch.dtype | None) -> torch.dtype | None:
    """Return ``least`` where a floating-point ``dtype`` is narrower, else None."""
    narrow = dtype.is_floating_point and least is not None and dtype.itemsize < least.itemsize
    return least if narrow else None


class Scratch:
    """Where computed weights stay: in memory up to a limit, beyond it in mapped files.

    Attributes:
        limit: bytes to hold in memory.
        folder: where the files go; a temporary folder, removed at exit, unless set.
    """

    def __init__(self, limit: int = 2 << 30) -> None:
        self.limit, self.folder = limit, None
        self._held = 0
        self._temporary: Any = None
        self._lock = threading.Lock()

    folder: Path | None

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
        from safetensors.torch import save_file

        path = folder / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:32]}.safetensors"
        save_file({"value": value}, path)
        return FileWeight(SafetensorsFile(path), "value", fingerprint, finite=False)

    def _release(self, count: int) -> None:
        self._held -= count

    def _temporary_folder(self) -> Path:
        import tempfile

        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="modelathe-")
        return Path(self._temporary.name)


SCRATCH = Scratch()


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
        parts = name.split(".")
        known = any(".".join(parts[:end]) in self.buffers for end in range(1, len(parts) + 1))
        return self[name].dtype.is_floating_point and not known

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


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither nan nor inf; one pass, no mask of its size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())


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
