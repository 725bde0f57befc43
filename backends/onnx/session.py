"""An ONNX artifact in ONNX Runtime: I/O binding, and a cache that is never copied.

Nothing here needs torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.errors import StorageError
from ..manifest import check_files, contained
from ..session import Array, Session, read_config
from ..signatures import TensorSpec

if TYPE_CHECKING:
    import onnx

_ELEMENT_TYPES = {
    "float32": 1,
    "uint8": 2,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "bfloat16": 16,
}
_BFLOAT16 = "tensor(bfloat16)"
_CPU_INFO = Path("/proc/cpuinfo")  # Linux; nothing is known elsewhere


class OnnxSession(Session):
    """The graphs of an ONNX artifact, each in an ONNX Runtime session on the CPU.

    Args:
        folder: the artifact.
        manifest: its manifest.
        threads: processor threads of one operator; 0 leaves the choice to the runtime.
        told: how the names of outputs begin that are no results, but go to ``codes``; empty: none.
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], *, threads: int = 0, told: str = ""
    ) -> None:
        super().__init__(folder, manifest, read_config(folder))
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if products_overflow(_CPU_INFO):
            options.add_session_config_entry("session.x64quantprecision", "1")
        providers = ["CPUExecutionProvider"]
        self.settings = {
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "providers": providers,
            "threads": threads,
        }
        self._ort = onnxruntime
        self._sessions = {}
        self._told: dict[str, list[str]] = {}
        paths = {name: model_path(folder, name) for name in self.graphs}
        refuse_outside_data(folder)
        check_files(folder, manifest)
        for name, path in paths.items():
            try:
                self._sessions[name] = onnxruntime.InferenceSession(path, options, providers)
            except _errors() as error:
                raise StorageError(
                    f"{path}: ONNX Runtime refuses it ({_first_line(error)})",
                    remedy="make the artifact again; see `modelathe backends onnx` for opset=",
                ) from error
            outputs = [one.name for one in self._sessions[name].get_outputs()]
            self._told[name] = [one for one in outputs if told and one.startswith(told)]
            self._check_names(name, path)

    def _check_names(self, graph: str, path: Path) -> None:
        session, spec = self._sessions[graph], self.graphs[graph]
        names = [one.name for one in (*session.get_inputs(), *session.get_outputs())]
        inside = [name for name in names if name not in self._told[graph]]
        listed = [one.name for one in (*spec.inputs, *spec.outputs)]
        if inside != listed:
            odd = sorted(set(inside) ^ set(listed)) or ["their order"]
            raise StorageError(
                f"{path}: inputs and outputs are not those of the manifest: {', '.join(odd)}",
                remedy="the folder mixes two artifacts; make it again",
            )

    def _execute(
        self, graph: str, feeds: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> dict[str, Any]:
        session = self._sessions[graph]
        binding = session.io_binding()
        narrow = {one.name for one in self.graphs[graph].inputs if one.dtype == "bfloat16"}
        for name, value in feeds.items():
            if name in narrow and value.data_type() != _BFLOAT16:
                bits = _bfloat16_bits(value.numpy())
                value = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
            binding.bind_ortvalue_input(name, value)
        first, *others = self.graphs[graph].outputs
        shape = first.known_sizes(sizes) if first.dtype == "float32" else None
        if shape is None:
            binding.bind_output(first.name, "cpu")
        else:  # our own buffer: `numpy()` of a tensor copies, and logits are the largest one
            buffer = np.empty(shape, dtype=np.float32)
            address = buffer.ctypes.data
            binding.bind_output(first.name, "cpu", 0, np.float32, shape, address)
        for other in others:
            # Without a buffer ONNX Runtime makes one of the right size, which the next step reads.
            binding.bind_output(other.name, "cpu")
        for name in self._told[graph]:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        values = binding.get_outputs()
        names = [first.name, *(one.name for one in others), *self._told[graph]]
        results = dict(zip(names, values, strict=True))
        self.codes = {
            name.rpartition("/")[2]: results.pop(name).numpy() for name in self._told[graph]
        }
        return results if shape is None else {**results, first.name: buffer}

    def _to_runtime(self, array: Array) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))

    def _to_numpy(self, value: Any) -> Array:
        if isinstance(value, np.ndarray):
            return value
        if value.data_type() == _BFLOAT16:
            return _widen(value)
        array: Array = value.numpy()
        return array

    def _zeros(self, spec: TensorSpec, shape: tuple[int, ...]) -> Any:
        kind = _ELEMENT_TYPES[spec.dtype]
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, "cpu", 0)
        if (
            0 not in shape
        ):  # the values of a new tensor are not set; all bits 0 is 0.0 in each dtype
            ctypes.memset(value.data_ptr(), 0, value.tensor_size_in_bytes())
        return value


