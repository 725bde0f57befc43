"""How fast a decoder in a few bits is in ONNX Runtime, against its own float32 export.

    python benchmarks/decode.py [--skip-large]

For the demo model and for a random llama shape of 88 M parameters (12 blocks, 768 wide): rates of
prefill and of decoding as ratios to the plain export in the same run (above 1 is faster, medians of
alternating rounds), and megabytes.  Small models are bound by what each node costs, not by the
bytes that it reads.  Exits with 1 when 4 bits decode less than 3 times (88 M) or 1.3 times (demo)
as fast.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from modelathe.backends import Onnx, open_artifact
from modelathe.backends.bench import bench
from modelathe.backends.manifest import model_bytes
from modelathe.ir import Program, capture
from modelathe.passes import Pipeline

FOUR = "fold-norms,quantize-weights{bits=4 group-size=32}"
PIPELINES = {
    "4 bits": FOUR,
    "8 bits": "fold-norms,quantize-weights{bits=8 group-size=32}",
    "cache in 4 bits": "quantize-cache{key-bits=4 value-bits=4}",
    "cache in 8 bits": "quantize-cache{key-bits=8 value-bits=8}",
}
AT_LEAST = {"demo": 1.3, "88 M": 3.0}


def large_folder(place: Path) -> Path:
    """Write the random model of 88 M parameters, and return its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=16384,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def rates(name: str, program: Program, place: Path) -> float:
    """Print one line per pipeline; return how many times as fast 4 bits decode."""
    Onnx().lower(program, check=False).save(place / "plain")
    plain = open_artifact(place / "plain")
    found = 0.0
    for number, (title, text) in enumerate(PIPELINES.items()):
        result = Pipeline.parse(text, check=False)(program)
        manifest = Onnx().lower(result.program, check=False).save(place / str(number))
        ratio = bench(open_artifact(place / str(number)), plain, memory=False)["ratio"]
        print(
            f"{name:6} {title:16} {ratio['prefill']:8.2f} {ratio['decode']:8.2f} "
            f"{model_bytes(manifest) / 1e6:8.1f}",
            flush=True,
        )
        found = ratio["decode"] if text == FOUR else found
    return found


def main() -> int:
    """Print the table; return 1 when 4 bits decode slower than ``AT_LEAST``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip-large", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    good = True
    print("model  pipeline          prefill   decode       MB")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        found = {"demo": rates("demo", capture("demo"), place / "demo")}
        if not arguments.skip_large:
            program = capture(large_folder(place / "source"))
            found["88 M"] = rates("88 M", program, place / "large")
    for name, ratio in found.items():
        good = good and ratio >= AT_LEAST[name]
        print(f"{name}: 4 bits decode {ratio:.2f} times as fast (at least {AT_LEAST[name]})")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
