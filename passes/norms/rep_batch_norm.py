"""RepBN, a batch norm plus a multiple of its input: how it looks in a graph, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor, fx

from ...ir import (
    BatchNorm,
    Norm,
    PassError,
    Program,
    block_of,
    insert_call,
    is_finite,
    is_weight,
    path_of,
)
from ..analysis.channel_moments import ChannelMoments
from ..canonical.match import ADD, MUL, aten, operands, same_type
from .channels import permutation, unpermuted
from .gains import hand_on

EPS = 1e-5  # of the batch norms that are made


@dataclass(frozen=True, slots=True)
class RepBatchNorm:
    """``RepBN(x) = BN(x) + alpha x``, permutations of axes left out.

    Attributes:
        node: the sum.
        input: x, with its axes in the order of the sum's.
        axis: where the channels are in both.
        norm: the batch norm.
        alpha: a weight of one element, or a number.
        inner: the calls that compute the sum from x and that nothing else reads.
    """

    node: fx.Node
    input: fx.Node
    axis: int
    norm: BatchNorm
    alpha: fx.Node | float
    inner: frozenset[fx.Node]

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is no such sum."""
        for left, right in operands(node, ADD):
            if not isinstance(right, fx.Node) or not same_type(left, right):
                continue
            value, order = unpermuted(left)
            norm = _norm_of(value)
            if norm is None:
                continue
            root, before = unpermuted(norm.input)
            axes = tuple(before[axis] for axis in order)
            for input_, alpha in _multiples(right):
                if unpermuted(input_) == (root, axes) and same_type(input_, node):
                    inner = _inner(node, input_, root)
                    return cls(node, input_, order.index(1), norm, alpha, inner)
        return None


def _norm_of(value: fx.Node) -> BatchNorm | None:
    """Return the batch norm that a value is the result of."""
    for node in (value, *value.all_input_nodes[:1]):
        norm = BatchNorm.match(node)
        if norm is not None and value in norm.outputs:
            return norm
    return None


def _multiples(value: fx.Node) -> list[tuple[fx.Node, fx.Node | float]]:
    """Return what a value may be a multiple of, and the factor: at least of itself."""
    found: list[tuple[fx.Node, fx.Node | float]] = []
    for operand, factor in operands(value, MUL):
        if isinstance(factor, int | float):
            found.append((operand, float(factor)))
        elif is_weight(factor) and factor.meta["val"].numel() == 1:
            found.append((operand, factor))
    return [*found, (value, 1.0)]


def _inner(node: fx.Node, input_: fx.Node, root: fx.Node) -> frozenset[fx.Node]:
    """Return the calls between an input and the sum that are read by such calls only."""
    inner = {node}
    waiting = list(node.all_input_nodes)
    while waiting:
        call = waiting.pop()
        if call in inner or call in (input_, root) or call.op != "call_function":
            continue
        if all(user in inner for user in call.users):
            inner.add(call)
            waiting += call.all_input_nodes
    return frozenset(inner)


@dataclass(frozen=True, slots=True)
class RepParameters:
    """What a RepBN holds; ``mean`` and ``variance`` are statistics, the rest can be trained.

    Attributes:
        gain: [channels], as the next three.
        bias: of the batch norm.
        mean: of the batch norm's input.
        variance: of the same.
        alpha: [1].
    """

    gain: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    alpha: Tensor

    @classmethod
    def fitted(cls, moments: ChannelMoments) -> RepParameters:
        """Return, in float64, those that fit a norm with these moments best.

        With the slopes ``s = cov(x, y) / var(x)`` of the least-squares lines of the norm's results
        y on its inputs x, one for each channel (0 for a channel that does not vary)::

            alpha = mean over channels of s
            gain  = (s - alpha) sqrt(var(x) + eps),    bias = mean(y) - alpha mean(x)

        so that ``BN(x) + alpha x = s (x - mean(x)) + mean(y)``.
        """
        varies = moments.variance > 0
        slope = torch.where(varies, moments.covariance / moments.variance.where(varies, 1.0), 0.0)
        alpha = slope.mean().reshape(1)
        gain = (slope - alpha) * torch.sqrt(moments.variance + EPS)
        bias = moments.output_mean - alpha * moments.mean
        return cls(gain, bias, moments.mean, moments.variance, alpha)


def check_fits(norm: Norm, parameters: RepParameters) -> None:
    """Check that a RepBN in the place of a norm can hold these, in the dtype of its input.

    Raises:
        PassError: one of them is too large for it.
    """
    dtype = norm.input.meta["val"].dtype
    values = (getattr(parameters, field.name) for field in fields(parameters))
    if not all(is_finite(value.to(dtype)) for value in values):
        raise PassError(
            f"%{norm.node.name}: what it reads varies more than {dtype} has numbers for",
            remedy="convert-dtype{to=bfloat16} first, which has the range of float32",
        )


def insert_rep_batch_norm(program: Program, node: fx.Node, parameters: RepParameters) -> fx.Node:
    """Insert a RepBN behind the input of a norm, which stays, and return the RepBN's result.

    Args:
        program: an editable copy.
        node: a norm over the last dimension of ``x: [..., channels]``, of two or more dimensions.
        parameters: of the RepBN; rounded to the dtype of x.

    Raises:
        PassError: one of them does not fit into that dtype.
    """
    norm = Norm.match(node)
    assert norm is not None
    check_fits(norm, parameters)
    source, value = norm.input, norm.input.meta["val"]
    base = path_of(node) or node.name

    def weight(name: str, tensor: Tensor) -> fx.Node:
        added = program.add_weight(f"{base}.{name}", tensor.to(value.dtype))
        if name.startswith("bn.running"):
            program.weights.buffers |= {added}
        return program.weight_node(node.graph, added, before=node)

    def call(target: object, *args: object) -> fx.Node:
        return insert_call(node.graph, target, args, before=node, like=node)

    statistics = (
        weight("bn.weight", parameters.gain),
        weight("bn.bias", parameters.bias),
        weight("bn.running_mean", parameters.mean),
        weight("bn.running_var", parameters.variance),
    )
    alpha = weight("alpha", parameters.alpha)
    swap = value.dim() > 2  # batch norm wants the channels second
    x = call(aten.transpose.int, source, 1, value.dim() - 1) if swap else source
    settings = (False, 0.1, EPS, False)  # not training, momentum, eps, no cudnn
    normal = call(aten.batch_norm.default, x, *statistics, *settings)
    result = call(aten.add.Tensor, normal, call(aten.mul.Tensor, x, alpha))
    hand_on(node, result)
    return call(aten.transpose.int, result, 1, value.dim() - 1) if swap else result


def merge_permutations(graph: fx.Graph) -> None:
    """Let equal permutations of a value be computed once, and those that undo each other never.

    Blocks are kept apart: none reads another's permutation that it did not read before.
    """
    known: dict[tuple[object, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if permutation(node) is None:
            continue
        root, order = unpermuted(node)
        key = (root, order, block_of(node))
        same = root if order == tuple(range(len(order))) else known.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
