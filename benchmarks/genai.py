"""A real client on the demo model: onnxruntime-genai against transformers' own ``generate``.

    python benchmarks/genai.py [--tokens 32]

The float32 ONNX folder, loaded by onnxruntime-genai, must decode greedily the same tokens as
transformers does on the source model, for five prompts; the 4-bit folder must load and generate
there.  Exits with 1 when one of them does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from modelathe.backends import Onnx
from modelathe.demo import MODEL_FOLDER
from modelathe.ir import capture
from modelathe.passes import Pipeline

PROMPTS = (
    "The function returns",
    "This module provides",
    "Raise an exception if",
    "A list of",
    "Return the number of",
)


def with_transformers(count: int) -> dict[str, list[int]]:
    """Return the tokens that the source model generates greedily, by prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generate(ids, max_new_tokens=count, do_sample=False)
        found[prompt] = out[0, ids.shape[1] :].tolist()
    return found


def with_genai(folder: Path, count: int) -> dict[str, list[int]]:
    """Return the tokens that onnxruntime-genai generates greedily from an artifact, by prompt."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + count, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        found[prompt] = [int(token) for token in generator.get_sequence(0)][len(ids) :]
    return found


def main() -> int:
    """Print what agrees; return 1 when something does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32)
    count = parser.parse_args().tokens
    warnings.filterwarnings("ignore")
    program = capture("demo")
    expected = with_transformers(count)
    with tempfile.TemporaryDirectory() as name:
        plain, small = Path(name) / "float32", Path(name) / "int4"
        Onnx(dtype="float32").lower(program).save(plain)
        quantised = Pipeline.parse("fold-norms,quantize-weights{bits=4 group-size=32}")(program)
        Onnx(dtype="float32").lower(quantised.program).save(small)
        found, rough = with_genai(plain, count), with_genai(small, count)
    good = True
    for prompt in PROMPTS:
        same = expected[prompt] == found[prompt]
        near = sum(a == b for a, b in zip(expected[prompt], rough[prompt], strict=False))
        good = good and same and len(rough[prompt]) > 0
        verdict = "same tokens" if same else "OTHER TOKENS"
        print(f"{prompt!r}: float32 {verdict}; 4-bit {len(rough[prompt])} tokens, {near} the same")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
