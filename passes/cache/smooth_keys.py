"""Keys whose channels are of one size, so that few bits do for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...ir import PassError, Program
from ..base import Fidelity, Pass, PassResult, Remark
from ..context import PassContext
from .channels import distinct
from .entries import PAST, PRESENT, Entries, Entry, graph_with_cache
from .smooth_edits import Fold, is_scaled_at_run_time, scale_at_run_time
from .smoothing import Rows, RunTime

_EVEN = 1e-3  # a size this near to 1 is left alone


@dataclass(frozen=True, kw_only=True)
class SmoothKeys(Pass):
    """Scale the channels of keys to one size, and those of queries by the inverse.

    A key k and a query q: [..., width] meet in q . k only, so for any s: [width] (q / s) . (s k)
    is the same.  Rounding a key's channels with one step asks for channels of one size.

    *Before rotary positions* s is folded into the rows of the linears, for nothing at run time:
    W_k[c] s[c], W_q[c] / s[c], and biases alike.  Rotary positions turn pairs of channels, so both
    channels of a pair share s; which ones are pairs is read off the graph, and channels that are
    not turned, or all of them in a model without rotary positions, get an s each.  Query heads that
    share a key head share its s.  With n[p] = max over calibration tokens of |(k1, k2)| for a pair
    p, or |k| for a single channel: s = 1 / n[p].

    *After rotary positions* (``channels``) any channel may have an s of its own: the keys' largest
    ``channels`` of each head, by t[c] = max over tokens |k[c]|, and those that they are paired with
    are multiplied by 1 / t[c] when the model runs, and queries by t[c].  Their s is 1 then.

    The cache holds s k afterwards: caches of the program before do not fit the one after it.  What
    is kept exactly are the other outputs of runs without a cache; that a cache changes nothing is
    judged for every pass.  Products are made in float64 and rounded once.

    Leaves alone, with a remark: keys or queries that a norm (as in Qwen3) or anything else lies
    between, linears that share their weight with others, quantised linears, caches of codes.
    ``channels`` works behind norms, too.

    Source: FireQ (arXiv 2505.20839), rotary-aware smoothing, alpha = beta = 1; single channels
    where nothing is turned are ours.

    Attributes:
        channels: of each key head, scaled when the model runs; 0: all is folded.
    """

    name: ClassVar[str] = "smooth-keys"
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    channels: int = 0

    def __post_init__(self) -> None:
        if self.channels < 0:
            raise ValueError(f"channels is at least 0, got {self.channels}")

    def requires(self, program: Program) -> None:
        """Check that there is a cache.

        Raises:
            PassError: there is none.
        """
        if graph_with_cache(program) is None:
            raise PassError(
                f"smooth-keys: {program.origin.model} keeps no keys",
                remedy="leave the pass out: only keys that are kept in few bits gain by it",
            )

    def kept(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return all outputs but cached keys; nothing for a run that reads other cached keys."""
        if any(v.numel() for name, v in inputs.items() if name.startswith(f"{PAST}.")):
            return {}
        return {name: value for name, value in outputs.items() if not _is_cached_key(name)}

    def run(self, program: Program, context: PassContext) -> PassResult:
        graph = graph_with_cache(program)
        assert graph is not None
        entries = Entries.of(program, graph)
        rows = Rows.of(program, graph, entries)
        sizes, largest = rows.measure(program, context, graph)
        sizes = torch.where((sizes - 1).abs() <= _EVEN, 0.0, sizes)
        remarks = [
            Remark("missed", name, why)
            for name, why in entries.refused.items()
            if name.endswith(".key")
        ]
        fresh = [entry for entry in rows.keys if not is_scaled_at_run_time(entry)]
        for entry in rows.keys:
            if entry not in fresh:
                remarks.append(Remark("missed", entry.name, "smoothed already"))
                _leave(rows, entry, sizes, torch.ones_like(largest[entry]).bool())
            elif self.channels:
                site = RunTime.of(entry, entries)
                remarks.append(self._at_run_time(program, rows, site, entry, largest, sizes))
        factors = rows.scales.factors(sizes)
        Fold(program, rows, factors).run()
        remarks += [remark for entry in fresh for remark in _folded(rows, entry, factors)]
        remarks.sort(key=lambda remark: int(remark.where.split(".")[1]))
        return PassResult(program, tuple(remarks))

    def _at_run_time(
        self,
        program: Program,
        rows: Rows,
        site: RunTime | str,
        entry: Entry,
        largest: Mapping[Entry, Tensor],
        sizes: Tensor,
    ) -> Remark:
        """Scale the largest channels of an entry when the model runs, and not in the linears."""
        if isinstance(site, str):
            return Remark("missed", entry.name, f"channels={self.channels}: {site}")
        own = largest[entry]
        places = own.topk(min(self.channels, own.shape[1])).indices
        chosen = torch.zeros_like(own).bool().scatter(1, places, value=True)
        chosen = _leave(rows, entry, sizes, chosen) & (own > 0)
        scale_at_run_time(program, site, torch.where(chosen, own, 1.0))
        text = f"{int(chosen.sum())} channels of {len(own)} heads scaled when the model runs"
        return Remark("applied", entry.name, text)


def _is_cached_key(name: str) -> bool:
    return name.startswith(f"{PRESENT}.") and name.endswith(".key")


def _leave(rows: Rows, entry: Entry, sizes: Tensor, chosen: Tensor) -> Tensor:
    """Fold nothing into what makes the ``chosen`` keys; return these with their pairs.

    Args:
        rows: of all linears.
        entry: the keys.
        sizes: of each label; those of the chosen ones become 0.
        chosen: bool [heads, width].
    """
    ids = rows.of_entry(entry)
    if ids is None:
        return chosen
    labels = rows.scales.labels[ids]
    own = distinct(labels[chosen])
    sizes[own] = 0
    return torch.isin(labels, own)


def _folded(rows: Rows, entry: Entry, factors: Tensor) -> list[Remark]:
    """Say what was folded for an entry, and why not all was."""
    ids = rows.of_entry(entry)
    if ids is None:
        return [Remark("missed", entry.name, rows.obstacle(entry))]
    scaled, free = ids[factors[ids] != 1], bool(rows.scales.free[ids].all())
    told: list[Remark] = []
    if len(scaled):
        sizes, groups = 1 / factors[scaled], len(distinct(rows.scales.labels[scaled]))
        text = (
            f"{len(scaled)} channels of sizes {float(sizes.min()):.3g} to {float(sizes.max()):.3g} "
            f"folded, {groups} scales"
        )
        told.append(Remark("applied", entry.name, text))
    if not free:
        told.append(Remark("missed", entry.name, rows.obstacle(entry)))
    even = Remark("missed", entry.name, "its channels are of one size already")
    return told or [even]
