"""all-MiniLM-L6-v2 in integers, beside what ONNX Runtime's own quantiser makes of it.

    python benchmarks/integers.py [--sentences 100] [--threads 2] [--rounds 40]

``quantize_dynamic`` is given two files: what ``torch.onnx.export`` writes, as its users do, and our
own plain export.  For each file: mean and smallest cosine of the mean-pooled embeddings of
sentences of held-out text to those of the untouched model, megabytes of the file, and times of 128
and of 32 tokens, batch 1, as ratios to fp32 (torch's export) and to its ``quantize_dynamic`` per
channel; below 1 is faster.  Two files take turns, and a ratio is the median over the rounds.
Exits with 1 when ``quantize-activations`` falls below a cosine of 0.997, is larger than 23.3 MB, or
slower than ``quantize_dynamic`` per channel.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from minilm import model_folder, sentences
from numpy.typing import NDArray

from modelathe.backends import Onnx
from modelathe.demo import HELDOUT_TEXT
from modelathe.ir import capture
from modelathe.passes import PassContext, Pipeline

WEIGHTS = "quantize-weights{bits=8 method=rtn group-size=-1 symmetric=true embedding-bits=8}"
ASYMMETRIC = WEIGHTS.replace(" symmetric=true", "")
OURS = {
    "ours: plain export": "",
    "ours: dynamic": f"{WEIGHTS},quantize-activations",
    "ours: dynamic, asymmetric weights": f"{ASYMMETRIC},quantize-activations",
    "ours: dynamic, 7 bits": f"{WEIGHTS},quantize-activations{{bits=7}}",
    "ours: static": f"{WEIGHTS},quantize-activations{{mode=static}}",
    "ours: static in attention": f"{WEIGHTS},quantize-activations{{mode=static "
    'only="attention.*.*"},quantize-activations',
}
CHOSEN, THEIRS, FLOAT = "ours: dynamic", "torch: quantize_dynamic per channel", "torch: fp32"
LENGTHS = (128, 32)


def torch_export(folder: Path) -> Path:
    """Write the model by torch's own exporter, and return the file."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(model_folder(), dtype=torch.float32).eval()
    ids = torch.ones(2, 7, dtype=torch.int64)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    given = {"input_ids": ids, "attention_mask": ids.clone(), "token_type_ids": 0 * ids}
    path = folder / "torch.onnx"
    torch.onnx.export(
        model,
        kwargs=given,
        dynamo=True,
        opset_version=18,
        dynamic_shapes=dict.fromkeys(given, sizes),
        external_data=False,
        verbose=False,
    ).save(str(path))
    return path


def theirs(source: Path, name: str, folder: Path) -> dict[str, Path]:
    """Quantise a file by ONNX Runtime; attention of opset 23 it cannot, and is left alone."""
    from onnxruntime.quantization import quantize_dynamic

    found = {}
    for title, per_channel in (("per tensor", False), ("per channel", True)):
        path = folder / f"{name} {title}.onnx"
        quantize_dynamic(
            source, path, per_channel=per_channel, op_types_to_quantize=["MatMul", "Gemm", "Gather"]
        )
        found[f"{name}: quantize_dynamic {title}"] = path
    return found


def ours(folder: Path) -> dict[str, Path]:
    """Write every pipeline's artifact, checked, and return the files."""
    program = capture(model_folder())
    # calibration text behind the sentences that are judged
    text = "\n".join(HELDOUT_TEXT.read_text(encoding="utf-8").splitlines()[-2000:])
    context = PassContext(calibration=[text], calibration_samples=32, calibration_length=128)
    found = {}
    for number, (title, pipeline) in enumerate(OURS.items()):
        result = Pipeline.parse(pipeline, context=context, check=False)(program)
        Onnx().lower(result.program).save(folder / str(number))
        found[title] = folder / str(number) / "model.onnx"
    return found


class Timed:
    """A file in ONNX Runtime, with bare sessions for all alike."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self.names = {one.name for one in self.session.get_inputs()}
        self.megabytes = path.stat().st_size / 1e6

    def run(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the hidden states of ``ids [1, length]``."""
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
        feeds = {name: value for name, value in given.items() if name in self.names}
        result: NDArray[np.float32] = self.session.run(None, feeds)[0]
        return result

    def seconds(self, ids: NDArray[np.int64]) -> float:
        """Return the time of one run, the least of three."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self.run(ids)
            times.append(time.perf_counter() - start)
        return min(times)


def ratio(one: Timed, other: Timed, length: int, rounds: int) -> float:
    """Return the time of ``one`` divided by that of ``other``."""
    ids = np.arange(1000, 1000 + length, dtype=np.int64)[None]
    found = []
    for number in range(rounds + 1):
        order = (one, other) if number % 2 else (other, one)
        times = {id(each): each.seconds(ids) for each in order}
        found.append(times[id(one)] / times[id(other)])
    return statistics.median(found[1:])


def embeddings(file: Timed, tokens: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Return the unit mean-pooled vectors of texts."""
    pooled = np.stack([file.run(ids)[0].astype(np.float64).mean(0) for ids in tokens])
    result: NDArray[np.float64] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return result


def table(files: Mapping[str, Path], arguments: argparse.Namespace) -> bool:
    """Print the table; tell whether the chosen one is good enough."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    texts = [tokenizer.encode(text).ids for text in sentences(arguments.sentences)]
    tokens = [np.array([ids], dtype=np.int64) for ids in texts]
    opened = {title: Timed(path, arguments.threads) for title, path in files.items()}
    reference = embeddings(opened[FLOAT], tokens)
    good = True
    print(f"{'file':37}  cosine   smallest  MB     " + "".join(_heads()))
    for title, file in opened.items():
        cosines = (embeddings(file, tokens) * reference).sum(1)
        ratios = [
            ratio(file, opened[against], length, arguments.rounds)
            for against in (FLOAT, THEIRS)
            for length in LENGTHS
        ]
        text = "".join(f"{value:10.2f}" for value in ratios)
        quality = f"{cosines.mean():.4f}   {cosines.min():.4f}"
        print(f"{title:37}  {quality}   {file.megabytes:5.1f} {text}", flush=True)
        if title == CHOSEN:
            fast = all(value <= 1 for value in ratios[len(LENGTHS) :])
            good = cosines.mean() >= 0.997 and file.megabytes <= 23.3 and fast
    return good


def _heads() -> list[str]:
    return [
        f"{against}{length:>4}".rjust(10) for against in ("/fp32", "/q.d.") for length in LENGTHS
    ]


def main() -> int:
    """Print the table; return 1 when what is offered as default is not good enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = ours(folder)
        files: dict[str, Any] = {FLOAT: torch_export(folder)}
        files |= theirs(files[FLOAT], "torch", folder)
        files |= theirs(made["ours: plain export"], "ours", folder)
        good = table(files | made, arguments)
    verdict = "is" if good else "is NOT"
    print(f"{CHOSEN}: {verdict} at least 0.997, at most 23.3 MB, at most {THEIRS}'s time")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
