"""Modules around transformers models, so that caches are plain inputs and outputs.

A ``Wrapped`` is what capture traces: a module, its example inputs by name with symbolic sizes, and
the names of its outputs.  Nothing here knows an architecture; what a model's ``forward`` accepts
and what it returns are asked of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .dims import Dims, evaluate
from .errors import CaptureError
from .program import Kind

# Example sizes: all different and at least 2, so that tracing does not mistake one for another.
_EXAMPLE = {"batch": 2, "sequence": 3, "past": 5, "source": 6, "target": 4}


EXAMPLE_LENGTH = 3


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A module to trace.

    Attributes:
        module: takes the tensors of ``inputs`` as one list, returns a flat tuple of tensors.
        inputs: name to sizes, in order; a symbolic size is a name or a sum of names.
        dtypes: of the inputs that are not ``int64``.
        outputs: names, in order.
        length: example length of a sequence; more than one chunk where a model works in chunks,
            or their number would look like a constant.
    """

    module: nn.Module
    inputs: dict[str, Dims]
    dtypes: dict[str, torch.dtype]
    outputs: tuple[str, ...]
    length: int = EXAMPLE_LENGTH

    def example(self) -> list[Tensor]:
        """Return zeros of the example sizes (ones for masks)."""
        sizes = {**_EXAMPLE, "sequence": self.length}
        return [_example(name, dims, self.dtypes, sizes) for name, dims in self.inputs.items()]


def _example(
    name: str,
    dims: Dims,
    dtypes: dict[str, torch.dtype],
    sizes: dict[str, int] = _EXAMPLE,
) -> Tensor:
    shape = tuple(evaluate(dim, sizes.__getitem__) for dim in dims)
    make = torch.ones if name.endswith("mask") else torch.zeros
    return make(shape, dtype=dtypes.get(name, torch.int64))


