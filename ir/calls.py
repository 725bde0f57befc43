"""Typed views of the calls that passes look for: the only place that indexes ``node.args``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import fx

aten = torch.ops.aten


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument that may be given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def _node(node: fx.Node, index: int, name: str) -> fx.Node:
    found = argument(node, index, name)
    assert isinstance(found, fx.Node), f"%{node.name}: {name} is not a node"
    return found


def _optional(node: fx.Node, index: int, name: str) -> fx.Node | None:
    found = argument(node, index, name)
    return found if isinstance(found, fx.Node) else None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def is_weight(node: object) -> bool:
    """Tell whether a node reads a weight of the program."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


@dataclass(frozen=True, slots=True)
class Linear:
    """``y[..., out] = x[..., in] @ weight[out, in].T + bias[out]``."""

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if node.target is not aten.linear.default:
            return None
        return cls(
            node, _node(node, 0, "input"), _node(node, 1, "weight"), _optional(node, 2, "bias")
        )

    def set_weights(self, weight: fx.Node, bias: fx.Node | None) -> None:
        """Make the call read other weights."""
        self.node.args, self.node.kwargs = (self.input, weight, bias), {}


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm ``(x - mean) / sqrt(var + eps) * gain + bias``, or RMSNorm without mean and bias.

    Over the last ``len(sizes)`` dimensions of ``x``.
    """

    node: fx.Node
    kind: Literal["layer", "rms"]
    input: fx.Node
    sizes: tuple[int, ...]
    gain: fx.Node | None
    bias: fx.Node | None
    eps: float | None

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if node.target is aten.layer_norm.default:
            return cls(
                node,
                "layer",
                _node(node, 0, "input"),
                tuple(argument(node, 1, "normalized_shape")),
                _optional(node, 2, "weight"),
                _optional(node, 3, "bias"),
                argument(node, 4, "eps", 1e-5),
            )
        if node.target is aten.rms_norm.default:
            return cls(
                node,
                "rms",
                _node(node, 0, "input"),
                tuple(argument(node, 1, "normalized_shape")),
                _optional(node, 2, "weight"),
                None,
                argument(node, 3, "eps"),
            )
        return None

    def set_affine(self, gain: fx.Node | None, bias: fx.Node | None = None) -> None:
        """Make the norm read another gain and bias, or none."""
        self.node.kwargs = {}
        if self.kind == "layer":
            self.node.args = (self.input, list(self.sizes), gain, bias, self.eps)
        else:
            self.node.args = (self.input, list(self.sizes), gain, self.eps)


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """Batch norm by fixed statistics: ``(x - mean) / sqrt(variance + eps) * gain + bias``.

    Over the channels, the second dimension of ``x``; the statistics, gain and bias have one number
    per channel.
    """

    node: fx.Node
    input: fx.Node
    gain: fx.Node | None
    bias: fx.Node | None
    mean: fx.Node
    variance: fx.Node
    eps: float

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None for another call, also for one with statistics of the batch."""
        if node.target is aten.batch_norm.default:
            if argument(node, 5, "training") or _optional(node, 3, "running_mean") is None:
                return None
            eps = argument(node, 7, "eps")
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            eps = argument(node, 6, "eps")
        else:
            return None
        return cls(
            node,
            _node(node, 0, "input"),
            _optional(node, 1, "weight"),
            _optional(node, 2, "bias"),
            _node(node, 3, "running_mean"),
            _node(node, 4, "running_var"),
            float(eps),
        )

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes whose value is the normalised tensor; some calls return a tuple with it."""
        if self.node.target is aten.batch_norm.default:
            return (self.node,)
        return tuple(user for user in self.node.users if user.args[1] == 0)


_TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
_CONVOLUTIONS = (
    *_TRANSPOSED,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution ``[batch, in, ...] -> [batch, out, ...]``; one without a batch counts too.

    weight: [out, in / groups, ...], and [in, out / groups, ...] when ``transposed``.  padding is a
    number for each axis or for all, ``same`` or ``valid``.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    padding: tuple[int, ...] | str
    groups: int
    transposed: bool

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if node.target not in _CONVOLUTIONS:
            return None
        general = node.target is aten.convolution.default
        transposed = (
            bool(argument(node, 6, "transposed")) if general else node.target in _TRANSPOSED
        )
        padding = argument(node, 4, "padding", (0,))
        return cls(
            node,
            _node(node, 0, "input"),
            _node(node, 1, "weight"),
            _optional(node, 2, "bias"),
            padding if isinstance(padding, str) else tuple(padding),
            argument(node, 8 if general else 6, "groups", 1),
            transposed,
        )

    @property
    def pads(self) -> bool:
        """Whether zeros are put around the input."""
        if self.padding == "same":
            return any(size > 1 for size in self.weight.meta["val"].shape[2:])
        return self.padding != "valid" and any(self.padding)

    def set_weights(self, weight: fx.Node, bias: fx.Node | None) -> None:
        """Make the call read other weights."""
        kept = {k: v for k, v in self.node.kwargs.items() if k not in ("input", "weight", "bias")}
        self.node.args = (self.input, weight, bias, *self.node.args[3:])
        self.node.kwargs = kept


@dataclass(frozen=True, slots=True)
class Embedding:
    """``y[..., width] = weight[ids[...], :]``."""

    node: fx.Node
    weight: fx.Node
    ids: fx.Node

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if node.target is not aten.embedding.default:
            return None
        return cls(node, _node(node, 0, "weight"), _node(node, 1, "indices"))


@dataclass(frozen=True, slots=True)
class Attention:
    """``softmax(query @ key.T * scale + mask) @ value``; heads are the second dimension."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float | None
    grouped: bool

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if node.target is not aten.scaled_dot_product_attention.default:
            return None
        return cls(
            node,
            _node(node, 0, "query"),
            _node(node, 1, "key"),
            _node(node, 2, "value"),
            _optional(node, 3, "attn_mask"),
            bool(argument(node, 5, "is_causal", False)),
            _number(node.kwargs.get("scale")),
            bool(node.kwargs.get("enable_gqa", False)),
        )


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embedding of ``[batch, heads, tokens, width]``; see ``ops.rotary``."""

    node: fx.Node
    input: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if str(node.target) != "modelathe.rotary.default":
            return None
        return cls(
            node,
            _node(node, 0, "x"),
            _node(node, 1, "cos"),
            _node(node, 2, "sin"),
            bool(argument(node, 3, "interleaved")),
        )

    @property
    def turned(self) -> int:
        """How many channels of each head are turned, the first ones."""
        return 2 * int(self.cos.meta["val"].shape[-1])


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A linear whose weight is stored as codes; see ``ops.quantized_linear``."""

    node: fx.Node
    input: fx.Node
    codes: fx.Node
    scales: fx.Node
    zeros: fx.Node | None
    bias: fx.Node | None
    bits: int
    group_size: int
    in_features: int

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if str(node.target) != "modelathe.quantized_linear.default":
            return None
        return cls(
            node,
            _node(node, 0, "x"),
            _node(node, 1, "codes"),
            _node(node, 2, "scales"),
            _optional(node, 3, "zeros"),
            _optional(node, 4, "bias"),
            argument(node, 5, "bits"),
            argument(node, 6, "group_size"),
            argument(node, 7, "in_features"),
        )


@dataclass(frozen=True, slots=True)
class QuantizedEmbedding:
    """An embedding whose rows are stored as codes; see ``ops.quantized_embedding``."""

    node: fx.Node
    ids: fx.Node
    codes: fx.Node
    scales: fx.Node
    zeros: fx.Node | None
    bits: int
    group_size: int
    in_features: int

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if str(node.target) != "modelathe.quantized_embedding.default":
            return None
        return cls(
            node,
            _node(node, 0, "ids"),
            _node(node, 1, "codes"),
            _node(node, 2, "scales"),
            _optional(node, 3, "zeros"),
            argument(node, 4, "bits"),
            argument(node, 5, "group_size"),
            argument(node, 6, "in_features"),
        )
