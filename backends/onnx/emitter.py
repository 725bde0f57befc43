"""What a translation of one call works with: values, sizes and weights of the graph so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from torch import fx

from ...ir.errors import LoweringError
from ...ir.weights import Weight
from .builder import Builder, Scalar, onnx_dtype
from .sizes import Size, Sizes, UnknownSizeError
from .weights import StoredWeights

Result: TypeAlias = ir.Value | tuple[ir.Value, ...]
Operand: TypeAlias = fx.Node | Scalar
Whole: TypeAlias = fx.Node | int  # an integer, given or computed


def sizes_of(node: fx.Node) -> tuple[Size, ...]:
    """Return the sizes of a node's tensor, numbers or symbolic."""
    return tuple(node.meta["val"].shape)


def dtype_of(node: fx.Node) -> ir.DataType:
    """Return the dtype of a node's tensor or number."""
    return onnx_dtype(torch_dtype(node))


def torch_dtype(node: fx.Node) -> torch.dtype:
    """Return the torch dtype of a node's tensor or number."""
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, bool | torch.SymBool):
        return torch.bool
    return torch.int64 if isinstance(value, int | torch.SymInt) else torch.float32


def is_size(node: object) -> bool:
    """Tell whether a node's value is an integer and not a tensor."""
    if not isinstance(node, fx.Node):
        return False
    value = node.meta.get("val")
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def rank_of(node: fx.Node) -> int:
    """Return the number of axes of a node's tensor."""
    return len(node.meta["val"].shape)


def axis_of(node: fx.Node, axis: int) -> int:
    """Return an axis counted from the front."""
    return axis % max(1, rank_of(node))


class Emitter:
    """One graph on its way to ONNX.

    Attributes:
        builder: appends nodes.
        sizes: symbolic sizes.
        weights: the stored weights.
        accuracy_level: of quantised products; 4 computes with 8-bit integers, 1 with float32.
        values: what each node became.
        memory: what handlers keep for later calls (a mask that all blocks share), by key.
        transposed: weights that are stored as ``[in, out]``.
        looked_up: quantised weights that an embedding reads.
        folded: joins with a cache that an attention node makes itself.
    """

    def __init__(
        self,
        builder: Builder,
        sizes: Sizes,
        weights: Mapping[str, Weight],
        accuracy_level: int,
    ) -> None:
        self.builder = builder
        self.sizes = sizes
        self.weights = StoredWeights(builder, weights)
        self.accuracy_level = accuracy_level
        self.values: dict[fx.Node, Result] = {}
        self.memory: dict[tuple[object, ...], ir.Value] = {}
        self.transposed: set[str] = set()
        self.looked_up: set[str] = set()
        self.folded: set[fx.Node] = set()

    def op(self, kind: str, *inputs: ir.Value | None, **options: Any) -> ir.Value:
        """Append a node with one output; see ``Builder.op``."""
        return self.builder.op(kind, *inputs, **options)

    def value(self, node: fx.Node) -> ir.Value:
        """Return what a node with one result became.

        Weights become initializers, and sizes nodes, when they are first asked for.
        """
        if node not in self.values:
            if node.op == "get_attr":
                self.values[node] = self.weights.plain(str(node.target))
            elif is_size(node):
                self.values[node] = self.scalar(node)
        value = self.values[node]
        if not isinstance(value, ir.Value):
            raise LoweringError(f"%{node.name}: has several results where one is read")
        return value

    def tensor(self, operand: Operand, dtype: ir.DataType) -> ir.Value:
        """Return an operand as a tensor of ``dtype``: cast, or a constant."""
        if isinstance(operand, fx.Node):
            value = self.value(operand)
            if value.dtype is None:
                value.dtype = dtype_of(operand)
            return self.builder.cast(value, dtype)
        return self.builder.constant(operand, dtype)

    def size(self, operand: Whole) -> Size:
        """Return an integer operand as a size, which may be symbolic."""
        size: Size = operand.meta["val"] if isinstance(operand, fx.Node) else operand
        return size

    def scalar(self, operand: Whole) -> ir.Value:
        """Return an integer operand as an ``int64`` scalar."""
        return self._sized(lambda: self.sizes.scalar(self.size(operand)))

    def row(self, operand: fx.Node | Size) -> ir.Value:
        """Return an integer operand as an ``int64[1]``."""
        size = self.size(operand) if isinstance(operand, fx.Node) else operand
        return self._sized(lambda: self.sizes.row(size))

    def shape(self, sizes: Sequence[Size]) -> ir.Value:
        """Return sizes as an ``int64[n]``."""
        return self._sized(lambda: self.sizes.shape(sizes))

    def reshape(self, value: ir.Value, before: Sequence[Size], after: Sequence[Size]) -> ir.Value:
        """Return ``value`` of sizes ``before`` with sizes ``after``."""
        target = self._sized(lambda: self.sizes.reshape_target(before, after))
        return self.op("Reshape", value, target)

    def expand(self, value: ir.Value, before: Sequence[Size], after: Sequence[Size]) -> ir.Value:
        """Return ``value`` of sizes ``before`` repeated along axes of size 1, to sizes ``after``.

        Sizes that stay are written as 1, which ``Expand`` leaves alone, so that they need not be
        computed.
        """
        was = [1] * (len(after) - len(before)) + list(before)
        wanted = [1 if self.same(a, b) else b for a, b in zip(was, after, strict=True)]
        if any(not self.same(size, 1) for size in wanted):
            return self.op("Expand", value, self.shape(wanted))
        return value if len(before) == len(after) else self.reshape(value, before, after)

    def same(self, first: Size, second: Size) -> bool:
        """Tell whether two sizes are the same number or formula."""
        return self.sizes.text(first) == self.sizes.text(second)

    def _sized(self, make: Any) -> ir.Value:
        try:
            value: ir.Value = make()
        except UnknownSizeError as error:
            raise LoweringError(
                f"the size {error} cannot be computed from the sizes of the inputs"
            ) from error
        return value
