"""A program that computes in another floating-point dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .blocks import info_of, set_info
from .calls import Attention, Norm
from .computed import ComputedWeight
from .errors import PassError
from .infer import fake_mode, fake_weight, infer_call, is_inferred, note_inferred
from .program import Program
from .weights import DTYPES, Weight, Weights

Keep = Literal["norms", "softmax"]
aten = torch.ops.aten

_NARROW = (torch.float16, torch.bfloat16)
_NORMS = (
    aten.native_layer_norm.default,
    aten.group_norm.default,
    aten.native_group_norm.default,
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
)
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
# Calls without tensors among their arguments: they can make their value in any dtype.
_CONSTANTS = (
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.scalar_tensor.default,
)


def main_dtype(program: Program) -> torch.dtype:
    """Return the floating-point dtype of most numbers in the weights, else that of an input."""
    count: dict[torch.dtype, int] = {}
    for name in program.weights:
        weight = program.weights[name]
        if weight.dtype.is_floating_point:
            size = torch.Size(weight.shape).numel()
            count[weight.dtype] = count.get(weight.dtype, 0) + size
    for graph in program.graphs.values():
        for node in graph.find_nodes(op="placeholder"):
            if node.meta["val"].dtype.is_floating_point:
                count.setdefault(node.meta["val"].dtype, 0)
    return max(count, key=lambda dtype: count[dtype], default=torch.float32)


def converted(program: Program, dtype: torch.dtype, keep: Iterable[Keep] = ()) -> Program:
    """Return ``program`` with its inputs, weights, calls and outputs in ``dtype``.

    - To float32: everything in float16 or bfloat16.  To one of those: everything in the other one,
      and, where most weights are float32, what is computed in float32; where they are not, the
      model computes in float32 on purpose, and that stays.
    - Values made of whole numbers and vectors only (rotary angles, buckets of relative positions)
      stay in float32 until they meet an activation: positions above 256 are no bfloat16 numbers.
    - Constants outside the range of ``dtype``, as masks have them, become its largest.
    - A weight that the graph needs in another dtype is a new one, converted when it is loaded.

    Args:
        program: is not changed.
        dtype: float32, float16 or bfloat16.
        keep: calls to compute in float32 nevertheless: ``norms``, or ``softmax``, which attention
            is one of.

    Raises:
        PassError: when a weight is loaded that float16 has no numbers for.
    """
    made = program.editable()
    aliases = made.weights.aliases
    sources = _sources(program, dtype)
    kept_kinds = frozenset(keep if dtype != torch.float32 else ())
    new_names: dict[tuple[str, torch.dtype], str] = {}
    for name in made.graphs:
        _Conversion(made, name, dtype, sources, kept_kinds, new_names).run()
    renamed = {old: new for (old, to), new in new_names.items() if to == dtype}
    made.clean()
    aliases = {alias: renamed.get(name, name) for alias, name in aliases.items()}
    table = {name: made.weights[name] for name in made.weights}
    kept = {alias: name for alias, name in aliases.items() if name in table}
    made.weights = Weights(table, kept, made.weights.buffers)
    made.config = _stated(made.config, dtype)
    return made


def kept_calls(program: Program, keep: Keep) -> list[fx.Node]:
    """Return the calls that ``keep`` means."""
    nodes = [node for graph in program.graphs.values() for node in graph.nodes]
    return [node for node in nodes if _is_kept(node, frozenset([keep]))]


def _is_kept(node: fx.Node, keep: frozenset[Keep]) -> bool:
    if "norms" in keep and (node.target in _NORMS or Norm.match(node)):
        return True
    return "softmax" in keep and (node.target in _SOFTMAX or Attention.match(node) is not None)


def _sources(program: Program, dtype: torch.dtype) -> frozenset[torch.dtype]:
    """Return the dtypes whose values change."""
    found = {narrow for narrow in _NARROW if narrow != dtype}
    if dtype != torch.float32 and main_dtype(program) == torch.float32:
        found.add(torch.float32)
    return frozenset(found)


def _stated(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the configuration with the dtype that it states replaced."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    return config | dict.fromkeys(keys, str(dtype).removeprefix("torch."))


def cast_weight(weight: Weight, dtype: torch.dtype, name: str) -> Weight:
    """Return ``weight`` in another dtype, converted when it is loaded.

    A number on its own (no dimensions) outside the range becomes the largest: it is a mask's.

    Raises:
        PassError: when it is loaded, and float16 has no numbers for it.
    """

    def cast(value: Tensor) -> Tensor:
        if value.dim() == 0:
            return _clamped(value, dtype).to(dtype)
        result = value.to(dtype)
        if dtype == torch.float16 and bool((result.isinf() & value.isfinite()).any()):
            largest = float(value.abs().max())
            raise PassError(
                f"@{name}: holds {largest:.4g}, more than float16's largest number, 65504",
                remedy="convert to bfloat16, which has the range of float32",
            )
        return result

    rule = f"cast {str(dtype).removeprefix('torch.')}"
    return ComputedWeight(rule, (weight,), weight.shape, dtype, cast, keep=False)


def _clamped(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return finite values cut to the range of ``dtype``; infinite ones as they are."""
    limit = torch.finfo(dtype).max
    cut = value.double().clamp(-limit, limit)
    return torch.where(value.isfinite(), cut, value.double())


