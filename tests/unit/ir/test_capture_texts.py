"""What a model may be called: a file, a folder, a factory, a hub id."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from modelathe.demo import MODEL_FOLDER
from modelathe.ir import CaptureError, capture, save_program, to_text, verify
from modelathe.ir.capture import replace_origin
from support.feeds import feed
from support.folders import tiny_bert, write_folder
from support.models import MODELS, module, program
from support.numeric import assert_same_bits


@pytest.fixture
def pt2(tmp_path: Path) -> Path:
    """An exported program with a tied head."""
    case = MODELS["tied-head"]
    exported = torch.export.export(
        module("tied-head"), case.inputs or (), dynamic_shapes=case.dynamic, strict=False
    )
    torch.export.save(exported, tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def test_a_pt2_file_is_refused_unless_it_is_trusted(pt2: Path) -> None:
    with pytest.raises(CaptureError, match="may unpickle, and a pickle can run code") as caught:
        capture(pt2)
    assert "--allow-pickle" in caught.value.remedy


def test_a_trusted_pt2_file_gives_the_program_of_the_module(pt2: Path) -> None:
    found = capture(pt2, allow_pickle=True)
    verify(found)
    assert to_text(found).count("weight @") == to_text(program("tied-head")).count("weight @")
    assert found.weights.aliases == {"head.weight": "embed.weight"}
    inputs = feed(found, batch=3, sequence=5)
    assert_same_bits(found.run(inputs), program("tied-head").run(inputs))
    assert to_text(found.origin.reference()) == to_text(found)


def test_a_program_of_a_pt2_file_finds_it_from_another_folder(
    pt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = capture("model.pt2", allow_pickle=True)
    save_program(found, tmp_path)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    again = capture(tmp_path, allow_pickle=True)
    assert to_text(again.origin.reference()) == to_text(found)
    with pytest.raises(CaptureError, match="may unpickle"):
        capture(tmp_path).origin.reference()


@pytest.mark.parametrize("content", [b"", b"not a zip file"])
def test_a_damaged_pt2_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt2"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=r"x\.pt2: torch.export.load rejects it"):
        capture(path, allow_pickle=True)


FACTORY = """
import torch
from torch import nn

def model():
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    return nn.Linear(4, 2).eval(), (torch.ones(3, 4),), dynamic

def alone():
    return nn.Linear(4, 2)

def number():
    return 7

def raises():
    return {}["weights"]

five = 5
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module on the path, with factories in it."""
    (tmp_path / "my_factories.py").write_text(FACTORY)
    (tmp_path / "my_mistakes.py").write_text("def model(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_factories", raising=False)
    return "my_factories"


def test_a_factory_gives_module_inputs_and_sizes(factory: str) -> None:
    found = capture(f"{factory}:model")
    assert found.signature.dims == {"input": ("d0", 4)}
    assert found.origin.model == f"{factory}:model"
    assert found.origin.notes == (f"runs the user's own code: {factory}:model",)


def test_a_factory_that_a_program_folder_names_runs_only_where_it_is_trusted(
    factory: str, tmp_path: Path
) -> None:
    found = capture(f"{factory}:model")
    save_program(found, tmp_path)
    del sys.modules[factory]
    with pytest.raises(CaptureError, match=r"my_factories:model, which can run any code") as caught:
        capture(tmp_path).origin.reference()
    assert "--allow-pickle" in caught.value.remedy
    assert factory not in sys.modules
    trusted = capture(tmp_path, allow_pickle=True).origin.reference()
    assert to_text(trusted) == to_text(found)


def test_a_program_folder_cannot_have_the_hub_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("modelathe.ir.capture")
    monkeypatch.setattr(module, "fetch", lambda *_: pytest.fail("fetched"))
    save_program(replace_origin(program("norm-mlp"), captured_from="nobody/model"), tmp_path)
    with pytest.raises(CaptureError, match="nobody/model, which would be fetched from the hub"):
        capture(tmp_path).origin.reference()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_factories:gone", "cannot be imported"),
        ("no_such_module_here:model", "cannot be imported"),
        ("my_factories:number", "returned int"),
        ("my_factories:raises", "raised KeyError: 'weights'"),
        ("my_factories:five", "raised TypeError: 'int' object is not callable"),
        ("my_mistakes:model", "cannot be imported .*invalid syntax"),
        ("my_factories:alone", "training mode"),
    ],
)
def test_a_factory_that_gives_no_model_says_what_it_should_give(
    factory: str, name: str, message: str
) -> None:
    with pytest.raises(CaptureError, match=message) as caught:
        capture(name)
    assert caught.value.remedy


def test_the_source_of_a_model_without_files_is_its_values(pt2: Path) -> None:
    def source(model: nn.Module) -> str:
        return capture(model.eval(), (torch.ones(1, 2),)).origin.source

    ones, zeros = nn.Linear(2, 2), nn.Linear(2, 2)
    nn.init.ones_(ones.weight)
    assert source(ones) == source(ones) != source(zeros)
    assert capture(pt2, allow_pickle=True).origin.source


def test_a_program_folder_is_a_model(tmp_path: Path) -> None:
    save_program(program("norm-mlp"), tmp_path)
    assert to_text(capture(tmp_path)) == to_text(program("norm-mlp"))


@pytest.mark.parametrize(
    ("name", "folder"),
    [(Path("demo"), Path("demo")), ("./demo", Path("demo")), ("demo", MODEL_FOLDER)],
)
def test_only_the_plain_text_demo_is_the_embedded_model(
    name: str | Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    read: list[Path] = []
    module = importlib.import_module("modelathe.ir.capture")
    monkeypatch.setattr(
        module, "_capture_folder", lambda path, *_: read.append(path) or program("norm-mlp")
    )
    capture(name)
    assert read == [folder]


def test_the_origin_of_a_folder_called_demo_means_it_as_a_text_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tiny_bert(), tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert capture(Path("demo")).origin.model == "./demo"


def test_a_path_is_never_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("modelathe.ir.capture")
    monkeypatch.setattr(module, "fetch", lambda *_: pytest.fail("fetched"))
    with pytest.raises(CaptureError, match="no such folder"):
        capture(Path("nobody/no-such-model"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./none", "no such folder"),
        ("nobody/no-such-model", "no folder here, and no model that could be fetched"),
        ("missing.pt2", "no such file"),
    ],
)
def test_what_does_not_exist_is_said_to_be_missing(name: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message) as caught:
        capture(name)
    assert caught.value.remedy


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(CaptureError, match="is a file, not a model folder"):
        capture(path)


def test_an_untied_module_has_no_aliases() -> None:
    found = capture(nn.Linear(2, 2).eval(), (torch.ones(1, 2),))
    assert found.weights.aliases == {}
