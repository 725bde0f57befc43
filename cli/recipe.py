"""The pipeline text of ``-p``: written out, or ``@FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PipelineText = Annotated[
    str | None,
    typer.Option(
        "-p",
        "--passes",
        metavar="TEXT|@FILE",
        help='Passes in a row, such as "fold-norms,quantize-weights{bits=4}", or @recipe.txt.',
    ),
]


def pipeline_text(given: str | None) -> str:
    """Return the text of a pipeline; a recipe file is the same text on several lines.

    Raises:
        DataError: the recipe file is not UTF-8.
        OSError: it cannot be read.
    """
    if given is None or not given.startswith("@"):
        return given or ""
    path = Path(given[1:])
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        from ..ir.errors import DataError

        raise DataError(f"{path}: is not UTF-8 text", remedy="save it as UTF-8") from error
