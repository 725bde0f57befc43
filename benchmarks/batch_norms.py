"""Batch norms folded into convolutions: what is left, what moves, and what it saves.

    python benchmarks/batch_norms.py [--repeats 31] [--image 128]

ResNet-18 and MobileNetV2 from transformers, with random weights and perturbed statistics, exported
to ONNX as they are and after ``fold-batch-norms``.  For each: batch norms in the graph and in the
file before and after, the largest difference of the logits relative to the largest logit, and
latency of the folded file over that of the plain one, as the median of paired ratios in one run
(below 1 is faster).

ONNX Runtime folds batch norms itself when it opens a file, at its default settings.  So the second
ratio is expected to be 1, and is the honest one for a user of the default; the first, with graph
optimisation off, is what a runtime that does not fold gains; the third is the time to open the file
at the default.  Exits with 1 when a batch norm is left or the logits move by more than 1e-5.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from modelathe.backends import Onnx
from modelathe.ir import BatchNorm, Program, capture
from modelathe.passes import Pipeline

_RESNET_18 = {
    "layer_type": "basic",
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [64, 128, 256, 512],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet-18": ("resnet", _RESNET_18),
    "mobilenet-v2": ("mobilenet_v2", {}),
}
LIMIT = 1e-5
LEVELS = onnxruntime.GraphOptimizationLevel


def model(name: str, image: int) -> nn.Module:
    """Return a model whose batch norms do something."""
    import transformers

    kind, options = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, image_size=image, **options)
    made: nn.Module = transformers.AutoModelForImageClassification.from_config(config).eval()
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(std=0.1)
                part.running_var.uniform_(0.5, 2)
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(std=0.1)
    return made


def opened(path: Path, level: Any) -> Any:
    """Return a session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ratio(first: Callable[[], object], second: Callable[[], object], repeats: int) -> float:
    """Return how long the first takes over the second: the median of pairs, taking turns."""
    pairs = []
    for number in range(repeats + 1):
        order = (first, second) if number % 2 else (second, first)
        seconds = {}
        for call in order:
            start = time.perf_counter()
            call()
            seconds[call] = time.perf_counter() - start
        pairs.append(seconds[first] / seconds[second])
    return statistics.median(pairs[1:])


def batch_norms(program: Program) -> int:
    """Return how many batch norms a program has."""
    return sum(BatchNorm.match(node) is not None for node in program.graph.nodes)


def file_norms(path: Path) -> int:
    """Return how many batch norms a file has."""
    graph = onnx.load(path, load_external_data=False).graph
    return sum(node.op_type == "BatchNormalization" for node in graph.node)


def row(name: str, image: int, repeats: int, folder: Path) -> bool:
    """Print the figures of one model; return whether nothing is left and nothing moved."""
    plain = capture(model(name, image))
    folded = Pipeline.parse("fold-batch-norms")(plain).program
    paths = []
    for title, program in (("plain", plain), ("folded", folded)):
        Onnx().lower(program).save(folder / title)
        paths.append(folder / title / "model.onnx")
    x = torch.randn(1, 3, image, image, generator=torch.Generator().manual_seed(0)).numpy()
    ratios, error = [], 0.0
    for level in (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL):
        before, after = (opened(path, level) for path in paths)

        def run(session: Any) -> Any:
            return session.run(None, {session.get_inputs()[0].name: x})[0]

        expected, found = run(before), run(after)
        error = max(error, float(np.abs(expected - found).max() / np.abs(expected).max()))
        ratios.append(ratio(lambda s=after: run(s), lambda s=before: run(s), repeats))
    openings = [lambda path=path: opened(path, LEVELS.ORT_ENABLE_ALL) for path in paths]
    ratios.append(ratio(openings[1], openings[0], max(5, repeats // 3)))
    graph, file = batch_norms(folded), file_norms(paths[1])
    print(
        f"{name:13} {batch_norms(plain):4} -> {graph}   {file_norms(paths[0]):4} -> {file}   "
        f"{error:.1e}   {ratios[0]:8.2f}   {ratios[1]:10.2f}   {ratios[2]:5.2f}",
        flush=True,
    )
    return not graph and not file and error <= LIMIT


def main() -> int:
    """Print the table; return 1 when something is left or moves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--image", type=int, default=128)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    print("model         in the graph   in the file   error   as it is   at default   opening")
    good = True
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            good &= row(name, arguments.image, arguments.repeats, Path(folder))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
