"""What the graphs of an artifact take and give, as its manifest says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..ir.dims import evaluate
from ..ir.errors import StorageError

TOKEN_INPUTS = ("input_ids", "decoder_input_ids")
_MASK_INPUTS = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: name, dtype (``int64``, ``float32``, ...), sizes as numbers or names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sizes(self, known: Mapping[str, int]) -> tuple[int, ...]:
        """Return the sizes with names replaced; a name that is not known is 0."""
        return tuple(evaluate(dim, lambda name: known.get(name, 0)) for dim in self.shape)

    def known_sizes(self, known: Mapping[str, int]) -> tuple[int, ...] | None:
        """Return the sizes with names replaced, or None when a name is not known."""
        names = {
            n for d in self.shape if isinstance(d, str) for n in re.findall(r"[A-Za-z_]\w*", d)
        }
        return self.sizes(known) if names <= set(known) else None


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """What one graph of an artifact takes and gives.

    ``sizes`` are the symbolic sizes that a user's own module was captured with.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, signature: Mapping[str, Any]) -> GraphSpec:
        """Read a signature of the manifest."""
        sizes = signature.get("sizes", {})
        return cls(_specs(signature["inputs"]), _specs(signature["outputs"]), sizes)

    def input(self, name: str) -> TensorSpec | None:
        """Return an input by name."""
        return next((spec for spec in self.inputs if spec.name == name), None)


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """Which inputs and outputs of a decoder graph are tokens, mask, positions and state.

    ``state`` pairs each input that a step reads from the last one with the output that holds it:
    ``past_key_values.NAME`` with ``present.NAME``.
    ``fixed`` are the inputs that stay as the encoder made them.
    """

    graph: str
    tokens: str
    mask: str | None
    positions: str | None
    state: tuple[tuple[TensorSpec, TensorSpec], ...]
    fixed: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, graph: str, spec: GraphSpec) -> DecoderPlan:
        """Sort the names of a decoder graph.

        Raises:
            StorageError: an input that is left over has no such output, or an output no input.
        """
        names = [one.name for one in spec.inputs]
        tokens = next((name for name in TOKEN_INPUTS if name in names), None)
        if tokens is None or not spec.outputs:
            raise StorageError(f"graph {graph} takes no tokens: {', '.join(names)}")
        prefix = "decoder_" if tokens.startswith("decoder_") else ""
        mask = f"{prefix}attention_mask"
        positions = f"{prefix}position_ids"
        own = {tokens, mask, positions}
        rest = [one for one in spec.inputs if one.name not in own]
        fixed = tuple(one for one in rest if prefix and _from_encoder(one.name))
        state = [one for one in rest if one not in fixed]
        read = {one.name.replace("past_key_values.", "present.", 1): one for one in state}
        given = {one.name: one for one in spec.outputs[1:]}
        if odd := sorted(read.keys() ^ given.keys()):
            raise StorageError(
                f"graph {graph} does not both read and give {', '.join(odd)}",
                remedy="make the artifact again",
            )
        return cls(
            graph,
            tokens,
            mask if mask in names else None,
            positions if positions in names else None,
            tuple((before, given[name]) for name, before in read.items()),
            fixed,
        )


def _specs(entries: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(e["name"], e["dtype"], tuple(e["shape"])) for e in entries)


def _from_encoder(name: str) -> bool:
    return name.startswith("cross_key_values.") or name in (*_MASK_INPUTS, "last_hidden_state")
