"""Model folders: captured without reading a weight, and refused with a reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelathe.ir import (
    CaptureError,
    FileWeight,
    ModelatheError,
    Program,
    StorageError,
    capture,
    load_program,
    save_program,
    to_text,
)
from support.feeds import feed, plain_outputs
from support.folders import copy_folder, tiny_bert, write_folder
from support.models import module, program
from support.numeric import assert_same_bits


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one weight file."""
    return write_folder(tiny_bert(), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def captured(bert: Path) -> Program:
    """That folder as a program."""
    return capture(bert)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with a tied head, in several weight files."""
    folder = tmp_path_factory.mktemp("gpt2")
    return write_folder(module("gpt2"), folder, max_shard_size="20KB")


@pytest.fixture(scope="module")
def unread(sharded: Path) -> Program:
    """The decoder, captured while nothing can be read from its files."""

    def refuse(*_: object) -> Tensor:
        raise AssertionError("a weight was read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileWeight, "load", refuse)
        return capture(sharded)


def test_capture_reads_no_weight(unread: Program, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for name, _ in module("gpt2").named_parameters():
        assert isinstance(unread.weight(name), FileWeight)


def test_a_folder_gives_the_program_of_the_module(unread: Program) -> None:
    assert to_text(unread) == to_text(program("gpt2"))
    assert unread.weights.aliases == program("gpt2").weights.aliases
    inputs = feed(unread, sequence=4, past=3)
    assert_same_bits(unread.run(inputs), program("gpt2").run(inputs))


def test_its_origin_says_where_it_comes_from(unread: Program, sharded: Path) -> None:
    origin = unread.origin
    assert (origin.model, origin.folder, origin.kind) == (str(sharded), sharded, "decoder")
    assert unread.config["n_layer"] == 2
    assert origin.source


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_bert(dtype)
    found = capture(write_folder(model, tmp_path))
    assert {found.weights[name].dtype for name in found.weights} == {dtype, torch.int64}
    inputs = feed(found, pads=2)
    assert_same_bits(found.run(inputs), plain_outputs(model, inputs, found.signature.outputs))


def test_a_folder_may_leave_out_its_architecture(
    bert: Path, captured: Program, tmp_path: Path
) -> None:
    folder = copy_folder(bert, tmp_path / "m", architectures=None)
    assert to_text(capture(folder)) == to_text(captured)


def test_the_untouched_program_can_be_captured_again(captured: Program) -> None:
    again = captured.origin.reference()
    assert again is not captured
    assert to_text(again) == to_text(captured)


def _pickled(bert: Path, target: Path) -> Path:
    folder = copy_folder(bert, target)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_pickle_is_read_only_when_it_is_trusted(
    bert: Path, captured: Program, tmp_path: Path
) -> None:
    folder = _pickled(bert, tmp_path / "m")
    with pytest.raises(CaptureError, match="a pickle can run code") as caught:
        capture(folder)
    assert "--allow-pickle" in caught.value.remedy
    found = capture(folder, allow_pickle=True)
    inputs = feed(found)
    assert_same_bits(found.run(inputs), captured.run(inputs))


def test_a_program_of_a_trusted_pickle_finds_it_again(bert: Path, tmp_path: Path) -> None:
    found = capture(_pickled(bert, tmp_path / "m"), allow_pickle=True)
    save_program(found, tmp_path)
    again = capture(tmp_path, allow_pickle=True)
    assert to_text(again.origin.reference()) == to_text(found)


def test_a_program_outlives_its_source(bert: Path, tmp_path: Path) -> None:
    source = copy_folder(bert, tmp_path / "m")
    for name in ("saved", "again"):
        (tmp_path / name).mkdir()
    save_program(capture(source), tmp_path / "saved")
    assert load_program(tmp_path / "saved").origin.folder == source.resolve()
    shutil.rmtree(source)
    found = load_program(tmp_path / "saved")
    assert found.origin.folder == (tmp_path / "saved").resolve()  # with the tokenizer's copy
    with pytest.raises(CaptureError, match=r"untouched model behind .*, is gone") as caught:
        found.origin.reference()
    assert "--no-check" in caught.value.remedy
    save_program(found, tmp_path / "again")  # what it holds is not the untouched model
    with pytest.raises(CaptureError, match="is gone"):
        load_program(tmp_path / "again").origin.reference()


def test_so_is_a_pickle_of_an_old_torch(bert: Path, captured: Program, tmp_path: Path) -> None:
    folder = _pickled(bert, tmp_path / "m")
    path = folder / "pytorch_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    inputs = feed(captured)
    assert_same_bits(capture(folder, allow_pickle=True).run(inputs), captured.run(inputs))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path, ("/",)


def test_a_trusted_pickle_still_holds_tensors_only(bert: Path, tmp_path: Path) -> None:
    folder = _pickled(bert, tmp_path / "m")
    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CaptureError, match="not a checkpoint of plain tensors"):
        capture(folder, allow_pickle=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [([torch.ones(1)], "holds a list, not tensors by name"), (torch.full((2,), torch.nan), "nan")],
)
def test_a_trusted_pickle_of_something_else_is_refused(
    bert: Path, tmp_path: Path, content: object, message: str
) -> None:
    folder = _pickled(bert, tmp_path / "m")
    found = {"weight": content} if isinstance(content, Tensor) else content
    torch.save(found, folder / "pytorch_model.bin")
    with pytest.raises(ModelatheError, match=message) as caught:
        capture(folder, allow_pickle=True)
    assert caught.value.remedy


def test_nan_and_inf_are_found_by_whoever_first_reads_them(bert: Path, tmp_path: Path) -> None:
    folder = copy_folder(bert, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    names = [f"encoder.layer.0.{part}.dense.weight" for part in ("intermediate", "output")]
    for name, value in zip(names, (float("nan"), float("inf")), strict=True):
        tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = capture(folder)
    for name in names:
        message = f"{folder / 'model.safetensors'}: {name} holds nan or inf"
        with pytest.raises(StorageError, match=re.escape(message)) as caught:
            found.weight(name).load()
        assert caught.value.remedy
    with pytest.raises(StorageError, match=names[0]):
        found.run(feed(found))


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.0.output.dense.weight"] = torch.zeros(16, 8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _incomplete(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _codes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _index(text: str) -> Callable[[Path], None]:
    return lambda folder: _write(folder / "model.safetensors.index.json", text)


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _settings(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **values}))

    return change


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config cut": (lambda f: _write(f / "config.json", '{"model_type": '), "is not JSON"),
    "config a list": (lambda f: _write(f / "config.json", "[]"), "holds no JSON object"),
    "settings cut": (
        lambda f: _write(f / "generation_config.json", "{"),
        r"generation_config\.json: is not JSON",
    ),
    "remote code": (_settings(auto_map={"AutoModel": "m.M"}), "auto_map.*never run"),
    "unknown type": (_settings(model_type="nope"), "transformers cannot read it"),
    "unknown class": (_settings(architectures=["NopeModel"]), "has no NopeModel"),
    "not a class": (_settings(architectures=["logging"]), "has no logging"),
    "wrong value": (_settings(hidden_size="wide"), r"config\.json"),
    "impossible sizes": (_settings(num_attention_heads=5), r"config\.json: no model can be made"),
    "no list of classes": (_settings(architectures="BertModel"), "'BertModel', not a list of"),
    "no classes in it": (_settings(architectures=[3]), r"architectures is \[3\], not a list of"),
    "what was wrong": (_settings(hidden_size="wide"), "'hidden_size': .*expected int"),
    "quantised": (_settings(quantization_config={"quant_method": "gptq"}), r"already \(gptq\)"),
    "codes": (_codes, "dense.weight holds int8 in the file, and a weight is a float"),
    "wrong dtype": (_settings(dtype="float64"), "dtype float64 is not supported"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "weights cut": (_cut, "model.safetensors: is not a complete safetensors file"),
    "no safetensors": (
        lambda f: _write(f / "model.safetensors", "hello"),
        "is not a complete safetensors file",
    ),
    "wrong shape": (_wrong_shape, r"dense.weight is \[16, 8\] in the file and \[16, 16\] by"),
    "weights missing": (_incomplete, "1 of the model's weights are in no file, such as encoder"),
    "index cut": (_index("{"), "is no index of weight files"),
    "index empty": (_index("{}"), "is no index of weight files"),
    "index leads out": (_index('{"weight_map": {"a": "../x.safetensors"}}'), "outside the folder"),
    "shard missing": (_index('{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors: is not a"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_with_cause_and_remedy(
    bert: Path, tmp_path: Path, case: str
) -> None:
    spoil, message = BROKEN[case]
    folder = copy_folder(bert, tmp_path / "m")
    spoil(folder)
    with pytest.raises(ModelatheError, match=message) as caught:
        capture(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
