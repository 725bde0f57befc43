"""Fold affine maps of channels into the linears and convolutions around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import fx

from ...ir import (
    Convolution,
    Linear,
    Program,
    QuantizedLinear,
    call_name,
    is_weight,
    marks_of,
)
from ..base import Remark
from .affine import ChannelMap, Product, Side, folded_weights, layout
from .channels import carried, origin
from .gains import EQUALIZED, KEPT
from .readers import elsewhere, tied, untied


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A place where a graph applies an affine map to channels.

    Attributes:
        graph: the graph.
        node: the call that remarks name.
        input: the value that is mapped.
        outputs: the nodes that hold the result.
        axis: where the channels are, in input and outputs.
        channels: the map.
        inner: the calls that compute the map from the input.
    """

    graph: fx.Graph
    node: fx.Node
    input: fx.Node
    outputs: tuple[fx.Node, ...]
    axis: int
    channels: ChannelMap
    inner: frozenset[fx.Node]


@dataclass(frozen=True, slots=True, eq=False)
class _Fold:
    """One way to get rid of a site's map: products that take it in."""

    site: Site
    side: Side
    products: tuple[Product, ...]

    def folds_alike(self, other: _Fold) -> bool:
        return self.side == other.side and self.site.channels.key == other.site.channels.key

    def remark(self) -> Remark:
        names = ", ".join(f"%{product.node.name}" for product in self.products)
        if self.side == "outputs":
            message = f"folded into {names}, which makes its input"
        else:
            message = f"folded into {names}, which {_reads(self.products)} it"
        return Remark("applied", self.site.node.name, message)


def _reads(products: tuple[Product, ...]) -> str:
    return "reads" if len(products) == 1 else "read"


def fold_maps(
    program: Program, find: Callable[[Program], list[Site]], untie: bool
) -> tuple[list[Remark], list[tuple[Site, str]]]:
    """Fold what can be folded, until nothing can.

    A map goes into the product that makes its input where nothing else reads that, and otherwise
    into all the products that read its result.

    Args:
        program: an editable copy.
        find: returns the sites of a program.
        untie: give a product whose weight is read elsewhere a folded copy of its own.

    Returns:
        what was applied, and the sites that are left, each with the reason.
    """
    applied: list[Remark] = []
    while True:
        folds, left = _decide(program, find(program), untie)
        if not folds:
            return applied, left
        folder = _Folder(program)
        for fold in folds:
            apart = _elsewhere(program, fold, folds)
            folder.fold(fold)
            applied.append(fold.remark())
            applied += [untied(program, p.node, p.weight, other) for p, other in apart]
        program.clean()


def in_graph_order(program: Program, remarks: Iterable[Remark], order: list[str]) -> list[Remark]:
    """Return remarks in the order of the nodes that they name, which may be gone."""
    places = {name: place for place, name in enumerate(order)}
    return sorted(remarks, key=lambda remark: places.get(remark.where, -1))


def node_names(program: Program) -> list[str]:
    """Return the names of all nodes in order."""
    return [node.name for graph in program.graphs.values() for node in graph.nodes]


def _decide(
    program: Program, sites: list[Site], untie: bool
) -> tuple[list[_Fold], list[tuple[Site, str]]]:
    """Choose a fold for each site; one that a shared weight forbids costs others that share it."""
    ways: dict[Site, list[_Fold]] = {}
    reasons: dict[Site, list[str]] = {}
    for site in sites:
        ways[site], reasons[site] = _ways(site)
    while True:
        folds = [ways[site][0] for site in sites if ways[site]]
        refused = [] if untie else [(f, why) for f in folds if (why := _shared(program, f, folds))]
        if not refused:
            return folds, [(s, "; ".join(reasons[s])) for s in sites if not ways[s]]
        for fold, why in refused:
            ways[fold.site].remove(fold)
            reasons[fold.site].append(why)


def _ways(site: Site) -> tuple[list[_Fold], list[str]]:
    """Return the possible folds of a site, the better one first, and why others are not."""
    before, after = _producer(site), _consumers(site)
    if EQUALIZED in marks_of(site.node):
        after = KEPT
    ways: list[_Fold] = []
    if not isinstance(before, str):
        ways.append(_Fold(site, "outputs", (before,)))
    if not isinstance(after, str):
        ways.append(_Fold(site, "inputs", after))
    return ways, [reason for reason in (before, after) if isinstance(reason, str)]


def _producer(site: Site) -> Product | str:
    """Return the product that makes a site's input for it alone, or why there is none."""
    value, axis, readers = site.input, site.axis, site.inner
    while True:
        others = [user for user in value.users if user not in readers]
        if others:
            return f"its input is also read by {_named(others[0])}"
        product = _product(value)
        if product is not None and _output_axis(product) == axis:
            return product
        source = origin(value, axis)
        if source is None:
            return f"its input comes from {_named(value)}"
        readers |= {value}
        value, axis = source


