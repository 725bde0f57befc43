"""Round trips of tiny models: folder, passes, ``--to checkpoint``, ``from_pretrained``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from modelathe.backends import Checkpoint
from modelathe.ir import Program, TensorWeight, capture
from modelathe.passes import Canonicalize, Equalize, FoldNorms, PruneBlocks

from .folders import write_folder
from .models import _GPT2, _LLAMA, _SIZES, _SPECIAL, Transformer, context, perturb

BLOCKS, KEPT = 3, (0, 2)
_DEEP = {"num_hidden_layers": BLOCKS}
_CAUSAL = "AutoModelForCausalLM"
SHAPES: Mapping[str, Transformer] = {
    "llama": Transformer(_CAUSAL, "llama", {**_LLAMA, **_DEEP, "tie_word_embeddings": True}),
    "gpt2": Transformer(_CAUSAL, "gpt2", {**_GPT2, **_SPECIAL, "n_layer": BLOCKS}),
    # gains written 1 + w; a head of its own, into which the last norm is folded
    "gemma": Transformer(
        _CAUSAL, "gemma", {**_LLAMA, **_DEEP, "head_dim": 8, "tie_word_embeddings": False}
    ),
    "bert": Transformer("AutoModel", "bert", {**_SIZES, **_DEEP}),
}


@dataclass(frozen=True, eq=False)
class Trip:
    """A model that went through passes and back.

    Attributes:
        program: what was lowered.
        folder: what was written.
        loaded: what ``from_pretrained`` makes of the folder.
        told: what it says about keys.
    """

    program: Program
    folder: Path
    loaded: Any
    told: Mapping[str, Any]

    @functools.cached_property
    def again(self) -> Program:
        """The folder, captured."""
        return capture(self.folder)


def model_folder(name: str, folder: Path) -> Path:
    """Write one of ``SHAPES`` with perturbed weights."""
    torch.manual_seed(0)
    model = SHAPES[name]().eval()
    perturb(model)
    return write_folder(model, folder)


def changed(folder: Path) -> Program:
    """Return a model folded, equalised in one block, without another, and with other weights."""
    program = Canonicalize()(capture(folder)).program
    program = FoldNorms()(program).program
    program = Equalize(kind="smooth", grid=1, only=("0",))(program, context()).program
    assert any(name.endswith("equalized") for name in program.weights)
    return healed(PruneBlocks(blocks=(1,))(program).program)


def healed(program: Program) -> Program:
    """Return a program whose parameters are all replaced, as training replaces them."""
    generator = torch.Generator().manual_seed(3)
    made = program.editable()
    for name in list(made.weights):
        if not made.weights.is_parameter(name):
            continue
        value = made.weights[name].load()
        noise = torch.randn(value.shape, generator=generator).to(value.dtype)
        retarget(made, name, made.add_weight(f"{name}.healed", TensorWeight(value + 0.01 * noise)))
    made.clean()
    return made


def retarget(program: Program, old: str, new: str) -> None:
    """Let every reader of one weight read another one."""
    for graph in program.graphs.values():
        for node in graph.find_nodes(op="get_attr"):
            if node.target == old:
                node.target = new


def round_trip(program: Program, folder: Path) -> Trip:
    """Write a program and read it back, with transformers and without."""
    import transformers

    Checkpoint().lower(program, check=False).save(folder)
    kind: Any = getattr(transformers, program.config["architectures"][0])
    loaded, told = kind.from_pretrained(folder, output_loading_info=True)
    return Trip(program, folder, loaded.eval(), told)


def linear_at(graph: fx.Graph, path: str) -> fx.Node:
    """Return the linear that a module calls."""
    from modelathe.ir import Linear, path_of

    return next(node for node in graph.nodes if Linear.match(node) and path_of(node) == path)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of a model by all their names."""
    return dict(model.named_parameters(remove_duplicate=False))
