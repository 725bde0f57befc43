"""Keys and values of a decoder's cache in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from ...ir import PassError, Program
from ...ir.cache import CachedCodes, packs, reads_codes
from ..base import Fidelity, Pass, PassResult, Remark
from ..context import PassContext
from ..probes import probe
from ..spec import to_spec
from .entries import PARTS, Entries, cache_bytes, graph_with_cache
from .rewrite import quantize_entry
from .search import Found, Method, Point, search
from .widths import Pair, read_table, write_table

_SEARCH = ("search", "trials", "groups", "tokens")
_TOKENS, _GROUPS, _TRIALS = 2048, 16, 100  # where the search is not told
_SLACK = 1e-6  # of a step: the rounding of the comparison


@dataclass(frozen=True, kw_only=True)
class QuantizeCache(Pass):
    """Store the keys and values that a decoder keeps in 2, 4 or 8 bits.

    A new key or value x: [batch, heads, tokens, width] is rounded per token and head.  With
    lo = min(x, 0), hi = max(x, 1e-5) over the width and n = 2^bits - 1:

        scale = (hi - lo) / n,  zero = round(-lo / scale),
        code = clip(round(x / scale) + zero, 0, n),
        x' = (code - zero) scale,  |x' - x| <= scale / 2

    ``past_key_values.N.key`` and ``present.N.key`` become uint8 codes (4 and 2 bits: two and four
    per byte), and ``..key_scale`` (in the model's dtype) and ``..key_zero`` (uint8) join the
    signature behind them; values alike.  Attention reads x' of *every* token, also of those that
    are new in this call, so reading a text at once and token by token is the same function.

    Widths are given by ``key-bits`` and ``value-bits``, and for single blocks by ``blocks``; or
    ``target-bits`` has them searched: attention-output errors of the nine pairs on calibration
    text, Pareto pruning, groups of blocks that are alike, then measured KL of all tables where
    they are few; else of those that are best if what each group costs alone adds up, or of those
    that NSGA-II breeds (``search``).  The front is in the manifest, and a remark has the table that
    was chosen as text for ``blocks``.

    Trained after this pass, gradients pass the rounding of new tokens as if it was not there.

    Refuses, as an error: a model without a cache, a block that is not there, ``target-bits`` that
    no table meets.  Leaves alone, with a remark: entries whose past is not simply joined with new
    tokens, heads whose width does not fill whole bytes, cross-attention keys and values, which are
    written once, and where widths are searched an entry whose other half is left alone.

    Source: KVTuner (arXiv 2502.04420): per-token asymmetric rounding, sections 4 and 5 for the
    search.  Its zero point is a whole number of any size; here the range holds 0, so that it fits
    a code, which is the same wherever a head has numbers of both signs.  DBSCAN and its radius are
    a reconstruction.

    Attributes:
        key_bits: width of keys; none: they stay as they are; auto: 8, or what is searched.
        value_bits: width of values; as for keys.
        blocks: widths of single blocks, keys/values, such as 0:8/8,1-5:4/2; blocks are numbered as
            the entries of the cache.
        target_bits: mean width to search a table for, 2 to 8, scales and what is left alone not
            counted; instead of the other three.
        search: sums, which is ours, or nsga2, which is KVTuner's and needs optuna
            (pip install optuna); none: sums.
        trials: tables that nsga2 measures; none: 100.
        groups: of blocks that share their widths, at most; none: 16.
        tokens: of the calibration text that the search measures on; none: 2048.
    """

    name: ClassVar[str] = "quantize-cache"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_signature: ClassVar[bool] = True

    key_bits: Literal["auto", 2, 4, 8] | None = "auto"
    value_bits: Literal["auto", 2, 4, 8] | None = "auto"
    blocks: tuple[str, ...] = ()
    target_bits: float | None = None
    search: Method | None = None
    trials: int | None = None
    groups: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) not in ("auto", None, 2, 4, 8):
                raise ValueError(f"{name} is 2, 4, 8, none or auto, got {getattr(self, name)}")
        counts = (self.trials, self.groups, self.tokens)
        if any(count is not None and count < 1 for count in counts):
            raise ValueError("trials, groups and tokens are at least 1")
        if self.target_bits is None:
            self._check_widths()
            return
        if not 2 <= self.target_bits <= 8:
            raise ValueError(f"target_bits is 2 to 8, got {self.target_bits:g}")
        if fixed := self._given("key_bits", "value_bits", "blocks"):
            raise ValueError(f"target-bits chooses the widths: leave {fixed[0]} out")
        if self.trials is not None and self.search != "nsga2":
            raise ValueError("trials is for search=nsga2")

    def _check_widths(self) -> None:
        if unused := self._given(*_SEARCH):
            raise ValueError(f"{unused[0]} is for the search, which target-bits= starts")
        pairs = (self._uniform, *read_table(self.blocks).values())
        if all(bits is None for pair in pairs for bits in pair):
            raise ValueError("key_bits=none value_bits=none leaves everything as it is")

    def _given(self, *names: str) -> list[str]:
        """Return the options among ``names`` that are not left to the pass."""
        return [name for name in names if getattr(self, name) != getattr(type(self), name)]

    @property
    def _uniform(self) -> Pair:
        """The widths of blocks that are not named."""
        keys, values = (8 if b == "auto" else b for b in (self.key_bits, self.value_bits))
        return keys, values

    def requires(self, program: Program) -> None:
        """Check that there is a cache, with the blocks that are named.

        Raises:
            PassError: there is not.
        """
        graph = graph_with_cache(program)
        if graph is None:
            raise PassError(
                f"quantize-cache: {program.origin.model} keeps no keys and values",
                remedy="leave the pass out: only decoders with a cache have some",
            )
        entries = Entries.of(program, graph)
        if self.target_bits is not None and not entries.pairs():
            raise PassError(
                f"quantize-cache: target-bits={self.target_bits:g} is out of reach: no block has "
                "both keys and values that can be rounded",
                remedy="give the widths with key-bits=, value-bits= or blocks=",
            )
        known = _numbers(entries)
        missing = [block for block in read_table(self.blocks) if block not in known]
        if missing:
            raise PassError(
                f"quantize-cache: the cache has no block {missing[0]}",
                remedy=f"blocks are numbered {min(known)} to {max(known)}",
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        graph = graph_with_cache(program)
        assert graph is not None
        entries = Entries.of(program, graph)
        found: Found | None = None
        if self.target_bits is not None:
            found = search(
                program,
                context,
                graph,
                tokens=self.tokens or _TOKENS,
                groups=self.groups or _GROUPS,
                method=self.search or "sums",
                trials=self.trials or _TRIALS,
            )
        table, remarks = self._table(entries, graph, found)
        before = cache_bytes(program)
        for entry in entries.found:
            bits = table[entry.number][PARTS.index(entry.part)]
            width = int(entry.newest.meta["val"].shape[-1])
            if bits is None:
                continue
            if not packs(width, bits):
                reason = f"{width} codes of {bits} bits do not fill whole bytes"
                remarks.append(Remark("missed", entry.name, reason))
                continue
            quantize_entry(program, graph, entry, bits)
            message = f"stored in {bits} bits per token and head of {width}"
            remarks.append(Remark("applied", entry.name, message))
        remarks += [Remark("missed", name, why) for name, why in entries.refused.items()]
        remarks += _crossed(program, graph)
        details: dict[str, Any] = {
            "blocks": ",".join(write_table(table)),
            "bytes_per_token": {"before": before, "after": cache_bytes(program)},
        }
        if found is not None:
            details["search"] = found.known()
            details["recipe"] = to_spec(QuantizeCache(blocks=write_table(table)))
        return PassResult(program, tuple(remarks), details)

    def _table(
        self, entries: Entries, graph: str, found: Found | None
    ) -> tuple[dict[int, Pair], list[Remark]]:
        """Return the widths by block, and what to say about them."""
        numbers = _numbers(entries)
        if found is None:
            return dict.fromkeys(numbers, self._uniform) | read_table(self.blocks), []
        assert self.target_bits is not None
        point = found.within(self.target_bits)
        alone = [entry.name for entry in entries.found if entry.number not in point.table]
        why = "widths are searched for keys and values of a block, and its other half is left alone"
        left: dict[int, Pair] = dict.fromkeys(numbers, (None, None))
        table = left | dict(point.table)
        remarks = [_chosen(graph, found, point, table)]
        return table, [*remarks, *(Remark("missed", name, why) for name in alone)]

    def ensures(self, before: Program, after: Program) -> None:
        """Check on a few tokens that what attention reads is within half a step of what was made.

        Raises:
            PassError: it is not; the message names the call.
        """
        graph = graph_with_cache(after)
        assert graph is not None
        inputs = probe(after, graph, batch=2, sequence=9, source=5, past=0)
        reads = reads_codes(after.graphs[graph])
        operands = {node for read in reads for node in (read.newest, read.scales)}
        held: dict[fx.Node, Tensor] = {}

        def compare(node: fx.Node, value: Any) -> None:
            if node in operands:
                held[node] = value
            if (read := CachedCodes.match(node)) is None:
                return
            gap, step = (value - held.pop(read.newest)).abs(), held.pop(read.scales)
            if not bool((gap <= (0.5 + _SLACK) * step).all()):
                raise PassError(f"quantize-cache: %{node.name} is off by more than half a step")

        after.run(inputs, graph, compare, torch.float64)


def _numbers(entries: Entries) -> list[int]:
    """Return the numbers of a cache's entries, also of those that cannot be rounded."""
    names = [int(name.split(".")[1]) for name in entries.refused]
    return sorted({*names, *(entry.number for entry in entries.found)})


def _chosen(graph: str, found: Found, point: Point, table: Mapping[int, Pair]) -> Remark:
    text = (
        f"{point.bits:.3g} bits on average, KL {point.kl:.3g} on calibration text, best of "
        f"{found.measured} tables: blocks={','.join(write_table(table))}"
    )
    return Remark("applied", graph, text)


def _crossed(program: Program, graph: str) -> list[Remark]:
    """Say that cross-attention keeps its keys and values."""
    if not any(name.startswith("cross_key_values.") for name in program.signatures[graph].inputs):
        return []
    return [Remark("missed", "cross_key_values", "written once per text, so they stay as they are")]
