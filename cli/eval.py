"""``modelathe eval``: how good an artifact is, and how far from the model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AllowPickle, Debug, Json, Threads
from .screen import Screen, figure
from .sources import open_session

_NAMES = {
    "tokens": "tokens",
    "perplexity": "perplexity",
    "reference_perplexity": "reference perplexity",
    "kl": "KL (nats per token)",
    "top1_agreement": "top-1 agreement",
    "lines": "lines",
    "items": "items",
    "cosine": "cosine, mean",
    "cosine_min": "cosine, smallest",
}


def command(
    artifact: Annotated[
        str, typer.Argument(help="An artifact folder, or a model.", metavar="ARTIFACT")
    ],
    text: Annotated[
        Path | None,
        typer.Option(help="Text to measure on; for an encoder-decoder a .jsonl of pairs."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="An .npz with one array per input, for models that read no text."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The reference: a model or an artifact.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Tokens of a window (2048) or line (encoders: 256)."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use the first N tokens only.")
    ] = None,
    threads: Threads = 0,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure an artifact in its own runtime, alone or --against the model it was made from."""
    screen = Screen(as_json=as_json)
    with screen.quiet_libraries(debug=debug):
        session = open_session(artifact, screen, threads=threads, allow_pickle=allow_pickle)
        reference = None
        if against is not None:
            reference = open_session(against, screen, threads=threads, allow_pickle=allow_pickle)
        from ..backends.evaluate import evaluate

        figures = evaluate(
            session,
            text=text,
            data=data,
            against=reference,
            context=context,
            tokens=tokens,
            progress=screen.progress,
        )
    if as_json:
        screen.emit(figures)
    show(screen, figures, f"{artifact} on {text or data}")


def show(screen: Screen, figures: dict[str, Any], title: str) -> None:
    """Print figures by the names that people use."""
    screen.facts({_NAMES[key]: _value(key, value) for key, value in figures.items()}, title)


def _value(key: str, value: Any) -> str | None:
    if value is None:
        return None
    return f"{value:.2%}" if key == "top1_agreement" else figure(value, 5)
