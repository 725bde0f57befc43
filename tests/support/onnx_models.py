"""Programs emitted as ONNX and run in ONNX Runtime, without a folder."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from modelathe.ir import MAIN, Program


def emitted(program: Program, graph: str = MAIN, **options: Any) -> Any:
    """Return a graph as an onnx_ir model; quantised products compute in float32."""
    from modelathe.backends.onnx.emit import emit

    options = {"accuracy_level": 1, **options}
    signature = program.signatures[graph]
    return emit(program.graphs[graph], signature, program.weights, **options)


def opened(model: Any) -> Any:
    """Return an ONNX Runtime session that prints its warnings to nobody and fails on errors."""
    import onnx_ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = onnx_ir.to_proto(model)
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def ran(session: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a session and return its outputs by name."""
    arrays = {name: value.numpy() for name, value in inputs.items()}
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, arrays)
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def operators(model: Any) -> Counter[str]:
    """Return how often each operator occurs."""
    return Counter(node.op_type for node in model.graph)
