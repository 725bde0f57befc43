"""What evaluation reads besides text: pairs of texts, and arrays."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.errors import DataError
from .session import Array, Session

_PAIR = 'each line is {"source": "...", "target": "..."}'


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Return (source, target) of each line of a ``.jsonl`` file.

    Raises:
        DataError: a line is not a JSON object with these two texts.
    """
    pairs = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 (byte {error.start})", remedy="save it as UTF-8"
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise _bad_pair(path, number, f"is not JSON ({error})") from error
        texts = [entry.get(k) if isinstance(entry, dict) else None for k in ("source", "target")]
        if not all(isinstance(text, str) for text in texts):
            raise _bad_pair(path, number, "has no source and target")
        pairs.append((str(texts[0]), str(texts[1])))
    if not pairs:
        raise DataError(f"{path}: holds no pairs", remedy=_PAIR)
    return pairs


def read_arrays(path: Path) -> dict[str, Array]:
    """Return the arrays of an ``.npz`` file; a pickled one is refused.

    Raises:
        DataError: it is no such file.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: is not an .npz file of plain arrays",
            remedy="write one with numpy.savez(path, input_name=array, ...)",
        ) from error


def item_chunks(
    session: Session, graph: str, arrays: Mapping[str, Array]
) -> Iterator[tuple[dict[str, Array], int]]:
    """Yield (inputs, items in them): one item at a time, or as many as a fixed batch size asks.

    Raises:
        DataError: a missing array, different numbers of items, or a remainder of a fixed batch.
    """
    specs = session.graphs[graph].inputs
    if missing := [spec.name for spec in specs if spec.name not in arrays]:
        raise DataError(
            f"the arrays lack {', '.join(missing)}",
            remedy=f"the inputs are {', '.join(spec.name for spec in specs)}",
        )
    counts = {len(arrays[spec.name]) if arrays[spec.name].ndim else 0 for spec in specs}
    if len(counts) != 1:
        raise DataError(
            f"the arrays have different numbers of items: {', '.join(map(str, sorted(counts)))}",
            remedy="put the items along the first axis of each array",
        )
    # An array with one axis more than the input holds whole inputs, one per item.
    stacked = all(arrays[spec.name].ndim == len(spec.shape) + 1 for spec in specs)
    sizes = {d for spec in specs if isinstance(d := next(iter(spec.shape), 1), int)}
    step = 1 if stacked or len(sizes) != 1 else sizes.pop()
    (count,) = counts
    if count % step:
        raise DataError(
            f"{count} items do not fill batches of {step}, which the model was captured with",
            remedy="give a multiple of it, or capture the model with a dynamic batch",
        )
    for start in range(0, count, step):
        place: Any = start if stacked else slice(start, start + step)
        yield {spec.name: arrays[spec.name][place] for spec in specs}, step


def _bad_pair(path: Path, number: int, problem: str) -> DataError:
    return DataError(f"{path}: line {number} {problem}", remedy=_PAIR)
