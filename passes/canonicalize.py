"""Bring a captured graph into the forms that every other pass looks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Program
from .base import Fidelity, Pass, PassContext, PassResult, Remark
from .canonical.formulas import raise_gelus, raise_norms
from .canonical.noops import drop_noops, fold_constants, merge_sizes
from .canonical.products import (
    lift_views,
    raise_biases,
    raise_grouped_attention,
    raise_linears,
)
from .canonical.rotary import raise_rotaries


@dataclass(frozen=True, kw_only=True)
class Canonicalize(Pass):
    """Raise hand-written formulas to single calls and drop calls that do nothing.

    Runs first in every pipeline.  In order:

    1. drops copies, conversions to the same dtype, neutral additions and products, and views to
       the same shape; asks each symbolic size once; computes weights that depend on weights only
       (a gain written ``1 + w``) when they are read;
    2. ``x W + b`` with ``W: [in, out]`` becomes ``linear(x, W.T, b)``, without flattening views,
       and so does a linear without a bias that only a sum with a weight ``[out]`` reads;
    3. ``x * rsqrt(mean(x^2) + eps) * g`` becomes ``rms_norm(x, g, eps)``, the centred form
       ``layer_norm``;
    4. ``x/2 (1 + tanh(...))`` and ``x/2 (1 + erf(...))`` become ``gelu``;
    5. ``x cos + (-x2, x1) sin``, with x in pairs (x1, x2), becomes ``rotary``, and takes in the
       channels behind x that a model leaves as they are;
    6. repeated key and value heads become grouped attention.

    What matches none of these stays as it is.  Sums may be taken in another order, so outputs may
    round differently; in exact arithmetic they are equal.

    Source: the definitions of the ATen operators.
    """

    name: ClassVar[str] = "canonicalize"
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    def run(self, program: Program, context: PassContext) -> PassResult:
        remarks: list[Remark] = []
        for name, graph in program.graphs.items():
            counts = {
                "calls without effect dropped": drop_noops(program, graph),
                "equal sizes merged": merge_sizes(program, graph),
                "products raised to linear": len(raise_linears(program, graph)),
                "weights computed from weights": fold_constants(program, graph),
                "pairs of views dropped": lift_views(program, graph),
                "biases taken into linears": len(raise_biases(program, graph)),
                "norms raised": len(raise_norms(program, graph)),
                "gelus raised": len(raise_gelus(program, graph)),
                "rotaries raised": len(raise_rotaries(program, graph)),
                "attentions grouped": len(raise_grouped_attention(program, graph)),
            }
            remarks += [
                Remark("applied", name, f"{count} {what}")
                for what, count in counts.items()
                if count
            ]
            program.clean()
        return PassResult(program, tuple(remarks))
