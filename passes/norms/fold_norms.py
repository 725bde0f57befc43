"""Fold what norms, value biases and logits have too much of into the linears around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...ir import Program
from ..base import Fidelity, Pass, PassContext, PassResult, Remark
from .center_logits import LOGITS, center_logits
from .center_readers import center_readers
from .gains import fold_gains
from .value_bias import fold_value_biases


@dataclass(frozen=True, kw_only=True)
class FoldNorms(Pass):
    """Fold gains and biases of norms into their readers, and three more exact simplifications.

    ``gains``: with gain ``g: [in]`` and bias ``s: [in]`` of a LayerNorm or RMSNorm, and a reader's
    ``W: [out, in]`` and ``b: [out]``::

        W (g * n(x) + s) + b  =  (W * g) n(x) + (W s + b)

    so the norm keeps no parameters, and a linear without a bias gets one only where ``s`` is not
    absent.  A gain written ``1 + w`` is g.

    ``center-readers``: what a LayerNorm without gain and bias gives has mean 0 over its ``in``
    entries, so a linear that reads it computes the same without the mean of each row::

        W n(x)  =  (W P) n(x),   P = 1 - (1/in) 1 1^T

    ``value-bias``: rows of attention weights A sum to 1, so that with values ``V + 1 b_V^T``, heads
    side by side and repeated for grouped heads::

        W_O (A (V + 1 b_V^T))^T + b_O  =  W_O (A V)^T + (W_O b_V + b_O)

    The linear that makes values loses its bias, or the part of it that is theirs.  Cached values
    then lack b_V, too: caches of the program before this pass do not fit the one after it.

    ``center-logits``: the mean over the vocabulary is subtracted from the head's ``W: [vocab, in]``
    and ``b: [vocab]``.  Logits move by one number per token, probabilities do not.

    Products and means are taken in float64 and rounded once.  A weight that several linears share
    stays shared when all of them read the same gain and bias.

    Refuses, as ``missed`` remarks: a norm that anything but a linear reads, such as the residual
    stream of a post-norm block, and norms of queries and keys, which stand behind their linear; a
    reader that is quantised already, since folding would change the grid; a weight that is read
    elsewhere too, such as a tied head, unless ``untie`` says that a copy may be made.
    ``center-readers`` refuses RMSNorms, and norms that kept a gain or a bias.  ``value-bias``
    refuses values that come from anything but one linear through moves of entries, that anything
    else reads, or that attention not written as scaled_dot_product_attention reads; and the cached
    values of an encoder-decoder, which no check covers.  ``center-logits`` refuses logits behind
    anything but the head, moves of rows and factors, such as a soft cap.

    What is judged: everything, as for every pass, but with ``center-logits`` log-probabilities in
    the place of logits, and with ``value-bias`` no cached values, and the other outputs of graphs
    that return such only without a cache and padding: how a cache and padding come out is judged by
    the checks that every pass must pass.  (Positions that are padded and attend to nothing have
    rows that sum to 0; nobody reads them.)

    Attributes:
        gains: fold gains and biases of norms.
        center_readers: subtract the mean of each row from linears that read a LayerNorm.
        value_bias: move the bias of attention's values behind attention.
        center_logits: subtract the mean over the vocabulary from the head.
        untie: give a linear whose weight is read elsewhere a folded copy of its own.

    Source: arXiv 2401.15024 (SliceGPT), section 3, for gains; the others follow from the equations.
    """

    name: ClassVar[str] = "fold-norms"
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    gains: bool = True
    center_readers: bool = False
    value_bias: bool = False
    center_logits: bool = False
    untie: bool = False

    def __post_init__(self) -> None:
        if not (self.gains or self.center_readers or self.value_bias or self.center_logits):
            options = "gains, center-readers, value-bias and center-logits"
            raise ValueError(f"at least one of {options} is true")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Do what the options say, gains first: the others profit from it."""
        remarks: list[Remark] = []
        if self.gains:
            remarks += fold_gains(program, untie=self.untie)
        if self.value_bias:
            remarks += fold_value_biases(program)
        if self.center_readers:
            remarks += center_readers(program, untie=self.untie)
        if self.center_logits:
            remarks += center_logits(program, untie=self.untie)
        return PassResult(program, tuple(remarks))

    def kept(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Leave out what ``value-bias`` moves, and take log-probabilities for moved logits."""
        made = dict(outputs)
        if self.value_bias and any(_is_cached_value(name) for name in made):
            if not _is_plain(inputs):
                return {}
            made = {name: value for name, value in made.items() if not _is_cached_value(name)}
        if self.center_logits and LOGITS in made:
            made[LOGITS] = torch.log_softmax(made[LOGITS], -1)
        return made


def _is_cached_value(output: str) -> bool:
    return output.startswith("present.") and output.endswith(".value")


def _is_plain(inputs: Mapping[str, Tensor]) -> bool:
    """Tell whether there is no cache and no padding."""
    cached = any(v.numel() for n, v in inputs.items() if n.startswith("past_key_values."))
    padded = any(bool((v == 0).any()) for n, v in inputs.items() if "mask" in n)
    return not cached and not padded
