"""Options that several sub-commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SEEDS = 2**32 - 1  # the largest seed that every generator takes

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier run wrote there.")]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read pickled weights, .pt2 files and the factory that a Program folder names; only "
        "from friends.",
    ),
]
Threads = Annotated[
    int, typer.Option(min=0, help="Processor threads; 0 leaves it to the runtime.", metavar="N")
]
Artifact = Annotated[
    Path, typer.Argument(help="A folder that `modelathe run` wrote.", metavar="ARTIFACT")
]
