"""Value biases of attention, folded into the bias of the output projection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import Attention, ComputedWeight, Linear, Program, TensorWeight, last_made
from ...ir.calls import argument
from ..base import Remark
from ..canonical.places import FOREIGN, constant_along, is_move, numbered, places
from .gains import bias_name
from .readers import has_weights, in_order, is_quantized, named, nothing

_FOLDED = "values_folded"  # marks a shared bias whose value part is zero now
_CACHE = "past_key_values.", "present."


@dataclass(frozen=True, slots=True, eq=False)
class _Site:
    """An attention, the linear that makes its values, and the one that reads its result.

    Attributes:
        channels: int64 [in of ``reader``]: which output of ``source`` each of its inputs is made
            of.
        whole: whether the values are all that ``source`` makes.
    """

    attention: Attention
    source: Linear
    reader: Linear
    channels: Tensor
    whole: bool


def fold_value_biases(program: Program) -> list[Remark]:
    """Fold what can be folded; see ``FoldNorms``.  One remark per attention with a value bias."""
    remarks: list[Remark] = []
    folder = _Folder(program)
    for name in program.graphs:
        for node in program.graphs[name].nodes:
            attention = Attention.match(node)
            found = _site(program, name, attention) if attention else None
            if isinstance(found, str):
                remarks.append(Remark("missed", node.name, f"value-bias: {found}"))
            elif found is not None:
                folder.fold(found)
                names = found.source.node.name, found.reader.node.name
                text = "value bias of %{} folded into %{}".format(*names)
                remarks.append(Remark("applied", node.name, text))
    if not remarks:
        reason = "no scaled_dot_product_attention reads values with a bias"
        remarks.append(nothing(program, "value-bias", reason))
    return in_order(program, remarks)


def _site(program: Program, graph: str, attention: Attention) -> _Site | str | None:
    """Return what is to be folded, why it is not, or None where there is no value bias."""
    source = _maker(attention.value)
    if isinstance(source, str):
        return source
    if source.bias is None or last_made(str(source.bias.target), _FOLDED):
        return None
    if argument(attention.node, 4, "dropout_p", 0.0):
        return "its dropout keeps attention rows from summing to 1"
    values = _values(program, graph, attention, source)
    if isinstance(values, str):
        return values
    reader = _reader(attention)
    if isinstance(reader, str):
        return reader
    linear, entries = reader
    heads, width = attention.node.meta["val"].shape[1], values.shape[1]
    head = (entries // width) // (heads // values.shape[0])
    channels = values[head, entries % width]
    return _Site(attention, source, linear, channels, _covers(source, values))


def _covers(source: Linear, values: Tensor) -> bool:
    return _distinct(values).numel() == int(source.node.meta["val"].shape[-1])


def _maker(value: fx.Node) -> Linear | str:
    """Return the one linear that makes the values, or what else does."""
    linears: list[Linear] = []
    stack, seen = [value], {value}
    while stack:
        node = stack.pop()
        linear = Linear.match(node)
        if linear is not None and has_weights(linear):
            linears.append(linear)
        elif is_quantized(node):
            return f"its values come from {named(node)}, which is quantised already"
        elif is_move(node):
            parts = [s for s in node.all_input_nodes if s not in seen and _is_made_of_entries(s)]
            stack += parts
            seen.update(parts)
        elif node.op != "placeholder" or not str(node.target).startswith(_CACHE[0]):
            what = f"input {node.target}" if node.op == "placeholder" else named(node)
            return f"its values come from {what}"
    return linears[0] if len(linears) == 1 else f"its values come from {len(linears)} linears"


def _values(program: Program, graph: str, attention: Attention, source: Linear) -> Tensor | str:
    """Return which output of ``source`` each value is, [heads, width], or why it is not clear."""
    made = source.node.meta["val"]
    found = places(source.node, numbered(made, (made.dim() - 1,)))
    if found[attention.value].dim() != 4:
        return "its heads are not the second of four dimensions"
    values = constant_along(found[attention.value], (0, 2))
    if values is None:
        return "its values are not one output of the linear each, at every position"
    heads, shared = attention.node.meta["val"].shape[1], values.shape[0]
    if heads != shared and not (attention.grouped and heads % shared == 0):
        return "its heads share values otherwise than in groups"
    if bool((found[attention.value] == FOREIGN).any()) and program.kind != "decoder":
        return "its values are cached, and only a decoder's cache is judged after the pass"
    return _other_readers(program, graph, attention, found, _distinct(values)) or values


def _other_readers(
    program: Program, graph: str, attention: Attention, found: dict[fx.Node, Any], values: Tensor
) -> str:
    """Return what else than the attention and its cache reads the values; empty for nothing."""
    others = [found[part] for part in (attention.query, attention.key) if part in found]
    if any(bool(torch.isin(values, numbers).any()) for numbers in others):
        return "its values are queries or keys, too"
    for node, numbers in found.items():
        for user in node.users:
            if user in found or user is attention.node or not _takes_entries(user):
                continue
            if user.op == "output" and _is_cached(program, graph, node, attention.value):
                continue
            if bool(torch.isin(values, numbers).any()):
                return f"its values are also read by {_reads(user)}"
    return ""


def _distinct(numbers: Tensor) -> Tensor:
    """Return every number once, in ascending order."""
    return torch.bincount(numbers.flatten()).nonzero().flatten()


def _takes_entries(user: fx.Node) -> bool:
    """Tell whether a call reads more than the sizes of what it is given."""
    return user.op == "output" or _is_made_of_entries(user)


def _is_made_of_entries(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor | tuple | list)


def _reads(user: fx.Node) -> str:
    return "an output of the graph" if user.op == "output" else named(user)


def _is_cached(program: Program, graph: str, node: fx.Node, value: fx.Node) -> bool:
    """Tell whether the graph returns ``node`` as the cache that it reads these values from."""
    (results,) = program.graphs[graph].output_node().args
    assert isinstance(results, tuple | list)
    names = program.signatures[graph].outputs
    returned = {name for name, result in zip(names, results, strict=True) if result is node}
    return returned <= {name.replace(*_CACHE) for name in _cache_inputs(value)}


def _cache_inputs(value: fx.Node) -> set[str]:
    """Return the names of the graph's inputs that a value is made of by moving entries."""
    stack, found = [value], set()
    while stack:
        node = stack.pop()
        if node.op == "placeholder" and isinstance(node.meta["val"], Tensor):
            found.add(str(node.target))
        elif is_move(node):
            stack += node.all_input_nodes
    return found


