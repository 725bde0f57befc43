"""A saved program is the same program, and a damaged one is refused."""

from __future__ import annotations

import json
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import (
    CaptureError,
    FileWeight,
    StorageError,
    capture,
    fingerprint,
    is_program_folder,
    load_program,
    save_program,
    to_text,
    verify,
)
from modelathe.ir.storage import PROGRAM_FILE, WEIGHTS_FILE
from support.feeds import feed
from support.models import MODELS, canonical, program
from support.numeric import assert_same_bits

Description = dict[str, Any]


@pytest.mark.parametrize("name", MODELS)
def test_saving_and_loading_keeps_everything(name: str, tmp_path: Path) -> None:
    found = program(name)
    save_program(found, tmp_path)
    again = load_program(tmp_path)
    verify(again)
    assert to_text(again) == to_text(found)
    assert fingerprint(again) == fingerprint(found)
    assert again.signatures == found.signatures
    assert again.config == json.loads(json.dumps(found.config))
    assert again.weights.aliases == found.weights.aliases
    assert again.kind == found.kind
    for graph, nodes in found.graphs.items():
        notes = [node.meta.get("custom") for node in nodes.nodes]
        assert [node.meta.get("custom") for node in again.graphs[graph].nodes] == notes
        inputs = feed(found, graph, sequence=3, past=2)
        assert_same_bits(again.run(inputs, graph), found.run(inputs, graph))


def test_so_it_does_with_operators_of_our_own(tmp_path: Path) -> None:
    found = canonical("llama")
    save_program(found, tmp_path)
    again = load_program(tmp_path)
    assert "modelathe.rotary(" in to_text(again)
    assert fingerprint(again) == fingerprint(found)
    inputs = feed(found, sequence=3, past=2)
    assert_same_bits(again.run(inputs), found.run(inputs))


def test_weights_stay_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_program(program("norm-mlp"), tmp_path)
    monkeypatch.setattr(FileWeight, "load", None)
    fingerprint(load_program(tmp_path))


