"""A program as the model that its configuration describes, or the reason why it is none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...ir import (
    LoweringError,
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
    Weight,
    Weights,
)
from ...ir.activations import RoundedActivations
from ...ir.cache import CachedCodes
from ...ir.checkpoint import fake_model, read_config, stored_tensors
from ...ir.computed import cast
from ...ir.mapping import map_weights, tied_names
from ...passes import Canonicalize
from .align import Alignment, align, first
from .architecture import (
    Config,
    Key,
    Switch,
    architecture,
    bias_switches,
    empty_model,
    starting_config,
    switched,
    tied_keys,
)
from .assign import Assignment, assign

_ELSEWHERE = "leave out the pass that made it, or write --to program or --to onnx"


def as_architecture(program: Program) -> Program:
    """Return the architecture that the program's configuration describes, with its weights.

    The graphs are those that transformers would run, the weights are named as its parameters (also
    those that no graph reads), and the configuration is what ``config.json`` must say.

    Raises:
        LoweringError: no configuration of the architecture describes the program; the message
            names the first call, weight or key that is in the way.
    """
    _refuse_quantized(program)
    fit = _fit(Canonicalize()(program).program, starting_config(program))
    values = fit.given.values | _unread(program, fit)
    weights = fit.architecture.weights
    notes = [f"config.json: {'.'.join(key)} is {value} now" for key, value in fit.switches.items()]
    return replace(
        fit.architecture,
        weights=Weights({**weights, **values}, weights.aliases, weights.buffers),
        origin=replace(program.origin, notes=(*program.origin.notes, *notes)),
    )


@dataclass(frozen=True, slots=True)
class _Fit:
    """An architecture that computes what a program does.

    Attributes:
        config: what describes it.
        switches: keys of it that were changed to make it fit.
        architecture: as it is captured.
        found: which calls and weights are which.
        given: the values of its parameters.
    """

    config: Config
    switches: dict[Key, bool]
    architecture: Program
    found: Alignment
    given: Assignment


def _fit(program: Program, config: Config) -> _Fit:
    """Find the configuration that describes a canonical program, beginning with ``config``.

    Raises:
        LoweringError: there is none.
    """
    switches: dict[Key, bool] = {}
    while True:
        theirs = architecture(config)
        canonical = Canonicalize()(theirs).program
        found = align(program, canonical)
        if found.differences:
            raise LoweringError(
                f"{_name(config)} cannot express the program: {first(found.differences)}",
                remedy=_ELSEWHERE,
            )
        if found.biases:
            wanted = bias_switches(config, set(found.biases))
        else:
            given = assign(program, theirs, canonical, found)
            wanted = _tying(config, given)
            if not wanted:
                return _Fit(config, switches, theirs, found, given)
        for key, value in wanted:
            if key in switches:
                text = ".".join(key)
                raise LoweringError(f"{_name(config)} cannot have {text} both true and false")
            switches[key] = value
            config = switched(config, (key, value))


def _name(config: Config) -> str:
    return str(config["architectures"][0])


def _refuse_quantized(program: Program) -> None:
    for graph in program.graphs.values():
        for node in graph.nodes:
            if QuantizedLinear.match(node) or QuantizedEmbedding.match(node):
                raise LoweringError(
                    f"%{node.name} reads quantised weights, and a checkpoint holds plain ones",
                    remedy="leave out quantize-weights, or write --to onnx or --to program",
                )
            if RoundedActivations.match(node):
                raise LoweringError(
                    f"%{node.name} rounds activations, and transformers does not",
                    remedy="leave out quantize-activations, or write --to onnx or --to program",
                )
            if CachedCodes.match(node):
                raise LoweringError(
                    f"%{node.name} reads a cache of codes, and transformers keeps plain ones",
                    remedy="leave out quantize-cache, or write --to onnx or --to program",
                )


def _tying(config: Config, given: Assignment) -> list[Switch]:
    """Return what to switch so that each parameter has one value, and each value one parameter.

    Raises:
        LoweringError: the architecture shares other weights than the program does.
    """
    if given.rivals:
        if switches := tied_keys(config, value=False):
            return switches
        name, sources = next(iter(given.rivals.items()))
        raise LoweringError(
            f"{_name(config)} has one weight {name} where the program has several: "
            f"{', '.join(f'@{source}' for source in sources)}",
            remedy=_ELSEWHERE,
        )
    for source, names in given.copies.items():
        for switch in tied_keys(config, value=True):
            shared = tied_names(empty_model(switched(config, switch)))
            if len({shared.get(name) for name in names}) == 1:
                return [switch]
        raise LoweringError(
            f"@{source} is shared, and {_name(config)} has a weight of its own for each reader: "
            f"{', '.join(names)}",
            remedy="write --to program or --to onnx, which keep it shared",
        )
    return []


def _unread(program: Program, fit: _Fit) -> dict[str, Weight]:
    """Return the parameters that no graph reads, as the program's source has them.

    Raises:
        LoweringError: they are not to be found there.
    """
    model = empty_model(fit.config)
    state, shared = model.state_dict(keep_vars=True), tied_names(model)
    missing = [n for n in state if shared.get(n, n) == n and n not in fit.given.values]
    source = _source(program) if missing else {}
    values = {}
    for name in missing:
        if name in fit.architecture.weights:
            raise LoweringError(f"{name}: nothing in the program says what its value is")
        weight = source.get(_before(name, fit.found.blocks))
        if weight is None or weight.shape != tuple(state[name].shape):
            raise LoweringError(
                f"{name}: no call reads it, so the program does not hold its value",
                remedy="run the pipeline on the model's folder, where the value is",
            )
        values[name] = cast(weight, state[name].dtype)
    return values


def _source(program: Program) -> dict[str, Weight]:
    """Return all weights of the folder that a program was captured from, if there is one."""
    folder = program.origin.captured_from
    if not isinstance(folder, Path) or not folder.is_dir():
        return {}
    model: Any = fake_model(folder, read_config(folder))[0]
    stored = stored_tensors(folder, program.origin.allow_pickle)
    return map_weights(model, stored, folder).weights


def _before(name: str, blocks: dict[str, str]) -> str:
    """Return the name that a parameter had before blocks were renumbered."""
    for new, old in blocks.items():
        if name.startswith(f"{new}."):
            return f"{old}{name.removeprefix(new)}"
    return name