class _Conversion:
    """One graph on its way to another dtype."""

    def __init__(
        self,
        program: Program,
        name: str,
        dtype: torch.dtype,
        sources: frozenset[torch.dtype],
        keep: frozenset[Keep],
        new_names: dict[tuple[str, torch.dtype], str],
    ) -> None:
        self.program, self.name, self.dtype = program, name, dtype
        self.graph = program.graphs[name]
        self.mode = fake_mode(self.graph)
        self.sources, self.new_names = sources, new_names
        self.old = {node: _dtype(node) for node in self.graph.nodes}
        self.changing = self._changing()
        self.kept = {node for node in self.changing if _is_kept(node, keep)}
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def _changing(self) -> set[fx.Node]:
        """Return the nodes whose value will be in the new dtype."""
        wide = torch.float32 in self.sources
        active = _activations(self.graph) if wide else set()
        found = {
            node
            for node in self.graph.nodes
            if self.old[node] in self.sources
            and (self.old[node] != torch.float32 or node in active)
        }
        for node in self.graph.nodes:
            made = wide and node.target in _CONSTANTS and self.old[node] == torch.float32
            if made and all(user in found or user.op == "output" for user in node.users):
                found.add(node)
        return found

    def run(self) -> None:
        """Rewrite the graph, giving each node its type on the way."""
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                if node in self.changing:
                    with self.mode:
                        node.meta["val"] = torch.empty(node.meta["val"].shape, dtype=self.dtype)
            elif node.op == "get_attr":
                self._weight(node)
            elif node.op == "call_function":
                self._call(node)
            else:
                self._operands(node, self.dtype, self.sources)

    def _weight(self, node: fx.Node) -> None:
        """Give each reader of a weight the dtype that it wants."""
        weight = self.program.weight(node)
        if weight.dtype not in self.sources:
            return
        readers: dict[torch.dtype, list[fx.Node]] = {}
        for user in node.users:
            readers.setdefault(self._wanted(node, user), []).append(user)
        for dtype, users in readers.items():
            if dtype == weight.dtype:
                continue
            with self.graph.inserting_before(node):
                other = self.graph.get_attr(self._cast_weight(str(node.target), dtype))
            other.meta["val"] = fake_weight(self.mode, self.program.weight(other))
            for user in users:
                user.replace_input_with(node, other)

    def _wanted(self, weight: fx.Node, user: fx.Node) -> torch.dtype:
        if user in self.kept:
            return torch.float32
        if user in self.changing or weight in self.changing or user.op == "output":
            return self.dtype
        return self.program.weight(weight).dtype

    def _cast_weight(self, name: str, dtype: torch.dtype) -> str:
        if (name, dtype) not in self.new_names:
            weight = cast_weight(self.program.weights[name], dtype, name)
            plain = name
            for known in DTYPES:
                plain = plain.removesuffix(f".{known}")
            new = self.program.add_weight(f"{plain}.{str(dtype).removeprefix('torch.')}", weight)
            self.new_names[name, dtype] = new
        return self.new_names[name, dtype]

    def _call(self, node: fx.Node) -> None:
        inner = torch.float32 if node in self.kept else self.dtype
        if self.dtype != torch.float32:
            self._edit(node, self._in_range)
        if node in self.changing:
            self._edit(node, lambda a: inner if a in self.sources else a)
            wide = frozenset((self.dtype, *self.sources)) if node in self.kept else self.sources
            self._operands(node, inner, wide)
        if self._copies_nothing(node):
            return
        if not is_inferred(node):
            node.meta["val"] = infer_call(self.mode, node)
            note_inferred(node)
        found = _dtype(node)
        if node in self.changing and found != self.dtype and not _is_tuple(node):
            cast = self._cast(node, self.dtype)
            node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)

    def _edit(self, node: fx.Node, change: Callable[[Any], Any]) -> None:
        """Change arguments that are not nodes."""
        edited: Any = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: a if isinstance(a, fx.Node) else change(a)
        )
        node.args, node.kwargs = edited

    def _in_range(self, value: Any) -> Any:
        if not isinstance(value, float) or value in (float("inf"), float("-inf")):
            return value
        limit = torch.finfo(self.dtype).max
        return min(max(value, -limit), limit) if value == value else value

    def _operands(self, node: fx.Node, dtype: torch.dtype, sources: frozenset[torch.dtype]) -> None:
        """Convert the operands of ``node`` that are not in ``dtype`` and were in ``sources``."""
        for operand in node.all_input_nodes:
            found = _dtype(operand)
            known = self.old.get(operand, found)
            if found is None or found == dtype or _is_tuple(operand):
                continue
            if not {found, known} & sources:
                continue
            if found == self.dtype:  # a call that keeps float32 among others that do not
                cast = self._cast(operand, dtype, before=node)
            else:
                cast = self._cast(operand, dtype)
            node.replace_input_with(operand, cast)

    def _cast(self, source: fx.Node, dtype: torch.dtype, before: fx.Node | None = None) -> fx.Node:
        """Return a conversion of ``source``, one for all readers unless ``before`` names one."""
        if before is None and (source, dtype) in self.casts:
            return self.casts[source, dtype]
        with self.graph.inserting_before(before or source.next):
            cast = self.graph.call_function(aten._to_copy.default, (source,), {"dtype": dtype})
        cast.meta["val"] = infer_call(self.mode, cast)
        note_inferred(cast)
        set_info(cast, **info_of(before or source))
        if before is None:
            self.casts[source, dtype] = cast
        return cast

    def _copies_nothing(self, node: fx.Node) -> bool:
        """Drop a conversion to the dtype that its operand has now."""
        if node.target is not aten._to_copy.default or node not in self.old:
            return False
        source = node.args[0]
        assert isinstance(source, fx.Node)
        to = node.kwargs.get("dtype")
        others = {key for key, value in node.kwargs.items() if value is not None}
        if _dtype(source) != to or self.old.get(source) == to or "memory_format" in others:
            return False
        node.replace_all_uses_with(source)
        self.graph.erase_node(node)
        return True


def _activations(graph: fx.Graph) -> set[fx.Node]:
    """Return the floating-point values that depend on inputs of the model or on its matrices."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if _dtype(node) is None:
            continue
        if node.op == "placeholder":
            found.add(node)
        elif node.op == "get_attr":
            if node.meta["val"].dim() >= 2:
                found.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _dtype(node: fx.Node) -> torch.dtype | None:
    """Return the floating-point dtype of a value, or of the first such part of it."""
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else (value,)
    for part in parts:
        if isinstance(part, Tensor) and part.dtype.is_floating_point:
            return part.dtype
    return None


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], tuple | list)
