"""The embedded demo model is small, loads, and is as good as its training record says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modelathe.demo import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_FOLDER
from modelathe.demo.corpus import HELD_OUT_MODULES, Corpus, collect, comments
from modelathe.demo.network import bits_per_byte, chunked_attention, make_model

BYTES_IN_PACKAGE = 8_000_000
WINDOWS = 8
LONG = "A paragraph that is long enough to count as a leak when both halves of the text hold it."


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return dict(json.loads((MODEL_FOLDER / "training.json").read_text(encoding="utf-8")))


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    files = {
        "json/__init__.py": f'"""Held out.\n\n{LONG}\n"""',
        "json/decoder.py": 'def decode():\n    """Decode it."""',
        "_json.py": '"""The accelerator of a held-out module."""',
        "test/test_json/test_pass.py": '"""The test of a held-out module."""',
        "wave.py": f'"""Waves."""\ndef f():\n    """Copied text.\n\n    {LONG}\n    """',
        "waves.py": '"""Waves."""\nclass C:\n    """More of them."""',
        "site-packages/numpy.py": '"""Not of the standard library."""',
        "broken.py": "def (",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def passages(corpus: Corpus) -> tuple[list[str], list[str]]:
    training = [text for document in corpus.training for text in document.passages]
    return training, [text for document in corpus.held_out for text in document.passages]


def test_a_held_out_module_leaves_no_trace_in_the_training_text(stdlib: Path) -> None:
    training, held_out = passages(collect(stdlib, ["json"]))
    assert training == ["Waves.", "More of them."]  # without the copied paragraph
    assert held_out == [f"Held out.\n\n{LONG}", "Decode it."]


def test_a_held_out_module_is_training_text_when_another_is_held_out(stdlib: Path) -> None:
    training, held_out = passages(collect(stdlib, ["wave"]))
    assert "Decode it." in training
    assert held_out == ["Waves.", f"Copied text.\n\n{LONG}"]


def test_the_corpus_is_the_same_every_time(stdlib: Path) -> None:
    assert collect(stdlib) == collect(stdlib)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "# The buffer is read again here since the peer may have\n# closed it in between.\n",
            ["The buffer is read again here since the peer may have\nclosed it in between."],
        ),
        ("x = 1  # the buffer is read again here since the peer may have closed its end\n", []),
        ("# if x[0] == y[1]: return {x: y for (x, y) in z} or x[0] if y else not z in w\n", []),
        ("# too short\n", []),
    ],
)
def test_comments_are_taken_when_they_read_as_prose(source: str, expected: list[str]) -> None:
    assert list(comments(source.encode())) == expected


def test_the_data_fit_in_the_package() -> None:
    files = [*MODEL_FOLDER.iterdir(), HELDOUT_TEXT, CALIBRATION_TEXT]
    assert sum(path.stat().st_size for path in files) < BYTES_IN_PACKAGE


def test_the_record_is_of_the_modules_and_the_text_in_the_package(record: dict[str, Any]) -> None:
    assert record["held_out_modules"] == list(HELD_OUT_MODULES)
    text = HELDOUT_TEXT.read_text(encoding="utf-8").removesuffix("\n").encode()
    assert record["corpus"]["held_out"]["sha256"] == hashlib.sha256(text).hexdigest()


def test_the_model_needs_as_few_bits_as_its_record_says(record: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    text = HELDOUT_TEXT.read_text(encoding="utf-8")
    bits = bits_per_byte(model, tokenizer, text, record["settings"]["context"], limit=WINDOWS)
    # Not the whole text, for speed.  The 8 windows are an easier or a harder stretch: 10 %.
    assert bits < 1.1 * record["curve"][-1]["held_out_bits_per_byte"]


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_attention_in_chunks_is_attention(shape: Any) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register("chunked", chunked_attention)
    torch.manual_seed(0)
    model = make_model(shape, context=256).eval()
    ids = torch.randint(0, 2048, (2, 200))  # a whole chunk and a part of one
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(ids).logits
        model.set_attn_implementation("chunked")
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
