"""A Hugging Face model folder: its module with fake parameters, its weights unread."""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .computed import ComputedWeight
from .errors import CaptureError, StorageError
from .files import SafetensorsFile
from .weights import DTYPES, TensorWeight, Weight, is_finite, not_finite


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a model folder.

    Raises:
        CaptureError: there is none, it or ``generation_config.json`` is not JSON, or it describes
            what is not read: code from the folder, or weights that are quantised already.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CaptureError(
            f"{folder}: has no config.json",
            remedy="pass a Hugging Face model folder: config.json, *.safetensors, tokenizer files",
        )
    config = _json_object(path)
    if (settings := folder / "generation_config.json").is_file():
        _json_object(settings)  # it goes into artifacts: found out now, not behind every pass
    if "auto_map" in config:
        raise CaptureError(
            f"{path}: asks for Python code from the model folder (auto_map), which is never run",
            remedy="build the model in your own module and pass package.module:factory",
        )
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise CaptureError(
            f"{path}: its weights are quantised already ({method or 'quantization_config'})",
            remedy="start from the float checkpoint that it was made from",
        )
    return config


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CaptureError(f"{path}: is not JSON ({error})", remedy="fetch it again") from error
    if not isinstance(found, dict):
        raise CaptureError(f"{path}: holds no JSON object", remedy="fetch it again")
    return found


def fetch(text: str, revision: str | None, allow_pickle: bool) -> Path:
    """Return the folder of a model of the hub, fetched or from the local cache.

    Raises:
        CaptureError: there is no such model, or no way to it.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
        raise CaptureError(f"{text}: no such folder", remedy="check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "*.safetensors", "*.jinja"]
    patterns += ["*.model", "*.spm", "*.txt", "*.codes", "*.tokenizer"]  # of tokenizers
    patterns += ["*.bin"] if allow_pickle else []
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CaptureError(
            f"{text}: is no folder here, and no model that could be fetched from the hub",
            remedy="check the path; a hub id needs a network, or a copy in the local cache",
        ) from error


def build(folder: Path, config: dict[str, Any]) -> Any:
    """Return the transformers model of a folder, in evaluation mode, under the current mode.

    The class is the one that the configuration names, else the model type's plain one.
    """
    import transformers

    names = config.get("architectures") or [""]
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CaptureError(
            f"{folder / 'config.json'}: architectures is {names!r}, not a list of class names",
            remedy='write it as in "architectures": ["LlamaForCausalLM"]',
        )
    try:
        parsed = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # validation of a configuration raises nearly anything
        raise CaptureError(
            f"{folder / 'config.json'}: transformers cannot read it ({_first_line(error)})",
            remedy=f"check model_type; installed transformers is {transformers.__version__}",
        ) from error
    name = names[0]
    kind = getattr(transformers, name, None) if name else None
    if name and not hasattr(kind, "_from_config"):
        raise CaptureError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} has no {name}",
            remedy="install the transformers version that the model was made with",
        )
    dtype = _dtype(folder, config)
    options = {"dtype": dtype} if dtype is not None else {}
    try:
        if kind is None:
            return transformers.AutoModel.from_config(parsed, **options).eval()
        return kind._from_config(parsed, **options).eval()
    except Exception as error:  # a model's constructor raises nearly anything
        raise CaptureError(
            f"{folder / 'config.json'}: no model can be made of it ({_first_line(error)})",
            remedy="the configuration is not that of a model; fetch it again",
        ) from error


def _dtype(folder: Path, config: dict[str, Any]) -> torch.dtype | None:
    name = config.get("dtype") or config.get("torch_dtype")
    if name is not None and name not in DTYPES:
        raise CaptureError(
            f"{folder / 'config.json'}: dtype {name} is not supported",
            remedy="convert the checkpoint to float32, float16 or bfloat16",
        )
    return DTYPES.get(name) if name else None


def _first_line(error: BaseException) -> str:
    """Return the first line of what an error says; of a heading, the line below it too."""
    first, *others = [line.strip() for line in str(error).strip().splitlines()] or [""]
    return " ".join([first, *others[:1]]) if first.endswith(":") else first


@contextlib.contextmanager
def fake_parameters(mode: Any) -> Iterator[None]:
    """Make every parameter that modules register meanwhile a tensor without data.

    Buffers stay real: rotary frequencies and the like are computed at construction and are in no
    file.
    """
    from transformers import initialization

    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not isinstance(param, torch._subclasses.FakeTensor):
            with mode:
                fake = torch.empty(param.shape, dtype=param.dtype)
                param = nn.Parameter(fake, requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with initialization.no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def fake_model(folder: Path, config: dict[str, Any]) -> tuple[Any, FakeTensorMode]:
    """Return the transformers model of a folder without parameters' data, and its fake mode."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with fake_parameters(mode):
        model = build(folder, config)
        model.tie_weights()
    if (
        hasattr(model, "set_experts_implementation")
        and getattr(model, "_can_set_experts_implementation", lambda: False)()
    ):
        model.set_experts_implementation("batched_mm")
    return model, mode