def test_there_is_no_pickle_in_it(tmp_path: Path) -> None:
    save_program(program("tied-blocks"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PROGRAM_FILE, WEIGHTS_FILE]
    for path in tmp_path.iterdir():
        assert not zipfile.is_zipfile(path)
        with pytest.raises(ValueError, match=r"opcode|exhausted|not enough"):
            list(pickletools.genops(path.read_bytes()))
    json.loads((tmp_path / PROGRAM_FILE).read_text())


def test_a_folder_is_known_by_its_file(tmp_path: Path) -> None:
    assert not is_program_folder(tmp_path)
    save_program(program("norm-mlp"), tmp_path)
    assert is_program_folder(tmp_path)


def test_whoever_writes_sees_each_value_once(tmp_path: Path) -> None:
    seen: dict[str, Tensor] = {}
    save_program(program("tied-head"), tmp_path, seen.__setitem__)
    assert set(seen) == set(program("tied-head").weights)


class Masked(nn.Module):
    """A mask with infinities, constants of several kinds, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        halves = x.to(torch.float16).split(2, dim=-1)
        top = x.clamp(max=float("inf")) + self.get_buffer("mask")
        return top, torch.zeros_like(halves[1], dtype=torch.bfloat16) + x.shape[0] // 2


def test_infinities_of_a_mask_and_odd_arguments_survive(tmp_path: Path) -> None:
    model = Masked().eval()
    found = capture(model, (torch.ones(4, 4),))
    save_program(found, tmp_path)
    x = feed(found)
    assert_same_bits(load_program(tmp_path).run(x), found.run(x))


def test_a_program_of_a_module_in_memory_has_no_untouched_one(tmp_path: Path) -> None:
    save_program(program("norm-mlp"), tmp_path)
    with pytest.raises(CaptureError, match="is not available"):
        load_program(tmp_path).origin.reference()


def test_a_folder_of_the_first_release_finds_its_source(tmp_path: Path) -> None:
    save_program(program("norm-mlp"), tmp_path)
    _edit(lambda d: (d["origin"].pop("captured_from"), d["origin"].update(model="demo")))(tmp_path)
    assert load_program(tmp_path).origin.captured_from == "demo"


def test_symbolic_sizes_survive(tmp_path: Path) -> None:
    class Reshapes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.shape[0] * x.shape[1] // 2
            return x.reshape(rows, 2, -1) + rows

    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: 2 * torch.export.Dim("half", min=1, max=99)},)
    found = capture(Reshapes().eval(), (torch.ones(3, 4, 5),), dynamic)
    save_program(found, tmp_path)
    again = load_program(tmp_path)
    assert to_text(again) == to_text(found)
    (name,) = found.signature.inputs
    for shape in ((3, 4, 5), (5, 2, 5)):
        x = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0))}
        assert_same_bits(again.run(x), found.run(x))


def _edit(change: Callable[[Description], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / PROGRAM_FILE
        description = json.loads(path.read_text())
        change(description)
        path.write_text(json.dumps(description))

    return apply


def _target(text: str) -> Callable[[Path], None]:
    def change(description: Description) -> None:
        nodes = description["graphs"]["main"]["nodes"]
        next(node for node in nodes if node["op"] == "call_function")["target"] = text

    return _edit(change)


def _node(**values: Any) -> Callable[[Path], None]:
    def change(description: Description) -> None:
        nodes = description["graphs"]["main"]["nodes"]
        next(node for node in nodes if node["op"] == "call_function").update(values)

    return _edit(change)


def _truncate(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-8])


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (lambda f: (f / PROGRAM_FILE).write_text('{"format'), "is not a saved program"),
    "a list": (lambda f: (f / PROGRAM_FILE).write_text("[]"), "is not a saved program"),
    "no graphs": (_edit(lambda d: d.pop("graphs")), "is not a saved program"),
    "other version": (_edit(lambda d: d.update(format_version=99)), "has format version 99"),
    "unknown operator": (_target("ops.aten.no_such_thing.default"), "no_such_thing"),
    "foreign operator": (_target("ops.mkldnn._linear_pointwise.default"), "a call of ops.mkldnn"),
    "operator that writes": (_target("ops.aten.relu_.default"), "writes in place"),
    "operator on files": (_target("ops.aten.from_file.default"), "a call of ops.aten.from_file"),
    "no operator": (_target("ops.aten.relu"), "a call of ops.aten.relu"),
    "python function": (_target("operator.methodcaller"), "a call of operator.methodcaller"),
    "any call": (_target("operator.call"), "a call of operator.call"),
    "torch function": (_target("torch.load"), "a call of torch.load"),
    "builtin": (_target("builtins.eval"), "a call of builtins.eval"),
    "kind of node": (_node(op="call_method"), "a node of kind call_method"),
    "argument": (_node(args=[{"object": "os"}]), "an argument"),
    "unknown node": (_node(args=[{"node": "nowhere"}]), "nowhere"),
    "wrong shape": (_node(args=[{"node": "x"}, [9], None, None]), "is not a saved program"),
    "weight gone": (_edit(lambda d: d["fingerprints"].popitem()), "is not a saved program"),
    "weights cut": (_truncate, "is not a complete safetensors file"),
    "weights gone": (lambda f: (f / WEIGHTS_FILE).unlink(), "weights.safetensors"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_refused(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[case]
    save_program(program("norm-mlp"), tmp_path)
    damage(tmp_path)
    with pytest.raises(StorageError, match=message) as caught:
        load_program(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.remedy


def test_nan_in_the_weights_is_found_when_they_are_read(tmp_path: Path) -> None:
    save_program(program("norm-mlp"), tmp_path)
    path = tmp_path / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    again = load_program(tmp_path)
    with pytest.raises(StorageError, match="holds nan or inf"):
        again.run(feed(again))
