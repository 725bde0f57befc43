"""Taking blocks out of a program's graphs, with their cache entries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir import Block, PassError, Program, Signature, block_of, find_blocks, leave_block

_CACHE_INPUTS = ("past_key_values", "cross_key_values")
# The kind of input that gives an input or output its number.  The cross keys and values that the
# decoder reads are outputs of the encoder, under the same names.
_KINDS = {
    "past_key_values": "past_key_values",
    "present": "past_key_values",
    "cross_key_values": "cross_key_values",
}
_ENTRY = re.compile(r"(?P<prefix>\w+)\.(?P<number>\d+)\.(?P<part>.+)")


@dataclass(frozen=True, slots=True)
class Removal:
    """Blocks that go, and what becomes of the cache entries.

    Attributes:
        graph: the graph that the blocks are in.
        blocks: those that go, in order.
        dropped: numbers of the cache entries that only they read, by kind of input.
    """

    graph: str
    blocks: tuple[Block, ...]
    dropped: Mapping[str, frozenset[int]]

    @classmethod
    def of(cls, program: Program, graph: str, keys: Iterable[str]) -> Removal:
        """Plan to remove the blocks that have those keys."""
        wanted = set(keys)
        blocks = tuple(b for b in find_blocks(program.graphs[graph]) if b.key in wanted)
        dropped = {kind: _dropped(program, graph, kind, wanted) for kind in _CACHE_INPUTS}
        return cls(graph, blocks, dropped)

    def bypass(self) -> dict[fx.Node, fx.Node]:
        """Return each block's output with the input that stands for it when the block is gone."""
        return {b.output: b.input for b in self.blocks if b.output and b.input}

    def name(self, name: str) -> str | None:
        """Return what an input or output is called without the blocks; None where it goes."""
        entry = _ENTRY.fullmatch(name)
        kind = _KINDS.get(entry["prefix"]) if entry else None
        if entry is None or kind is None:
            return name
        number, gone = int(entry["number"]), self.dropped[kind]
        if number in gone:
            return None
        return f"{entry['prefix']}.{number - sum(n < number for n in gone)}.{entry['part']}"

    def signature(self, signature: Signature) -> Signature:
        """Return a signature without the blocks' cache entries, the others numbered densely."""
        names = {name: self.name(name) for name in (*signature.inputs, *signature.outputs)}
        gone = {name for name, new in names.items() if new is None}
        kept = {name: new for name, new in names.items() if new is not None}
        return signature.without(gone, gone).renamed(kept)


def _dropped(program: Program, graph: str, kind: str, keys: set[str]) -> frozenset[int]:
    """Return the numbers of the cache inputs that no block but those with ``keys`` reads."""
    readers: dict[int, set[str]] = {}
    for node in program.graphs[graph].find_nodes(op="placeholder"):
        entry = _ENTRY.fullmatch(str(node.target))
        if entry and entry["prefix"] == kind:
            readers.setdefault(int(entry["number"]), set()).update(_reading_blocks(node))
    return frozenset(number for number, found in readers.items() if found and found <= keys)


def _reading_blocks(source: fx.Node) -> set[str]:
    """Return the keys of the blocks that read a tensor, also through calls outside blocks."""
    found: set[str] = set()
    seen, waiting = {source}, [source]
    while waiting:
        for user in waiting.pop().users:
            if user in seen or not isinstance(user.meta.get("val"), torch.Tensor | tuple | list):
                continue  # a size says nothing about who owns the tensor
            seen.add(user)
            key = block_of(user)
            if key is None:
                waiting.append(user)
            else:
                found.add(key)
    return found


def remove(program: Program, removal: Removal) -> None:
    """Join the residual stream over the gaps and drop what only the removed blocks read or make.

    Raises:
        PassError: something else still needs a value of theirs.
    """
    # From the last to the first: a block's input may be the output of one that goes too.
    for block in reversed(removal.blocks):
        assert block.output is not None
        assert block.input is not None
        block.output.replace_all_uses_with(block.input)
    for name, graph in program.graphs.items():
        signature = program.signatures[name]
        results: Any = graph.output_node().args[0]
        named = zip(signature.outputs, results, strict=True)
        kept = [result for output, result in named if removal.name(output) is not None]
        graph.output_node().args = (tuple(kept),)
    program.clean()
    for name, graph in program.graphs.items():
        _drop_inputs(graph, program.signatures[name], removal)
        program.signatures[name] = removal.signature(program.signatures[name])
    _release_sizes(program.graphs[removal.graph], {block.key for block in removal.blocks})


def _drop_inputs(graph: fx.Graph, signature: Signature, removal: Removal) -> None:
    inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    names = {name: removal.name(name) for name in signature.inputs}
    left = {name: inputs[name] for name, new in names.items() if new is not None}
    for name, new in names.items():
        if new is None:
            _ask_another(inputs[name], signature, left)
            graph.erase_node(inputs[name])
        else:
            inputs[name].target = new


def _ask_another(gone: fx.Node, signature: Signature, left: Mapping[str, fx.Node]) -> None:
    """Make calls that ask for a size of ``gone`` ask an input of the same size that stays."""
    dims = signature.dims[str(gone.target)]
    for user in list(gone.users):
        if user.target is not torch.ops.aten.sym_size.int:
            raise PassError(
                f"input {gone.target} belongs to a block that goes, and %{user.name} reads it"
            )
        size = dims[_axis(user)]
        same = [
            (node, axis)
            for name, node in left.items()
            for axis, other in enumerate(signature.dims[name])
            if other == size
        ]
        if not same:
            raise PassError(f"no input that stays tells the size {size}, which %{user.name} reads")
        user.args = same[0]


def _axis(node: fx.Node) -> int:
    axis = node.args[1]
    assert isinstance(axis, int)
    return axis


def _release_sizes(graph: fx.Graph, keys: set[str]) -> None:
    """Make sizes that a removed block worked out for others belong to no block.

    Raises:
        PassError: a tensor of a removed block is still read.
    """
    for node in graph.nodes:
        if node.op != "call_function" or block_of(node) not in keys:
            continue
        if isinstance(node.meta["val"], torch.Tensor | tuple | list):
            raise PassError(f"%{node.name} of block {block_of(node)} is read outside of it")
        leave_block(node)
