"""Blocks: the repeated transformer layers of a graph, and the residual stream between them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .program import Signature

KEY = "modelathe"


def info_of(node: fx.Node) -> dict[str, Any]:
    """Return what capture noted about a call: ``path`` and, inside a block, ``block``."""
    found: dict[str, Any] = node.meta.get("custom", {}).get(KEY, {})
    return found


def path_of(node: fx.Node) -> str:
    """Return the dotted path of the module that made a call, such as ``h.3.mlp.c_fc``."""
    return str(info_of(node).get("path", ""))


def block_of(node: fx.Node) -> str | None:
    """Return the key of the block that a call belongs to, or None."""
    return info_of(node).get("block")


def set_info(node: fx.Node, **values: Any) -> None:
    """Note values about a call; the dict is replaced because copies of a graph share it."""
    custom = dict(node.meta.get("custom", {}))
    custom[KEY] = {**custom.get(KEY, {}), **values}
    node.meta["custom"] = custom


def mark(node: fx.Node, name: str, value: str | None) -> None:
    """Leave a note on a call for a later pass, or take it away with None.

    Marks are part of the program: printed (``!bits=4``), fingerprinted and saved.  They belong to
    one call: ``insert_call`` does not hand them on.
    """
    marks = {**marks_of(node), name: value}
    set_info(node, marks={key: text for key, text in marks.items() if text is not None})


def marks_of(node: fx.Node) -> dict[str, str]:
    """Return what earlier passes noted about a call, by name."""
    found: dict[str, str] = info_of(node).get("marks", {})
    return found


def leave_block(node: fx.Node) -> None:
    """Make a call one that belongs to no block."""
    values = {name: value for name, value in info_of(node).items() if name != "block"}
    node.meta["custom"] = {**node.meta.get("custom", {}), KEY: values}


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One repeated layer.

    Attributes:
        index: 0 for the first, in the order of the graph.
        key: module path, with ``@N`` for the N-th further call of one module.
        nodes: its calls, in graph order.
        reads: values that the block reads and that are made outside, weights left out.
        input: the residual value it reads, or None when that is not one clear value.
        output: the residual value it writes, or None when that is not one clear value.
        writes: other tensors it makes that calls outside read, such as a position bias that the
            first block makes for all.
    """

    index: int
    key: str
    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    input: fx.Node | None
    output: fx.Node | None
    writes: tuple[fx.Node, ...] = ()

    @property
    def path(self) -> str:
        """The module path of the block."""
        return self.key.partition("@")[0]


def find_blocks(graph: fx.Graph) -> tuple[Block, ...]:
    """Return the blocks of a graph in order; none for a graph without repeated layers."""
    members: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and (key := block_of(node)) is not None:
            members[key].append(node)
    written = [_written(nodes) for nodes in members.values()]
    alone = [values[0] for values in written if len(values) == 1]
    blocks: list[Block] = []
    for index, (key, nodes) in enumerate(members.items()):
        previous = blocks[-1].output if blocks else None
        output = _residual(written[index], alone)
        blocks.append(_block(index, key, nodes, previous, output, written[index]))
    return tuple(blocks)


def _written(nodes: list[fx.Node]) -> list[fx.Node]:
    own = set(nodes)
    return [node for node in nodes if _is_read_by_a_call_outside(node, own)]


def _residual(written: list[fx.Node], alone: list[fx.Node]) -> fx.Node | None:
    """Return the one written value that has the type of what other blocks write alone."""
    if len(written) > 1:
        written = [node for node in written if any(_same_type(node, other) for other in alone)]
    return written[0] if len(written) == 1 else None


def _block(
    index: int,
    key: str,
    nodes: list[fx.Node],
    previous: fx.Node | None,
    output: fx.Node | None,
    written: list[fx.Node],
) -> Block:
    own = set(nodes)
    reads = dict.fromkeys(
        source
        for node in nodes
        for source in node.all_input_nodes
        if source not in own and source.op != "get_attr"
    )
    residual: fx.Node | None = None
    if output is not None:
        if previous is not None and previous in reads and _same_type(previous, output):
            residual = previous
        else:
            alike = [node for node in reads if _same_type(node, output)]
            residual = alike[0] if len(alike) == 1 else None
    others = tuple(node for node in written if node is not output)
    return Block(index, key, tuple(nodes), tuple(reads), residual, output, others)