def products_overflow(cpu_info: Path) -> bool:
    """Tell whether ONNX Runtime's products of uint8 and int8 overflow 16 bits on this processor.

    They do on x86 with AVX2 and without VNNI.  ``session.x64quantprecision`` makes them exact; with
    VNNI it would only make them slower (1.6 times, measured).
    """
    try:
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return "avx2" in flags.split() and "vnni" not in flags


def model_path(folder: Path, graph: str) -> Path:
    """Return the file of a graph."""
    return contained(folder, file_name(graph))


def file_name(graph: str) -> str:
    """Return the name of a graph's file: ``model.onnx`` for main, ``NAME.onnx`` for another."""
    return "model.onnx" if graph == "main" else f"{graph}.onnx"


def refuse_outside_data(folder: Path) -> None:
    """Check every ONNX file in and below a folder, whether a manifest lists it or not.

    Raises:
        StorageError: one names data outside of the folder, or data that is not there.
    """
    for path in sorted(folder.rglob("*.onnx")):
        check_external_data(path)


def check_external_data(path: Path) -> None:
    """Check that every tensor stored outside an ONNX file lies whole in the file's own folder.

    ONNX Runtime must not see a file that fails: it would open whatever the file names.

    Raises:
        StorageError: a location is absolute, climbs out, is a link that leads out, or is too short.
    """
    model = load_without_data(path)
    for tensor in tensors(model):
        if tensor.data_location != tensor.EXTERNAL and not tensor.external_data:
            continue
        places = [entry.value for entry in tensor.external_data if entry.key == "location"]
        if not places:
            raise StorageError(f"{path}: @{tensor.name}: external data without a location")
        for place in places:
            _check_place(path, tensor, place)


def load_without_data(path: Path) -> onnx.ModelProto:
    """Return the model with external data left where it is.

    Raises:
        StorageError: the file is missing, truncated or no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise StorageError(
            f"{path}: is not a complete ONNX file ({error})", remedy="make the artifact again"
        ) from error


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model: initialisers, attributes, those of functions and branches."""
    yield from _graph_tensors(model.graph)
    for training in model.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)
    for function in model.functions:
        for node in function.node:
            yield from _attribute_tensors(node.attribute)
        yield from _attribute_tensors(function.attribute_proto)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _attribute_tensors(node.attribute)


def _attribute_tensors(attributes: Any) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)  # an unset message reads as an empty one
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        graphs = [attribute.g] if attribute.HasField("g") else []
        for graph in (*graphs, *attribute.graphs):
            yield from _graph_tensors(graph)


def _check_place(path: Path, tensor: onnx.TensorProto, place: str) -> None:
    data = contained(path.parent, place)
    if not data.is_file():
        raise StorageError(
            f"{path}: @{tensor.name}: its data file {place} is missing",
            remedy="copy the whole folder, or make the artifact again",
        )
    where = {entry.key: entry.value for entry in tensor.external_data}
    end = int(where.get("offset") or 0) + int(where.get("length") or 0)
    if end > data.stat().st_size:
        raise StorageError(
            f"{data}: ends before the data of @{tensor.name} does",
            remedy="the file is truncated; make the artifact again",
        )


def _widen(value: Any) -> Array:
    """Return bfloat16 values as float32: numpy has no such type, their bits are the upper half."""
    shape = tuple(value.shape())
    count = int(np.prod(shape))
    halves = np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(value.data_ptr()))
    wide = (halves.astype(np.uint32) << 16).view(np.float32)
    return wide.reshape(shape)


def _bfloat16_bits(array: Array) -> Array:
    """Return float32 values rounded to the nearest bfloat16, as ``uint16`` bits."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _errors() -> tuple[type[Exception], ...]:
    """Return what ONNX Runtime raises for a model that it cannot take."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    words = "Fail InvalidArgument InvalidGraph InvalidProtobuf NoSuchFile NotImplemented"
    names = f"{words} RuntimeException ModelLoaded NoModel EPFail".split()
    return tuple(getattr(state, name) for name in names if hasattr(state, name))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