def unset_weights(model: nn.Module) -> dict[str, Weight]:
    """Return a weight without a value for every parameter and persistent buffer."""

    def unset(name: str) -> Weight:
        def refuse() -> Tensor:
            raise StorageError(f"@{name}: has no value")

        tensor = state[name]
        return ComputedWeight(f"unset {name}", (), tuple(tensor.shape), tensor.dtype, refuse)

    state = model.state_dict(keep_vars=True)
    return {name: unset(name) for name in state}


def stored_tensors(folder: Path, allow_pickle: bool = False) -> dict[str, Weight]:
    """Return the tensors of a folder's weight files by the names they have there.

    Raises:
        CaptureError: there are none, or only pickled ones and ``allow_pickle`` is false.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        paths = [_inside(folder, name) for name in _shards(index)]
    elif single.is_file():
        paths = [single]
    else:
        return _pickled(folder, allow_pickle)
    stored: dict[str, Weight] = {}
    for path in paths:
        stored |= SafetensorsFile(path).weights()
    return stored


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index lists."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CaptureError(
            f"{index}: is no index of weight files ({_first_line(error)})", remedy="fetch it again"
        ) from error


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CaptureError(
            f"{folder}: the index names {name}, outside the folder", remedy="do not use this model"
        )
    return path


def _pickled(folder: Path, allow_pickle: bool) -> dict[str, Weight]:
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise CaptureError(
            f"{folder}: has no model.safetensors", remedy="the folder must hold the weights too"
        )
    if not allow_pickle:
        raise CaptureError(
            f"{folder}: its weights are pickled ({files[0].name}), and a pickle can run code",
            remedy="convert them to safetensors, or trust them with --allow-pickle",
        )
    stored: dict[str, Weight] = {}
    for path in files:
        try:
            zipped = zipfile.is_zipfile(path)  # torch before 1.6 wrote no zip, which maps not
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # whatever the pickle machine meets
            raise CaptureError(
                f"{path}: is not a checkpoint of plain tensors ({_first_line(error)})",
                remedy="convert it to safetensors where it was made",
            ) from error
        stored |= _plain_tensors(path, tensors)
    return stored


def _plain_tensors(path: Path, tensors: Any) -> dict[str, Weight]:
    """Return the tensors of a checkpoint that was unpickled; their bytes are in memory."""
    if not isinstance(tensors, dict):
        raise CaptureError(
            f"{path}: holds a {type(tensors).__name__}, not tensors by name",
            remedy="convert it to safetensors where it was made",
        )
    found = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    for name, tensor in found.items():
        if not is_finite(tensor):
            raise not_finite(f"{path}: {name}")
    return {name: TensorWeight(tensor) for name, tensor in found.items()}
