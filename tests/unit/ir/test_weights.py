"""Weights are read when somebody needs them, rounded once, and never written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modelathe.ir import (
    ComputedWeight,
    FileWeight,
    SafetensorsFile,
    StorageError,
    TensorWeight,
    Weights,
    content_hash,
)
from modelathe.ir import files as files_module
from modelathe.ir.computed import cast


def seeded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def computed(value: Tensor, calls: list[torch.dtype], keep: bool = True) -> ComputedWeight:
    """A weight that is twice another one, and notes each evaluation."""

    def double(tensor: Tensor) -> Tensor:
        calls.append(tensor.dtype)
        return tensor.double() * 2

    source = TensorWeight(value)
    return ComputedWeight("double", (source,), tuple(value.shape), value.dtype, double, keep=keep)


@pytest.fixture
def file(tmp_path: Path) -> SafetensorsFile:
    path = tmp_path / "w.safetensors"
    save_file({"a": seeded(3, 4), "b": seeded(2).bfloat16(), "c": torch.arange(3)}, path)
    return SafetensorsFile(path)


def test_a_file_is_described_by_its_header(file: SafetensorsFile) -> None:
    found = file.weights()
    assert {name: (w.shape, w.dtype, w.bytes) for name, w in found.items()} == {
        "a": ((3, 4), torch.float32, 48),
        "b": ((2,), torch.bfloat16, 4),
        "c": ((3,), torch.int64, 24),
    }
    assert torch.equal(found["a"].load(), seeded(3, 4))


def test_the_fingerprint_of_a_file_reads_no_bytes(
    file: SafetensorsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SafetensorsFile, "load", None)
    prints = {name: weight.fingerprint for name, weight in file.weights().items()}
    assert len(set(prints.values())) == 3


def test_another_file_of_the_same_name_has_another_fingerprint(tmp_path: Path) -> None:
    prints = set()
    for size in (3, 4):
        save_file({"a": seeded(size)}, tmp_path / "w.safetensors")
        prints.add(SafetensorsFile(tmp_path / "w.safetensors").weights()["a"].fingerprint)
    assert len(prints) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_at_the_first_read(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    tensor = seeded(4, 4, dtype=dtype)
    tensor[2, 1] = value
    save_file({"w": tensor}, tmp_path / "w.safetensors")
    file = SafetensorsFile(tmp_path / "w.safetensors")
    weight = FileWeight(file, "w")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"w\.safetensors: w holds nan or inf"):
            weight.load()
    assert torch.equal(FileWeight(file, "w", finite=False).load(), tensor) or value != value


def test_finiteness_is_asked_once(file: SafetensorsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    real = files_module.is_finite

    def ask(tensor: Tensor) -> bool:
        asked.append(tensor)
        return real(tensor)

    monkeypatch.setattr(files_module, "is_finite", ask)
    weight = file.weights()["a"]
    weight.load()
    weight.load(torch.float64)
    assert len(asked) == 1


@pytest.mark.parametrize("content", [b"", b"\x00" * 20, b"x" * 5])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(StorageError, match="is not a complete safetensors file") as caught:
        SafetensorsFile(path)
    assert caught.value.remedy


def test_an_odd_dtype_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(2, dtype=torch.float8_e4m3fn)}, path)
    with pytest.raises(StorageError, match="w: dtype F8_E4M3 is not supported"):
        SafetensorsFile(path).weights()


def test_a_computed_weight_is_evaluated_once() -> None:
    calls: list[torch.dtype] = []
    weight = computed(seeded(3), calls)
    assert torch.equal(weight.load(), seeded(3) * 2)
    weight.load()
    assert calls == [torch.float32]


def test_a_computed_weight_that_is_not_kept_is_evaluated_again() -> None:
    calls: list[torch.dtype] = []
    weight = computed(seeded(3), calls, keep=False)
    weight.load()
    weight.load()
    assert len(calls) == 2


def test_a_computed_weight_is_rounded_once() -> None:
    """Rounded after each term, the sum would stay 1."""
    parts = [TensorWeight(torch.tensor([v], dtype=torch.float64)) for v in (1, 2**-24, 2**-50)]
    weight = ComputedWeight("sum", parts, (1,), torch.float32, lambda *t: sum(t))
    assert weight.load().item() == 1 + 2**-23


def test_a_wide_load_is_wide_all_the_way() -> None:
    calls: list[torch.dtype] = []
    inner = computed(seeded(3).bfloat16(), calls)
    outer = ComputedWeight("half", (inner,), (3,), torch.bfloat16, lambda t: t / 3)
    wide = outer.load(torch.float64)
    assert wide.dtype == torch.float64
    assert torch.equal(wide, seeded(3).bfloat16().double() * 2 / 3)
    assert calls == [torch.float64]


def test_what_is_made_wider_from_computed_weights_is_rounded_once() -> None:
    half = TensorWeight(torch.tensor([1.0009765625], dtype=torch.float16))
    square = ComputedWeight("square", (half,), (1,), torch.float16, lambda w: w.double() ** 2)
    cast = ComputedWeight("cast", (square,), (1,), torch.float32, lambda w: w)
    assert cast.load() == torch.tensor([1.0009765625]).double().square().float()
    assert square.load() != cast.load()


def test_a_rounded_weight_stays_rounded_in_a_wide_load() -> None:
    weight = ComputedWeight(
        "scale", (TensorWeight(seeded(3)),), (3,), torch.float32, lambda t: t / 3, rounded=True
    )
    assert torch.equal(weight.load(torch.float64), weight.load().double())


def test_a_cast_to_the_dtype_that_a_weight_has_is_that_weight() -> None:
    weight = TensorWeight(seeded(3))
    assert cast(weight, torch.float32) is weight
    assert torch.equal(cast(weight, torch.bfloat16).load(), seeded(3).bfloat16())


def test_the_rule_and_the_inputs_are_the_fingerprint() -> None:
    source = TensorWeight(seeded(3))

    def unread(_: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    def made(rule: str, value: TensorWeight) -> str:
        return ComputedWeight(rule, (value,), (3,), torch.float32, unread).fingerprint

    assert made("a", source) == made("a", TensorWeight(seeded(3)))
    assert len({made("a", source), made("b", source), made("a", TensorWeight(-seeded(3)))}) == 3


def test_a_rule_of_the_wrong_shape_is_an_error() -> None:
    weight = ComputedWeight("cut", (TensorWeight(seeded(3)),), (3,), torch.float32, lambda t: t[1:])
    with pytest.raises(StorageError, match=r"rule cut gave \(2,\), not \(3,\)"):
        weight.load()


def test_a_result_that_overflows_is_an_error() -> None:
    big = TensorWeight(torch.tensor([1e5], dtype=torch.float16).nan_to_num())
    weight = ComputedWeight("square", (big,), (1,), torch.float16, lambda t: t.double() ** 2)
    with pytest.raises(StorageError, match="rule square: the result does not fit") as caught:
        weight.load()
    assert "bfloat16" in caught.value.remedy


def test_the_infinities_of_a_mask_may_be_computed() -> None:
    mask = TensorWeight(torch.tensor([0.0, -torch.inf]))
    weight = ComputedWeight("copy", (mask,), (2,), torch.float32, lambda t: t)
    assert torch.equal(weight.load(), mask.tensor)


def test_a_write_into_a_tensor_is_seen() -> None:
    tensor = seeded(3)
    weight = TensorWeight(tensor)
    assert not weight.written
    tensor.mul_(2)
    assert weight.written


def test_names_never_collide() -> None:
    weights = Weights({"w": TensorWeight(seeded(1))}, {"alias": "w"})
    assert weights.add("w", TensorWeight(seeded(2))) == "w_1"
    assert weights.add("w", TensorWeight(seeded(2))) == "w_2"
    assert weights.add("alias", TensorWeight(seeded(2))) == "alias_1"


def test_an_alias_reads_the_weight_that_it_stands_for() -> None:
    weights = Weights({"w": TensorWeight(seeded(1)), "v": TensorWeight(seeded(2))}, {"a": "w"})
    assert weights["a"] is weights["w"]
    assert list(weights) == ["w", "v"]
    weights.keep_only({"v"})
    assert (list(weights), weights.aliases) == (["v"], {})


def test_a_name_that_a_buffer_left_is_free_for_a_parameter() -> None:
    weights = Weights(
        {"angles": TensorWeight(seeded(1)), "w": TensorWeight(seeded(2))}, {}, ["angles"]
    )
    weights.keep_only({"w"})
    assert weights.buffers == frozenset()
    assert weights.is_parameter(weights.add("angles", TensorWeight(seeded(1))))


def test_what_is_made_of_a_buffer_stays_one_when_that_is_gone() -> None:
    weights = Weights({"angles": TensorWeight(seeded(1))}, {}, ["angles"])
    made = weights.add("angles.folded", TensorWeight(seeded(1)))
    weights.keep_only({made})
    assert not weights.is_parameter(made)


def test_a_content_hash_knows_dtype_shape_and_bytes() -> None:
    values = [seeded(4), seeded(2, 2), seeded(4).bfloat16(), -seeded(4), torch.zeros(0)]
    assert len({content_hash(value) for value in values}) == len(values)
    assert content_hash(seeded(4, 4).T) == content_hash(seeded(4, 4).T.contiguous())
