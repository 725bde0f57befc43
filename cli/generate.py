"""``modelathe generate``: continue a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import SEEDS, AllowPickle, Debug, Json, Threads
from .screen import Screen
from .sources import open_session

if TYPE_CHECKING:
    from ..passes.tokenizer import Tokenizer


def command(
    artifact: Annotated[
        str, typer.Argument(help="An artifact folder, or a model.", metavar="ARTIFACT")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=0, metavar="N", help="Stop after N.")] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="T", help="Sample; the higher, the further it strays."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Sample among the K most likely tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Sample among the most likely share P.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=SEEDS, metavar="S", help="Equal seeds give equal samples."),
    ] = None,
    threads: Threads = 0,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue PROMPT in the artifact's own runtime: greedily, or sampled by option."""
    sampled = _sampled(temperature, top_k, top_p, seed)
    screen = Screen(as_json=as_json)
    with screen.quiet_libraries(debug=debug):
        session = open_session(artifact, screen, threads=threads, allow_pickle=allow_pickle)
        from ..backends.generate import Sampling, generate
        from ..passes.tokenizer import open_tokenizer

        tokenizer = open_tokenizer(session.folder)
        ids = tokenizer.encode(prompt)
        writer = _Writer(screen, tokenizer, ids if session.kind == "decoder" else [])
        (tokens,) = generate(
            session,
            [ids],
            max_new_tokens=max_new_tokens,
            sampling=Sampling(**sampled),
            on_token=lambda _, token: writer.add(token),
        )
        writer.end()
    if as_json:
        screen.emit({"tokens": tokens, "text": tokenizer.decode(tokens), "prompt_tokens": ids})


def _sampled(
    temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
) -> dict[str, Any]:
    """Return the options of sampling that were given; none of them is ever ignored."""
    given = {"top_k": top_k, "top_p": top_p, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None}
    if top_p is not None and not 0 < top_p <= 1:
        raise typer.BadParameter(f"--top-p is above 0 and at most 1, got {top_p}")
    if temperature == 0 and options:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise typer.BadParameter(f"{names} changes nothing at temperature 0")
    if temperature is None and not options:
        return {}
    return {"temperature": 1.0 if temperature is None else temperature, **options}


class _Writer:
    """Shows the text as it grows; ids are turned to text together, since letters may span ids."""

    def __init__(self, screen: Screen, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._screen, self._tokenizer = screen, tokenizer
        self._ids = list(prompt)
        self._shown = 0
        self._show()

    def add(self, token: int) -> None:
        self._ids.append(token)
        self._show()

    def end(self) -> None:
        self._show(last=True)
        self._screen.say("")

    def _show(self, *, last: bool = False) -> None:
        if self._screen.as_json:
            return
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return  # the rest of this letter is in the next token
        self._screen.out.print(text[self._shown :], end="", markup=False, soft_wrap=True)
        self._screen.out.file.flush()
        self._shown = len(text)
