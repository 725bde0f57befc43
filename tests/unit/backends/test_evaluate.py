"""Evaluation against the definitions, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelathe.backends import Onnx
from modelathe.backends.evaluate import evaluate, evaluate_arrays, evaluate_tokens, windows
from modelathe.backends.evaluation_data import item_chunks, read_arrays, read_pairs
from modelathe.backends.program_session import ProgramSession
from modelathe.backends.session import Session, open_artifact
from modelathe.ir import DataError
from support.artifacts import (
    POSITIONS,
    STOP,
    VOCABULARY,
    WORDS,
    expected_logits,
    manifest_fields,
    write_decoder,
)
from support.models import program


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def by_hand(tokens: list[int], window: int) -> dict[str, float]:
    """Return the figures of seed 0 against seed 1, window by window."""
    mine, theirs, targets = [], [], []
    for start in range(0, len(tokens), window):
        row = np.array([tokens[start : start + window]])
        mask = np.ones_like(row)
        mine.append(log_softmax(expected_logits(row, mask, 0)[0, :-1]))
        theirs.append(log_softmax(expected_logits(row, mask, 1)[0, :-1]))
        targets.append(row[0, 1:])
    p, q, t = np.concatenate(theirs), np.concatenate(mine), np.concatenate(targets)
    rows = np.arange(len(t))
    return {
        "tokens": len(t),
        "perplexity": float(np.exp(-q[rows, t].mean())),
        "reference_perplexity": float(np.exp(-p[rows, t].mean())),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).mean()),
    }


TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, 61).tolist()


@pytest.mark.parametrize(("context", "window"), [(7, 7), (None, POSITIONS), (2, 2), (999, 24)])
def test_decoder_figures_are_those_of_the_definition(
    toy: Path, other: Path, context: int | None, window: int
) -> None:
    found = evaluate_tokens(open_artifact(toy), TOKENS, open_artifact(other), context)
    expected = by_hand(TOKENS, window)
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


def test_a_model_against_itself_is_exactly_itself(toy: Path) -> None:
    session = open_artifact(toy)
    found = evaluate_tokens(session, TOKENS, session)
    assert found["kl"] == 0.0
    assert found["top1_agreement"] == 1.0
    assert found["perplexity"] == found["reference_perplexity"]


def test_without_a_reference_the_distances_are_none(toy: Path) -> None:
    found = evaluate_tokens(open_artifact(toy), TOKENS)
    assert found["perplexity"] > 1
    assert [found[key] for key in ("reference_perplexity", "kl", "top1_agreement")] == [None] * 3


def test_a_text_file_is_tokenised_and_cut(toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[token] for token in TOKENS[:40]))
    session = open_artifact(toy)
    assert evaluate(session, text=path) == evaluate_tokens(session, TOKENS[:40])
    assert evaluate(session, text=path, tokens=9) == evaluate_tokens(session, TOKENS[:9])


def test_documents_are_told_apart_by_the_end_of_text(toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("a b", "c d")))
    session = open_artifact(toy)
    assert evaluate(session, text=path) == evaluate_tokens(session, [0, 1, STOP, 2, 3])


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.asarray(TOKENS))
    session = open_artifact(write_decoder(tmp_path / "bare", tokenizer=False))
    assert evaluate(session, text=tmp_path / "ids.npy") == evaluate_tokens(session, TOKENS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\xfa", "not UTF-8"),
        (b"  \n", "no text"),
        (b"a", "at least 2"),
    ],
)
def test_text_that_cannot_be_used_is_refused(
    toy: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        evaluate(open_artifact(toy), text=path)
    assert error.value.remedy


def test_text_is_asked_for_by_the_option_that_gives_it(toy: Path) -> None:
    with pytest.raises(DataError) as error:
        evaluate(open_artifact(toy))
    assert "--text" in error.value.remedy


def test_a_window_of_one_token_predicts_nothing() -> None:
    assert [ids.shape for ids in windows(list(range(9)), 4)] == [(1, 4), (1, 4)]
    with pytest.raises(DataError, match="at least 2"):
        evaluate_tokens(Plain("encoder", lambda feeds: feeds), [1])


class Plain(Session):
    """A session that computes with a Python function."""

    def __init__(self, kind: str, function: Any, shape: tuple[int | str, ...] = ("b", 2)) -> None:
        entry = {"name": "x", "dtype": "float32", "shape": list(shape)}
        signature = {"inputs": [entry], "outputs": [{**entry, "name": "y"}]}
        fields = manifest_fields(kind=kind, signatures={"main": signature})
        super().__init__(Path("plain"), fields, {})
        self.function = function

    def _execute(self, graph: str, feeds: Any, sizes: Any) -> dict[str, Any]:
        return {"y": self.function(feeds["x"])}

    def _to_runtime(self, array: Any) -> Any:
        return array

    def _to_numpy(self, value: Any) -> Any:
        return value

    def _zeros(self, spec: Any, shape: Any) -> Any:
        raise NotImplementedError


def test_arrays_are_compared_item_by_item() -> None:
    items = np.array([[1, 0], [0, 2], [3, 3]], dtype=np.float32)
    turned = Plain("module", lambda x: x[:, ::-1])
    found = evaluate_arrays(Plain("module", lambda x: x), {"x": items}, turned)
    assert found == {"items": 3, "cosine": pytest.approx(1 / 3), "cosine_min": 0.0}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_each_artifact_is_given_arrays_of_its_own_dtype(dtype: str, tmp_path: Path) -> None:
    wide = ProgramSession.of(program("norm-linears"))
    folder = tmp_path / "narrow"
    Onnx(dtype=dtype).lower(program("norm-linears"), check=False).save(folder)
    items = np.random.default_rng(0).standard_normal((2, *wide.graphs["main"].inputs[0].shape))
    for pair in ((open_artifact(folder), wide), (wide, open_artifact(folder))):
        assert 0.99 < evaluate_arrays(pair[0], {"x": items}, pair[1])["cosine_min"] < 1


@pytest.mark.parametrize(
    ("shape", "given", "chunks"),
    [
        (("b", 2), (3, 2), [(1, 2)] * 3),
        ((2, 2), (4, 2), [(2, 2)] * 2),
        ((2,), (3, 2), [(2,)] * 3),
    ],
)
def test_items_are_fed_as_the_graph_takes_them(
    shape: tuple[int | str, ...], given: tuple[int, ...], chunks: list[tuple[int, ...]]
) -> None:
    session = Plain("module", lambda x: x, shape)
    fed = [feeds["x"].shape for feeds, _ in item_chunks(session, "main", {"x": np.ones(given)})]
    assert fed == chunks


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.ones((1, 2))}, "the arrays lack x"),
        ({"x": np.ones((3, 2))}, "3 items do not fill batches of 2"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(item_chunks(Plain("module", lambda x: x, (2, 2)), "main", arrays))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((3, 3), np.float32), r"x has sizes \[1, 3\], and the model takes \[b, 2\]"),
        (np.ones(3, np.float32), r"x has sizes \[1\]"),
        (np.array([["a", "b"]]), "x is <U1, and the model takes float32"),
    ],
)
def test_arrays_of_other_sizes_or_dtypes_are_refused(array: Any, message: str) -> None:
    session = Plain("module", lambda x: x)
    with pytest.raises(DataError, match=message) as error:
        evaluate_arrays(session, {"x": array}, session)
    assert error.value.remedy


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_an_id_without_an_embedding_is_refused(token: int, toy: Path) -> None:
    with pytest.raises(DataError, match=f"id {token}, and .* ids from 0 and below {VOCABULARY}"):
        evaluate_tokens(open_artifact(toy), [1, token])


@pytest.mark.parametrize(
    ("kind", "given", "unread"),
    [
        ("decoder", {"text": "t", "data": "d"}, "--data .* kind decoder"),
        ("encoder", {"text": "t", "tokens": 3}, "--tokens .* kind encoder"),
        ("encoder", {"data": "d", "context": 3}, "--context .* arrays"),
        ("module", {"data": "d", "text": "t"}, "--text .* arrays"),
        ("vision", {"data": "d", "tokens": 3}, "--tokens .* arrays"),
    ],
)
def test_an_argument_that_would_be_ignored_is_refused(
    kind: str, given: dict[str, Any], unread: str
) -> None:
    with pytest.raises(DataError, match=unread) as error:
        evaluate(Plain(kind, lambda x: x), **given)
    assert "leave it out" in error.value.remedy


def test_a_reference_of_another_kind_is_refused(toy: Path) -> None:
    with pytest.raises(DataError, match="kind decoder, the reference of kind module"):
        evaluate(open_artifact(toy), against=Plain("module", None), text=Path("x.txt"))


def test_figures_that_are_distances_need_a_reference(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((2, 2)))
    with pytest.raises(DataError) as error:
        evaluate(Plain("module", None), data=tmp_path / "x.npz")
    assert "--against" in error.value.remedy


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"not an \.npz file of plain arrays"):
        read_arrays(tmp_path / "x.npz")
    cut = (tmp_path / "x.npz").read_bytes()[:-30]
    (tmp_path / "x.npz").write_bytes(cut)
    with pytest.raises(DataError, match=r"not an \.npz file of plain arrays"):
        read_arrays(tmp_path / "x.npz")


def test_pairs_are_read_and_mistakes_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    good = {"source": "a", "target": "b"}
    path.write_text(json.dumps(good) + "\n\n" + json.dumps({"source": "a"}))
    with pytest.raises(DataError, match="line 3 has no source and target"):
        read_pairs(path)
    path.write_text(json.dumps(good) + "\n")
    assert read_pairs(path) == [("a", "b")]