def model_kind(model: Any) -> Kind:
    """Tell what a transformers model is.

    Raises:
        CaptureError: its inputs are neither tokens nor pixels.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return "encoder-decoder"
    if model.main_input_name == "pixel_values":
        return "vision"
    if model.main_input_name != "input_ids":
        raise CaptureError(
            f"{type(model).__name__} reads {model.main_input_name}, not tokens or pixels",
            remedy="write a factory that returns the module and its example inputs, and "
            "pass package.module:factory as the model",
        )
    return (
        "decoder" if model.get_output_embeddings() is not None and _is_causal(model) else "encoder"
    )


def _is_causal(model: Any) -> bool:
    return bool(model.can_generate()) or type(model).__name__.endswith(
        ("ForCausalLM", "LMHeadModel")
    )


def wrap(model: Any) -> dict[str, Wrapped]:
    """Return the graphs to trace of a transformers model, by name."""
    kind = model_kind(model)
    if kind == "decoder":
        return {"main": _decoder(model)}
    if kind == "encoder-decoder":
        return _encoder_decoder(model)
    return {"main": _plain(model, kind)}


def _accepts(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def cache_argument(function: Callable[..., Any]) -> str:
    """Return by which name a model takes its cache, or nothing: transformers 5.24 renamed it."""
    return next((name for name in _CACHE_ARGUMENTS if _accepts(function, name)), "")


_CACHE_ARGUMENTS = ("cache", "past_key_values")


def _cache_names(count: int, prefix: str) -> list[str]:
    return [f"{prefix}.{i}.{part}" for i in range(count) for part in ("key", "value")]


def _layers_of(cache: Any) -> list[Any] | None:
    """Return the layers of a key/value cache; None for caches that hold something else."""
    layers = getattr(cache, "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        return None
    return list(layers)


def _cache_dims(layers: list[Any], prefix: str, length: str) -> dict[str, Dims]:
    names = iter(_cache_names(len(layers), prefix))
    dims: dict[str, Dims] = {}
    for layer in layers:
        for tensor in (layer.keys, layer.values):
            dims[next(names)] = ("batch", int(tensor.shape[1]), length, int(tensor.shape[3]))
    return dims


class _Decoder(nn.Module):
    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache

        count = len(self.names)
        past = inputs[count:]
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(
            **dict(zip(self.names, inputs[:count], strict=True)),
            **{cache_argument(self.model.forward): cache},
            use_cache=True,
            return_dict=True,
        )
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return (out.logits, *tensors)


class _WithoutCache(nn.Module):
    """Calls a model and returns the named tensors of its result."""

    def __init__(
        self, model: Any, names: list[str], outputs: tuple[str, ...], **extra: Any
    ) -> None:
        super().__init__()
        self.model, self.names, self.outputs, self.extra = model, names, outputs, extra

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        out = self.model(
            **dict(zip(self.names, inputs, strict=True)), **self.extra, return_dict=True
        )
        return tuple(out[name] for name in self.outputs)


def _decoder(model: Any) -> Wrapped:
    dims: dict[str, Dims] = {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "past + sequence"),
    }
    if _accepts(model.forward, "position_ids"):
        dims["position_ids"] = ("batch", "sequence")
    layers = None
    if name := cache_argument(model.forward):
        from transformers.cache_utils import DynamicCache

        probe = DynamicCache(config=model.config)  # mamba keeps states in it, not keys and values
        ids = torch.zeros((1, 2), dtype=torch.int64)
        model(input_ids=ids, **{name: probe}, use_cache=True, return_dict=True)
        layers = _layers_of(probe)
    if layers is None:
        dims["attention_mask"] = ("batch", "sequence")
        extra = {"use_cache": False} if _accepts(model.forward, "use_cache") else {}
        module = _WithoutCache(model, list(dims), ("logits",), **extra)
        chunk = getattr(model.config, "chunk_size", None)
        length = 2 * chunk + 3 if isinstance(chunk, int) else EXAMPLE_LENGTH
        return Wrapped(module, dims, {}, ("logits",), length)
    names = list(dims)
    cache = _cache_dims(layers, "past_key_values", "past")
    dtype = layers[0].keys.dtype
    outputs = ("logits", *_cache_names(len(layers), "present"))
    return Wrapped(_Decoder(model, names), dims | cache, dict.fromkeys(cache, dtype), outputs)


def _plain(model: Any, kind: Kind) -> Wrapped:
    dims: dict[str, Dims] = {}
    dtypes: dict[str, torch.dtype] = {}
    if kind == "vision":
        dims["pixel_values"] = ("batch", *_image_size(model.config))
        dtypes["pixel_values"] = model.dtype
    else:
        dims["input_ids"] = ("batch", "sequence")
        if _accepts(model.forward, "attention_mask"):
            dims["attention_mask"] = ("batch", "sequence")
        segments = getattr(model.config, "type_vocab_size", 0) or 0
        if segments > 1 and _accepts(model.forward, "token_type_ids"):
            dims["token_type_ids"] = ("batch", "sequence")
    extra = {"use_cache": False} if _accepts(model.forward, "use_cache") else {}
    probe = [_example(name, d, dtypes) for name, d in dims.items()]
    out = model(**dict(zip(dims, probe, strict=True)), **extra, return_dict=True)
    outputs = tuple(name for name, value in out.items() if isinstance(value, Tensor))
    return Wrapped(_WithoutCache(model, list(dims), outputs, **extra), dims, dtypes, outputs)


def _image_size(config: Any) -> tuple[int, int, int]:
    """Return channels, height, width; 224 x 224 where the configuration leaves the size open."""
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


class _Encoder(nn.Module):
    """The encoder, and the keys and values that the decoder's cross attention makes of its result.

    The decoder is run on one token to make them; dead-code removal drops everything else.
    """

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        hidden, cache = encode(self.model, dict(zip(self.names, inputs, strict=True)))
        layers = cache.cross_attention_cache.layers
        return (hidden, *(t for layer in layers for t in (layer.keys, layer.values)))


def encode(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Return the encoder's hidden state and a cache filled by one decoder step."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    hidden = model.get_encoder()(**inputs, return_dict=True).last_hidden_state
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    decoder = model.get_decoder()
    first = torch.zeros((hidden.shape[0], 1), dtype=torch.int64)
    extra = {}
    if "attention_mask" in inputs and _accepts(decoder.forward, "encoder_attention_mask"):
        extra["encoder_attention_mask"] = inputs["attention_mask"]
    decoder(
        input_ids=first,
        encoder_hidden_states=hidden,
        **{cache_argument(decoder.forward): cache},
        use_cache=True,
        **extra,
    )
    return hidden, cache


class _CachedDecoder(nn.Module):
    """The decoder with its own cache and the cross-attention keys and values as inputs."""

    def __init__(self, model: Any, masked: bool, blocks: int, width: int) -> None:
        super().__init__()
        self.model, self.masked, self.blocks, self.width = model, masked, blocks, width

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        count = 3 if self.masked else 2
        ids, mask = inputs[0], inputs[1]
        past = inputs[count : count + 2 * self.blocks]
        cross = inputs[count + 2 * self.blocks :]
        cache = EncoderDecoderCache(
            DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            DynamicCache(list(zip(cross[::2], cross[1::2], strict=True))),
        )
        # A cross cache that is not empty is not computed again, so the hidden state is not read.
        hidden = cross[0].new_zeros(ids.shape[0], cross[0].shape[2], self.width)
        out = self.model(
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            **({"attention_mask": inputs[2]} if self.masked else {}),
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            **{cache_argument(self.model.forward): cache},
            use_cache=True,
            return_dict=True,
        )
        layers = cache.self_attention_cache.layers
        return (out.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


def _encoder_decoder(model: Any) -> dict[str, Wrapped]:
    source, dtypes = _encoder_inputs(model)
    probe = {name: _example(name, dims, dtypes) for name, dims in source.items()}
    hidden, cache = encode(model, probe)
    layers = cache.cross_attention_cache.layers
    blocks = len(layers)
    fixed = "source" not in source[next(iter(source))]
    length: int | str = int(hidden.shape[1]) if fixed else "source"
    cross: dict[str, Dims] = {
        name: (dims[0], dims[1], length, dims[3])
        for name, dims in _cache_dims(layers, "cross_key_values", "source").items()
    }
    past = _cache_dims(cache.self_attention_cache.layers, "past_key_values", "past")
    dtype = layers[0].keys.dtype
    masked = "attention_mask" in source
    target: dict[str, Dims] = {
        "decoder_input_ids": ("batch", "sequence"),
        "decoder_attention_mask": ("batch", "past + sequence"),
    }
    if masked:
        target["attention_mask"] = ("batch", "source")
    encoder_outputs = ("last_hidden_state", *_cache_names(blocks, "cross_key_values"))
    decoder = _CachedDecoder(model, masked, blocks, int(hidden.shape[2]))
    return {
        "encoder": Wrapped(_Encoder(model, list(source)), source, dtypes, encoder_outputs),
        "decoder": Wrapped(
            decoder,
            target | past | cross,
            dict.fromkeys([*past, *cross], dtype),
            ("logits", *_cache_names(blocks, "present")),
        ),
    }


def _encoder_inputs(model: Any) -> tuple[dict[str, Dims], dict[str, torch.dtype]]:
    """Return the encoder's inputs: tokens with a mask, or features of a fixed length."""
    if model.main_input_name == "input_ids":
        return {"input_ids": ("batch", "source"), "attention_mask": ("batch", "source")}, {}
    config = model.config
    if model.main_input_name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * int(config.max_source_positions)  # two frames per encoder position
        dims: dict[str, Dims] = {"input_features": ("batch", int(config.num_mel_bins), frames)}
        return dims, {"input_features": model.dtype}
    raise CaptureError(
        f"{type(model).__name__} reads {model.main_input_name}, which capture cannot make up",
        remedy="pass package.module:factory as the model, with example inputs of your own",
    )