def _reader(attention: Attention) -> tuple[Linear, Tensor] | str:
    """Return the one linear that reads the result, and which entry each of its inputs is, or why.

    Entries are numbered ``head * width + channel``.
    """
    result = attention.node.meta["val"]
    found = places(attention.node, numbered(result, (1, 3)))
    ends = [(user, node) for node in found for user in node.users if user not in found]
    for user, node in ends:
        linear = Linear.match(user)
        if linear is None or linear.input is not node or not has_weights(linear):
            quantized = ", which is quantised already" if is_quantized(user) else ""
            return f"its result is read by {_reads(user)}{quantized}"
    if len(ends) != 1:
        return f"its result is read by {len(ends)} linears"
    ((user, node),) = ends
    entries = constant_along(found[node], tuple(range(found[node].dim() - 1)))
    linear = Linear.match(user)
    if entries is None or linear is None:
        return f"{named(user)} does not read one entry of its result each"
    return linear, entries


@dataclass(slots=True)
class _Folder:
    """Makes folded biases, one for each combination of weights."""

    program: Program
    made: dict[tuple[str, ...], str] = field(default_factory=dict)

    def fold(self, site: _Site) -> None:
        """Move one value bias."""
        source, reader = site.source, site.reader
        assert source.bias is not None
        bias = self._output_bias(site, source.bias)
        kept = None if site.whole else self._kept(source.bias, site.channels)
        graph = source.node.graph
        new = self.program.weight_node(graph, bias, before=reader.node)
        reader.set_weights(reader.weight, new)
        rest = self.program.weight_node(graph, kept, before=source.node) if kept else None
        source.set_weights(source.weight, rest)

    def _output_bias(self, site: _Site, values: fx.Node) -> str:
        reader, channels = site.reader, TensorWeight(site.channels)
        old = reader.bias
        key = (
            str(reader.weight.target),
            str(values.target),
            str(old.target) if old is not None else "",
            channels.fingerprint,
        )
        if key not in self.made:
            weight = self.program.weight(reader.weight)
            inputs = [weight, self.program.weight(values), channels]
            inputs += [self.program.weight(old)] if old is not None else []
            shape = (weight.shape[0],)
            folded = ComputedWeight("fold-value-bias", inputs, shape, weight.dtype, _moved)
            name = f"{old.target}.folded" if old is not None else bias_name(key[0])
            self.made[key] = self.program.add_weight(name, folded)
        return self.made[key]

    def _kept(self, bias: fx.Node, channels: Tensor) -> str:
        """Return the name of the bias with zeros for the values."""
        values = TensorWeight(_distinct(channels))
        key = (str(bias.target), values.fingerprint)
        if key not in self.made:
            old = self.program.weight(bias)
            zeroed = ComputedWeight("zero-values", (old, values), old.shape, old.dtype, _zeroed)
            self.made[key] = self.program.add_weight(f"{bias.target}.{_FOLDED}", zeroed)
        return self.made[key]


def _moved(weight: Tensor, values: Tensor, channels: Tensor, bias: Tensor | None = None) -> Tensor:
    moved = torch.mv(weight.double(), values.double()[channels])
    return moved if bias is None else moved + bias.double()


def _zeroed(bias: Tensor, values: Tensor) -> Tensor:
    return bias.index_fill(0, values, 0.0)