def _consumers(site: Site) -> tuple[Product, ...] | str:
    """Return the products that read a site's result, or why not all readers are some."""
    found: list[Product] = []
    waiting = [(output, site.axis) for output in site.outputs]
    while waiting:
        value, axis = waiting.pop(0)
        for user in value.users:
            product = _product(user)
            if product is not None and product.input is value:
                if reason := _obstacle(product, axis):
                    return reason
                found.append(product)
            elif (later := carried(user, value, axis)) is not None:
                waiting.append((user, later))
            else:
                return _why_not(user)
    return tuple(found)


def _product(node: fx.Node) -> Product | None:
    """Return the view of a linear or convolution whose weights are weights of the program."""
    product = Linear.match(node) or Convolution.match(node)
    if product is None or not is_weight(product.weight) or product.input is product.weight:
        return None
    return product if product.bias is None or is_weight(product.bias) else None


def _output_axis(product: Product) -> int:
    dims: int = product.node.meta["val"].dim()
    return dims - 1 if isinstance(product, Linear) else _channel_axis(product)


def _channel_axis(product: Convolution) -> int:
    dims: int = product.input.meta["val"].dim() - product.weight.meta["val"].dim()
    return dims + 1  # 1, or 0 without a batch


def _obstacle(product: Product, axis: int) -> str:
    """Return why a product that reads a mapped value cannot take the map in; empty if it can."""
    name = _named(product.node)
    if isinstance(product, Linear):
        last = product.input.meta["val"].dim() - 1
        return "" if axis == last else f"{name} reads another axis than the channels"
    if axis != _channel_axis(product):
        return f"{name} reads another axis than the channels"
    if product.transposed:
        return f"{name} is transposed, and would add the shift unevenly"
    if product.pads:
        return f"{name} pads with zeros, which are not shifted"
    return ""


def _why_not(user: fx.Node) -> str:
    if user.op == "output":
        return "its result is an output of the graph"
    if QuantizedLinear.match(user):
        return f"%{user.name}, which reads its result, is quantised already: fold before quantising"
    if "pad" in call_name(user):
        return f"{_named(user)} pads its result with values that are not shifted"
    return f"its result is read by {_named(user)}"


def _named(node: fx.Node) -> str:
    if node.op == "output":
        return "the output of the graph"
    if node.op == "placeholder":
        return f"%{node.name}, an input of the graph"
    return f"%{node.name} ({call_name(node)})" if node.op == "call_function" else f"@{node.target}"


def _elsewhere(program: Program, fold: _Fold, folds: list[_Fold]) -> list[tuple[Product, fx.Node]]:
    """Return readers of a fold's weights that do not take in the same map on the same side."""
    alike = [product for other in folds if other.folds_alike(fold) for product in other.products]
    return [
        (product, other)
        for product in fold.products
        for other in elsewhere(
            program, product.weight, {p.node for p in alike if layout(p) == layout(product)}
        )
    ]


def _shared(program: Program, fold: _Fold, folds: list[_Fold]) -> str | None:
    """Return why a weight that is read elsewhere forbids a fold, if one does."""
    for product, other in _elsewhere(program, fold, folds):
        return tied(product.node, other)
    return None


@dataclass(slots=True)
class _Folder:
    """Makes folded weights, one pair for all products that take in the same map the same way."""

    program: Program
    made: dict[tuple[object, ...], tuple[str, str]] = field(default_factory=dict)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def fold(self, fold: _Fold) -> None:
        """Give products their folded weights, and let a site's readers read its input."""
        for found in fold.products:
            product = _product(found.node)  # again: an earlier fold may have edited the call
            assert product is not None
            weight, bias = self._weights(product, fold)
            product.set_weights(
                self.program.weight_node(fold.site.graph, weight, before=product.node),
                self.program.weight_node(fold.site.graph, bias, before=product.node),
            )
        source = fold.site.input
        while source in self.replaced:
            source = self.replaced[source]
        for output in fold.site.outputs:
            output.replace_all_uses_with(source)
            self.replaced[output] = source

    def _weights(self, product: Product, fold: _Fold) -> tuple[str, str]:
        name = str(product.weight.target)
        old = None if product.bias is None else str(product.bias.target)
        key = (name, old, fold.side, layout(product), *fold.site.channels.key)
        if key not in self.made:
            weight, bias = folded_weights(self.program, product, fold.site.channels, fold.side)
            self.made[key] = (
                self.program.add_weight(f"{name}.folded", weight),
                self.program.add_weight(f"{old}.folded" if old else _bias_name(name), bias),
            )
        return self.made[key]


def _bias_name(weight: str) -> str:
    head, _, last = weight.rpartition(".")
    return f"{head}.bias" if last == "weight" else f"{weight}.bias"
