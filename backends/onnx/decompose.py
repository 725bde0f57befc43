"""Calls that nobody translates, taken apart into simpler ones by torch's own decompositions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx


def decompose(node: fx.Node) -> fx.Graph | None:
    """Return a graph that computes a call from ``node.all_input_nodes``; None where there is none.

    Its nodes are typed, under the same symbolic sizes as the call's own inputs.
    """
    table = torch._decomp.decomposition_table
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    if target not in table and not target.has_kernel_for_dispatch_key(key):
        return None
    sources = node.all_input_nodes
    fakes = [source.meta["val"] for source in sources]
    mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)
    if mode is None:
        return None

    def call(*values: Any) -> Any:
        given = dict(zip(sources, values, strict=True))
        args = fx.node.map_arg(node.args, given.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, given.__getitem__)
        return target(*args, **kwargs)

    # of this call only: the rest of the table leads down to primitives that ONNX has no names for
    rules = {target: table[target]} if target in table else {}
    with torch.no_grad(), mode:
        traced = make_fx(call, decomposition_table=rules)(*fakes)
    inner = traced.graph
    same = any(n.target is target for n in inner.nodes if n.op == "call_function")
    return None if same else inner