def _is_read_by_a_call_outside(node: fx.Node, own: set[fx.Node]) -> bool:
    """Tell whether the value leaves the block otherwise than as an output of the graph.

    The last block's residual value counts even when the graph returns it as it is.
    """
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    outside = [user for user in node.users if user not in own]
    if any(user.op == "call_function" for user in outside):
        return True
    return bool(outside) and not info_of(node).get("cache", False)


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    left, right = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
        return False
    same = tuple(map(str, left.shape)) == tuple(map(str, right.shape))
    return same and left.dtype == right.dtype


def stamp(graph: fx.Graph, signature: Signature, one_layer: bool = False) -> None:
    """Note each call's module path and block, from the module stacks that capture left.

    The rule: among module paths that end in a number, those of one parent are candidates; a parent
    counts when at least two instances have one class; one nested in another is dropped; the one
    that covers most calls gives the blocks.  One layer cannot be told from any other module by
    that, so where the configuration says that there is one (``one_layer``) and no parent counts,
    an only child does.
    """
    stacks = {n: info_of(n).get("stack", []) for n in graph.nodes if n.op == "call_function"}
    parent = _repeated_parent(stacks, 2)
    if parent is None and one_layer:
        parent = _repeated_parent(stacks, 1)
    for node, stack in stacks.items():
        info: dict[str, Any] = {"path": stack[-1][0] if stack else ""}
        for path, instance, _ in stack:
            if parent is not None and _is_child(path, parent):
                info["block"] = f"{path}@{instance}" if instance else path
        custom = {name: value for name, value in node.meta["custom"].items() if name != KEY}
        node.meta["custom"] = {**custom, KEY: info}
    for node in graph.nodes:
        if node.op != "call_function":
            node.meta.pop("custom", None)
    _mark_cache(graph, signature)
    _adopt(graph)


def _is_child(path: str, parent: str) -> bool:
    head, _, tail = path.rpartition(".")
    return head == parent and tail.isdigit()


def _repeated_parent(stacks: dict[fx.Node, list[list[str]]], least: int) -> str | None:
    instances: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    covered: dict[str, int] = defaultdict(int)
    for stack in stacks.values():
        for path, instance, kind in stack:
            parent, _, tail = path.rpartition(".")
            if tail.isdigit():
                instances[parent][path, instance] = kind
                covered[parent] += 1
    kept = [
        parent
        for parent, found in instances.items()
        if max(list(found.values()).count(kind) for kind in found.values()) >= least
        and (least > 1 or len(found) == 1)
    ]
    outermost = [p for p in kept if not any(p.startswith(f"{other}.") for other in kept)]
    return max(outermost, key=lambda p: covered[p], default=None)


def _mark_cache(graph: fx.Graph, signature: Signature) -> None:
    """Mark the calls whose value is returned as a cache entry."""
    results = graph.output_node().args[0]
    assert isinstance(results, tuple)
    for name, node in zip(signature.outputs, results, strict=True):
        if name.startswith(("present.", "cross_key_values.")) and isinstance(node, fx.Node):
            set_info(node, cache=True)


def _adopt(graph: fx.Graph) -> None:
    """Give calls outside every module to the block that alone feeds and reads them.

    Appending to the cache happens outside the block's module: ``cat(past, key)`` reads the block's
    key, and only the block's attention and the graph's output read it.
    """
    changed = True
    while changed:
        changed = False
        for node in graph.nodes:
            if node.op != "call_function" or block_of(node) is not None:
                continue
            sources = {block_of(s) for s in node.all_input_nodes if s.op == "call_function"}
            readers = {block_of(u) for u in node.users if u.op == "call_function"}
            sources.discard(None)
            if not readers and info_of(node).get("cache"):
                readers = sources
            if len(sources) == 1 and readers == sources:
                set_info(node, block=sources.pop())
                changed = True
