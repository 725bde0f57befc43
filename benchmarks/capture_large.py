"""Capture a model larger than the memory it may take: 6.7 B, llama-shaped, bfloat16.

    python benchmarks/capture_large.py [FOLDER] [--keep]

Writes a model folder of 13.5 GB (random weights; the same 64 MB of random numbers over and over,
since nothing looks at them), then measures ``modelathe inspect`` as a whole process, and
``capture`` in this one: seconds, and the peak of anonymous memory (mapped files do not count: the
system takes their pages back when it needs them).
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

HIDDEN, INNER, BLOCKS, VOCABULARY = 4096, 11008, 32, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def shapes() -> dict[str, list[int]]:
    """Return every tensor of the checkpoint."""
    found = {
        "model.embed_tokens.weight": [VOCABULARY, HIDDEN],
        "lm_head.weight": [VOCABULARY, HIDDEN],
        "model.norm.weight": [HIDDEN],
    }
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}."
        for name in ("q", "k", "v", "o"):
            found[f"{prefix}self_attn.{name}_proj.weight"] = [HIDDEN, HIDDEN]
        for name, shape in (
            ("gate", [INNER, HIDDEN]),
            ("up", [INNER, HIDDEN]),
            ("down", [HIDDEN, INNER]),
        ):
            found[f"{prefix}mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{name}.weight"] = [HIDDEN]
    return found


def write_model(folder: Path) -> int:
    """Write config.json and model.safetensors; return the bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    header, offset = {}, 0
    for name, shape in shapes().items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 25).astype(np.float32)
    chunk = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bfloat16 by truncation
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        left = offset
        while left:
            left -= file.write(chunk[: min(left, len(chunk))])
    return offset


def anonymous_bytes(pid: int | str) -> int:
    """Return the anonymous memory that a process holds."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class Watch:
    """Follows the anonymous memory of a process; ``peak`` is in bytes."""

    def __init__(self, pid: int | str = "self") -> None:
        self.pid, self.peak, self._over = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        while not self._over.wait(0.02):
            self.peak = max(self.peak, anonymous_bytes(self.pid))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def main() -> int:
    """Print both figures; return 1 when one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="where to write the model")
    parser.add_argument("--keep", action="store_true", help="leave the model there")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="large-"))
    try:
        size = write_model(folder)
        print(f"model folder: {size / 1e9:.1f} GB of weights")
        started = time.perf_counter()
        command = [sys.executable, "-m", "modelathe.cli", "inspect", str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with Watch(process.pid) as watch:
            status = process.wait()
        inspect = time.perf_counter() - started
        print(f"inspect: {inspect:.1f} s, peak {watch.peak / 1e9:.2f} GB anonymous, exit {status}")
        from modelathe.ir import capture

        started = time.perf_counter()
        with Watch() as here:
            program = capture(folder)
        seconds = time.perf_counter() - started
        nodes = len(program.graph.nodes)
        print(f"capture: {seconds:.1f} s, peak {here.peak / 1e9:.2f} GB anonymous, {nodes} nodes")
        good = status == 0 and max(inspect, seconds) < 60 and max(watch.peak, here.peak) < 1.5e9
        print("both under 60 s and 1.5 GB" if good else "over a limit (60 s, 1.5 GB)")
        return 0 if good else 1
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
