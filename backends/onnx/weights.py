"""Weights as ONNX initializers that are read only when the file is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from ...ir.weights import Weight
from .builder import Builder, stored_dtype


class StoredWeights:
    """The weights of one graph: one initializer for each weight and form in which it is stored.

    Args:
        builder: the graph that gets them.
        weights: name to weight.
    """

    def __init__(self, builder: Builder, weights: Mapping[str, Weight]) -> None:
        self._builder = builder
        self._weights = weights
        self._values: dict[tuple[tuple[str, ...], str], ir.Value] = {}

    def plain(self, name: str) -> ir.Value:
        """Return the weight as it is."""
        weight = self._weights[name]
        return self.derived("", (name,), stored_dtype(weight.dtype), weight.shape, lambda t: t)

    def transposed(self, name: str) -> ir.Value:
        """Return a matrix as ``[in, out]``, turned over when it is written."""
        weight = self._weights[name]
        shape = weight.shape[::-1]
        return self.derived("T", (name,), stored_dtype(weight.dtype), shape, lambda t: t.T)

    def derived(
        self,
        form: str,
        names: tuple[str, ...],
        dtype: ir.DataType,
        shape: tuple[int, ...],
        make: Callable[..., Tensor],
    ) -> ir.Value:
        """Return an initializer made of one or more weights; one of bfloat16 comes as float32.

        Args:
            form: what ``make`` does; the same names in the same form are one initializer.
            names: the weights that ``make`` takes, in order; the first gives its name.
            dtype: in which the result is stored.
            shape: of the result.
            make: from the weights' tensors to what is stored.
        """
        key = (names, form)
        if key not in self._values:
            taken = self._builder.graph.initializers
            name = names[0] if names[0] not in taken else f"{names[0]}.{form or 'plain'}"
            load = self._loader(names, make, name)
            tensor = ir.LazyTensor(load, dtype, ir.Shape(shape), name=name)
            value = self._builder.initializer(tensor, name)
            if dtype == ir.DataType.BFLOAT16:  # ONNX Runtime widens it once, when it loads the file
                value = self._builder.cast(value, ir.DataType.FLOAT)
            self._values[key] = value
        return self._values[key]

    def _loader(
        self, names: tuple[str, ...], make: Callable[..., Tensor], name: str
    ) -> Callable[[], ir.TensorProtocol]:
        weights = [self._weights[n] for n in names]

        def load() -> ir.TensorProtocol:
            made = make(*(weight.load() for weight in weights))
            return TorchTensor(made.detach().contiguous(), name=name)

        return load
