"""An artifact opened in its own runtime: numpy arrays in, numpy arrays out."""

from __future__ import annotations

import functools
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..ir.config import max_length, vocab_size
from ..ir.errors import DataError, StorageError
from ..passes.progress import Progress, SilentProgress
from ..passes.spec import class_called
from .manifest import read_manifest
from .signatures import TOKEN_INPUTS, DecoderPlan, GraphSpec, TensorSpec

if TYPE_CHECKING:
    from .base import Backend

Array = NDArray[Any]
Tokens = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cache:
    """What a decoder remembers between two steps; tensors are the runtime's own.

    ``state`` is None before the first step.  ``tokens`` is kept only for graphs without a cache,
    which are given the whole text each time.
    """

    state: Mapping[str, Any] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    tokens: Tokens | None = None


class Session(ABC):
    """An artifact that is ready to run.

    Attributes:
        name: what messages call it: its folder, or the model that it is of.
        manifest: its manifest.
        config: the model's configuration, as the artifact has it.
        graphs: what each graph takes and gives.
        settings: the runtime's name, version and settings, for reports.
        codes: what activations were rounded to in the last run, uint8, by the name of the call that
            rounds; empty unless the session was opened to tell.
    """

    settings: dict[str, Any]

    def __init__(
        self, folder: Path | None, manifest: Mapping[str, Any], config: dict[str, Any]
    ) -> None:
        self._folder = folder
        self.name = str(folder or manifest["model"])
        self.manifest = manifest
        self.config = config
        self.codes: Mapping[str, Array] = {}
        self.graphs = {
            name: GraphSpec.parse(signature) for name, signature in manifest["signatures"].items()
        }

    @property
    def folder(self) -> Path:
        """The artifact, or where the model in memory came from.

        Raises:
            DataError: it came from no folder.
        """
        if self._folder is None:
            raise DataError(
                f"{self.name}: comes from no folder, so it has no tokenizer",
                remedy="give a model folder, or an artifact with the tokenizer's files in it",
            )
        return self._folder

    @functools.cached_property
    def generation(self) -> dict[str, Any]:
        """The model's generation settings; empty where it has none."""
        return {} if self._folder is None else read_config(self._folder, "generation_config.json")

    @property
    def kind(self) -> str:
        """``decoder``, ``encoder``, ``encoder-decoder``, ``vision`` or ``module``."""
        return str(self.manifest["kind"])

    @property
    def max_length(self) -> int | None:
        """Longest text in tokens that the model has positions for; None when it has no limit."""
        return max_length(self.config)

    @property
    def vocab_size(self) -> int | None:
        """How many tokens the model knows; None when its configuration does not say."""
        return vocab_size(self.config)

    @property
    def plan(self) -> DecoderPlan:
        """How the decoder graph is driven.

        Raises:
            DataError: the artifact has no decoder.
        """
        if self.kind not in ("decoder", "encoder-decoder"):
            raise DataError(
                f"{self.name}: is {_article(self.kind)}, which cannot generate text",
                remedy="give an artifact of a decoder or an encoder-decoder",
            )
        graph = "main" if self.kind == "decoder" else "decoder"
        return DecoderPlan.of(graph, self.graphs[graph])

    def run(self, feeds: Mapping[str, Array], graph: str = "main") -> dict[str, Array]:
        """Run one graph on arrays named as its inputs and return its outputs by name.

        Raises:
            DataError: ``feeds`` lacks an input or has one that the graph does not know, or one has
                a dtype, sizes or token ids that it does not take.
        """
        results = self._execute(graph, self._given(graph, feeds), {})
        return {name: self._to_numpy(value) for name, value in results.items()}

    def _given(self, graph: str, feeds: Mapping[str, Array]) -> dict[str, Any]:
        """Return the inputs of a graph as the runtime's own tensors, in the dtypes that it takes.

        Raises:
            DataError: as ``run``.
        """
        spec = self.graphs[graph]
        expected = {one.name for one in spec.inputs}
        if expected != set(feeds):
            missing, extra = sorted(expected - set(feeds)), sorted(set(feeds) - expected)
            what = [f"lacks {', '.join(missing)}"] if missing else []
            what += [f"has no input named {', '.join(extra)}"] if extra else []
            raise DataError(
                f"graph {graph} {' and '.join(what)}",
                remedy=f"the inputs are {', '.join(one.name for one in spec.inputs)}",
            )
        arrays = {one.name: _fitting(one, feeds[one.name]) for one in spec.inputs}
        for name in TOKEN_INPUTS:
            if name in arrays:
                self._check_tokens(arrays[name])
        return {name: self._to_runtime(array) for name, array in arrays.items()}

    def encode(self, feeds: Mapping[str, Array]) -> Cache:
        """Run the encoder of an encoder-decoder once; its result starts a decoder's cache."""
        plan = self.plan
        own = self._given("encoder", feeds)
        results = self._execute("encoder", own, {})
        fixed = {}
        for spec in plan.fixed:
            source = results if spec.name in results else own
            fixed[spec.name] = source[spec.name]
        return Cache(fixed=fixed)

    def decode(
        self, tokens: Tokens, mask: Tokens, cache: Cache | None = None
    ) -> tuple[NDArray[np.float32], Cache]:
        """Run the decoder on new tokens and return their logits and the cache for the next step.

        Args:
            tokens: ``[b, s]``, new tokens only.
            mask: ``[b, past + s]``, 0 at padding (on the left), 1 elsewhere, for all tokens so far.
            cache: what the last step returned; None to begin (an encoder-decoder begins with
                ``encode``).

        Returns:
            logits ``[b, s, vocab]``, and the cache.
        """
        plan, cache = self.plan, cache or Cache()
        self._check_tokens(tokens)
        if not plan.state:
            return self._decode_again(plan, tokens, mask, cache)
        feeds = {name: self._to_runtime(array) for name, array in _feeds(plan, tokens, mask)}
        state = cache.state or self._empty_state(plan, tokens.shape[0])
        sizes = {"batch": tokens.shape[0], "sequence": tokens.shape[1], "past": mask.shape[1]}
        sizes["past"] -= tokens.shape[1]
        results = self._execute(plan.graph, {**feeds, **state, **cache.fixed}, sizes)
        logits = self._to_numpy(results[self.graphs[plan.graph].outputs[0].name])
        following = {before.name: results[after.name] for before, after in plan.state}
        return logits.astype(np.float32, copy=False), replace(cache, state=following)

    def _check_tokens(self, tokens: Array) -> None:
        """Refuse ids that the model has no embedding for: a runtime would fail, or read elsewhere.

        ONNX counts negative ones from the end.

        Raises:
            DataError: there is one.
        """
        size = self.vocab_size
        if not tokens.size:
            return
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or (size is not None and most >= size):
            known = "from 0" if size is None else f"from 0 and below {size}"
            raise DataError(
                f"token id {least if least < 0 else most}, and the model knows ids {known}",
                remedy="use ids made by this model's own tokenizer",
            )

    def state_arrays(self, cache: Cache) -> dict[str, Array]:
        """Return what a decoder remembers, by the names of the outputs that held it."""
        state = cache.state or {}
        return {
            after.name: self._to_numpy(state[before.name])
            for before, after in self.plan.state
            if before.name in state
        }

    def _decode_again(
        self, plan: DecoderPlan, tokens: Tokens, mask: Tokens, cache: Cache
    ) -> tuple[NDArray[np.float32], Cache]:
        """Run a graph without a cache on all tokens so far."""
        past = cache.tokens
        text = tokens if past is None else np.concatenate([past, tokens], axis=1)
        feeds = {name: self._to_runtime(array) for name, array in _feeds(plan, text, mask)}
        results = self._execute(plan.graph, {**feeds, **cache.fixed}, {})
        logits = self._to_numpy(results[self.graphs[plan.graph].outputs[0].name])
        new = logits[:, -tokens.shape[1] :].astype(np.float32, copy=False)
        return new, replace(cache, tokens=text)

    def _empty_state(self, plan: DecoderPlan, batch: int) -> dict[str, Any]:
        known = {"batch": batch}
        return {spec.name: self._zeros(spec, spec.sizes(known)) for spec, _ in plan.state}

    @abstractmethod
    def _execute(
        self, graph: str, feeds: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> dict[str, Any]:
        """Run a graph on the runtime's own tensors; ``sizes`` are the named sizes, where known."""

    @abstractmethod
    def _to_runtime(self, array: Array) -> Any:
        """Return the runtime's own tensor with the values of ``array``."""

    @abstractmethod
    def _to_numpy(self, value: Any) -> Array:
        """Return an array with the values of a tensor; 16-bit floats may come as float32."""

    @abstractmethod
    def _zeros(self, spec: TensorSpec, shape: tuple[int, ...]) -> Any:
        """Return a tensor of zeros."""


def open_artifact(
    folder: str | Path, *, threads: int = 0, progress: Progress | None = None
) -> Session:
    """Open the artifact in ``folder`` in the runtime that it was made for.

    Args:
        folder: an artifact folder, as ``Artifact.save`` writes it.
        threads: processor threads of one operator; 0 leaves the choice to the runtime.
        progress: is told how far it is.

    Raises:
        StorageError: the folder is no complete artifact, or refers to files outside of it, or no
            backend is known that it could be of.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    kind = backend_of(folder, manifest)
    return kind.open(folder, manifest, threads=threads, progress=progress or SilentProgress())


def backend_of(folder: Path, manifest: Mapping[str, Any]) -> type[Backend]:
    """Return the backend that an artifact was made by.

    Raises:
        StorageError: it is not known here.
    """
    from . import Backend, all_backends

    name, kinds = str(manifest["backend"]).partition("{")[0], all_backends()
    # A folder may be anybody's: what its manifest names is looked up, and never imported.
    if name not in kinds and name.partition(":")[0] not in sys.modules:
        raise StorageError(
            f"{folder}: was made by backend {name!r}, which this modelathe cannot run",
            remedy="upgrade modelathe, install the package that has this backend, or import it",
        )
    return class_called(name, kinds, Backend)


def check_kinds(session: Session, against: Session | None) -> None:
    """Check that two models can be compared.

    Raises:
        DataError: they are of different kinds.
    """
    if against is not None and against.kind != session.kind:
        raise DataError(
            f"the artifact is of kind {session.kind}, the reference of kind {against.kind}",
            remedy="compare with the model that the artifact was made from, or another of its kind",
        )


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return a JSON object of the artifact; an empty one when there is no such file."""
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StorageError(f"{folder / name}: is not JSON ({error})") from error
    return dict(value)


def positions(mask: Tokens, length: int) -> Tokens:
    """Return the position of each of the last ``length`` tokens: real tokens before it.

    >>> positions(np.array([[0, 0, 1, 1]]), 3).tolist()
    [[0, 0, 1]]
    """
    places: Tokens = np.clip(mask.cumsum(axis=1) - 1, 0, None)
    return places[:, -length:]


def _fitting(spec: TensorSpec, array: Array) -> Array:
    """Return an array in the dtype of an input; numpy has no bfloat16, so float32 stands for it.

    Raises:
        DataError: its sizes are others, or another dtype would lose more than float precision.
    """
    fits = array.ndim == len(spec.shape) and all(
        have == want
        for have, want in zip(array.shape, spec.shape, strict=True)
        if isinstance(want, int)
    )
    if not fits:
        raise DataError(
            f"{spec.name} has sizes {list(array.shape)}, and the model takes "
            f"[{', '.join(map(str, spec.shape))}]",
            remedy="give arrays with the sizes that `inspect` shows",
        )
    wanted = np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)
    if not np.can_cast(array.dtype, wanted, casting="same_kind"):
        raise DataError(
            f"{spec.name} is {array.dtype}, and the model takes {spec.dtype}",
            remedy="give arrays of the dtypes that `inspect` shows",
        )
    return array.astype(wanted, copy=False)


def _feeds(plan: DecoderPlan, tokens: Tokens, mask: Tokens) -> list[tuple[str, Tokens]]:
    tokens = np.ascontiguousarray(tokens, dtype=np.int64)
    mask = np.ascontiguousarray(mask, dtype=np.int64)
    feeds = [(plan.tokens, tokens)]
    if plan.mask:
        feeds.append((plan.mask, mask))
    if plan.positions:
        feeds.append((plan.positions, np.ascontiguousarray(positions(mask, tokens.shape[1]))))
    return feeds


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
